"""Ladder and leave-one-out: which rows, which commands, what interruptions and failures cost."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_args
from PIL import Image

import run_benchmark
from utils import card, results, series, series_rows
from utils.errors import UserError
from utils.report_rows import read
from utils.report_series import series_of

ROOT = Path(__file__).resolve().parent.parent
SHORT = ("--device", "cpu", "--num_runs", "2", "--num_warmup", "0", "--quality_prompts", "1")


def arguments(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *flags])
    return run_benchmark.parse_arguments()


def test_the_ladder_turns_on_one_step_more_in_each_row(monkeypatch):
    rows = series.ladder(arguments(monkeypatch, "--ladder"))
    assert [row.name for row in rows] == [
        "fp32",
        "eager",
        "+ fused_projections",
        "+ fa3",
        "+ channels_last",
        "+ quant",
        "+ device_images",
        "+ compile",
        "+ inductor_tuning_flags",
        "export_aoti",
    ]
    before = None
    for row in rows[1:-1]:
        args = make_args("--device", "cpu", *row.flags)
        on = {name for name, verdict in args.plan.items() if verdict.is_on}
        if row.name == "eager":
            assert not on
        elif row.step not in ("quant", "device_images"):  # unavailable on a CPU
            assert on - before == {row.step} and not before - on, row
        before = on
    assert make_args("--device", "cpu", *rows[-1].flags).plan["export_aoti"].is_on


def test_a_step_cache_comes_where_its_settings_are_given(monkeypatch):
    flags = ("--ladder", "--cache_dit_config", "cache_config.yaml")
    rows = {row.name: row for row in series.ladder(arguments(monkeypatch, *flags))}
    assert "export_aoti" not in rows
    names = list(rows)
    assert names.index("+ cache_dit") == names.index("+ channels_last") + 1
    for name, row in rows.items():
        plan = make_args("--device", "cpu", "--ckpt", "tiny-dev", *row.flags).plan
        assert plan["cache_dit"].is_on == (names.index(name) >= names.index("+ cache_dit"))


def test_a_step_mask_is_the_last_rung_and_keeps_the_packages(monkeypatch):
    flags = ("--ladder", "--step_mask", "fast", "--step_mask_order", "0")
    rows = series.ladder(arguments(monkeypatch, *flags))
    assert [row.name for row in rows[-3:]] == [
        "+ inductor_tuning_flags",
        "+ step_mask",
        "export_aoti",
    ]
    for row in rows:
        plan = make_args("--device", "cpu", "--ckpt", "tiny-dev", *row.flags).plan
        assert plan["step_mask"].is_on == (row in rows[-2:])
        assert not plan["step_mask"].is_on or plan["step_mask"].settings["order"] == 0
    rows = series.leave_one_out(arguments(monkeypatch, "--leave_one_out", *flags[1:]))
    assert rows[0].flags[-4:] == flags[1:]
    assert "--step_mask" not in {row.name: row.flags for row in rows}["without step_mask"]
    typed = "--ladder --step_mask fast --step-mask-gain=0.5 --step_mask_order 0 --seed 1"
    assert series.common_flags(typed.split()) == ["--seed", "1"]


def test_leave_one_out_turns_one_off_in_each_row(monkeypatch):
    flags = ("--leave_one_out", "--compile_export_mode", "compile")
    rows = series.leave_one_out(arguments(monkeypatch, *flags))
    assert [row.step for row in rows] == [None, *series.toggles(make_args()), "compile"]
    on = {}
    for row in rows:
        plan = make_args("--device", "cpu", *row.flags).plan
        on[row] = {name for name, verdict in plan.items() if verdict.is_on}
    for row in rows[1:]:
        lost = {row.step} - {"quant", "device_images"}  # unavailable on a CPU
        if row.step == "compile":
            lost.add("inductor_tuning_flags")
        assert on[rows[0]] - on[row] == lost, row


def test_rows_are_picked_by_name(monkeypatch):
    rows = series.ladder(arguments(monkeypatch, "--ladder"))
    assert [row.name for row in series.choose(rows, "fa3, fp32,eager")] == [
        "fp32",
        "eager",
        "+ fa3",
    ]
    assert "fp32" not in [row.name for row in series.choose(rows, None)]
    with pytest.raises(UserError, match=r"--rows: unknown row 'warp' \(expected some of: fp32"):
        series.choose(rows, "eager,warp")


def test_peers_are_picked_with_or_without_their_prefix(monkeypatch):
    rows = series.peer_rows(arguments(monkeypatch, "--peers"))
    for names in ("ours,diffusers-eager", "ours,peer:diffusers-eager"):
        assert [row.name for row in series.choose(rows, names)] == ["ours", "peer:diffusers-eager"]


def test_a_peer_that_cannot_run_here_is_skipped_and_told_why(monkeypatch):
    monkeypatch.setattr(series.peers, "lacking", lambda name, machine: f"no {name} here")
    ours, other, *_ = series.peer_rows(arguments(monkeypatch, "--peers"))
    assert series.state(ours, []) == ""
    assert series.state(other, ["--device", "cpu"]) == "unavailable: no diffusers-eager here"


def test_a_row_keeps_what_was_typed_but_for_the_flags_of_the_series():
    typed = "--ladder --rows eager,fa3 --ckpt tiny-dev --rounds=2 --results x.jsonl --num-runs 3"
    assert series.common_flags(typed.split()) == ["--ckpt", "tiny-dev", "--num-runs", "3"]
    typed = "--leave-one-out --compile-export-mode compile --cache-dit-config=c.yaml --seed 1"
    assert series.common_flags(typed.split()) == ["--seed", "1"]


def test_a_ladder_is_stored_row_by_row_and_goes_on_where_it_stopped(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    flags = ("--ladder", "--rows", "eager,quant,fused_projections", "--results", str(path), *SHORT)
    args = arguments(monkeypatch, *flags)
    assert series.run_series(args, list(flags)) == 0
    rows = read(path)
    assert [(row["row"], row["position"]) for row in rows] == [
        ("eager", 1),
        ("+ fused_projections", 2),
    ]
    assert "+ quant: unavailable: float8 products need" in capsys.readouterr().out
    for row in rows:
        words = shlex.split(row["command"])
        assert words[:2] == ["python", "run_benchmark.py"] and "--ladder" not in words
        assert row["total_s"]["n"] == 2 and row["quality"]["images"] == 1
        assert "--pictures" not in words
        for key in ("pictures", "reference_pictures"):
            with Image.open(tmp_path / row[key]) as strip:
                assert strip.size == (128, 128)
    assert rows[0]["quality"]["psnr_db_worst"] is None  # eager is the reference
    assert rows[0]["quality"]["fp32_relative_l2"] == rows[0]["quality"]["eager_fp32_relative_l2"]

    # as if this tree were a clean commit, and the last row had been cut off by an interruption
    for row in rows:
        row["environment"]["commit"] = "clean"
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1])[:100])
    monkeypatch.setattr(card, "commit", lambda: "clean")
    ran = []
    monkeypatch.setattr(series_rows, "run_row", lambda words, _: ran.append(words) or dict(rows[1]))
    assert series.run_series(args, list(flags)) == 0
    assert len(ran) == 1 and shlex.split(rows[1]["command"])[2:] == ran[0]
    output = capsys.readouterr()
    assert "eager: kept from before" in output.out
    assert [row["row"] for row in read(path)] == ["eager", "+ fused_projections"]
    assert ":2: skipped: not JSON" in capsys.readouterr().err
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE", "1")  # which no command tells
    assert series.run_series(args, list(flags)) == 0
    assert len(ran) == 3


def test_a_row_that_two_series_share_is_measured_once_and_stands_in_both(monkeypatch, tmp_path):
    """The same eager row begins the ladder with a step cache and the one without."""
    path = tmp_path / "rows.jsonl"
    plain = ("--ladder", "--ckpt", "tiny-dev", "--rows", "eager", "--results", str(path), *SHORT)
    cached = (*plain, "--cache_dit_config", str(ROOT / "cache_config.yaml"))
    spread = {"median": 1.0, "min": 1.0, "max": 1.0, "n": 1, "samples": [1.0]}
    row = {"format": 2, "total_s": spread, "quality": {"psnr_db_worst": None}}
    row |= {"call": {"ckpt": "tiny-dev"}, "environment": {"commit": "clean"}}
    ran = []
    monkeypatch.setattr(card, "commit", lambda: "clean")
    monkeypatch.setattr(series_rows, "run_row", lambda words, _: ran.append(words) or dict(row))
    for flags in (plain, cached, cached):
        assert series.run_series(arguments(monkeypatch, *flags), list(flags)) == 0
    first, second = read(path)
    assert len(ran) == 1 and "with" not in first
    assert second["with"].startswith("step cache ") and second["command"] == first["command"]
    assert [s.base["row"] for s in series_of([first, second])] == ["eager", "eager"]


def test_a_failing_row_is_kept_with_its_reason(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    flags = ("--ladder", "--rows", "eager,compile", "--results", str(path), *SHORT)
    flags += ("--num_inference_steps", "1")
    monkeypatch.setenv("CXX", "false")  # there is one, and it fails
    command = [sys.executable, "run_benchmark.py", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    eager, failed = read(path)
    assert eager["row"] == "eager" and "failed" not in eager
    assert failed["row"] == "+ compile" and failed["failed"].startswith("exit code 1: ")
    assert failed["call"] == eager["call"]
    said, summary = done.stdout.split("FAILED: exit code 1")
    assert "TORCH_LOGS" in said and "rows are in" in summary  # the end of its trace


def test_rounds_take_turns(monkeypatch, tmp_path):
    path = tmp_path / "rows.jsonl"
    flags = ("--ladder", "--rows", "eager,fa3", "--rounds", "2", "--results", str(path), *SHORT)
    args = arguments(monkeypatch, *flags)
    spread = {"median": 1.0, "min": 1.0, "max": 1.0, "n": 1, "samples": [1.0]}
    row = {"format": 2, "total_s": spread, "quality": {"psnr_db_worst": None}}
    row |= {"call": {}, "environment": {}}
    monkeypatch.setattr(series_rows, "run_row", lambda *_: dict(row))
    assert series.run_series(args, list(flags)) == 0
    found = [(row["row"], row["round"]) for row in read(path)]
    assert found == [("eager", 0), ("+ fa3", 0), ("eager", 1), ("+ fa3", 1)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--ladder", "--leave_one_out"), "expected one of them"),
        (("--ladder", "--compare", "a", "b"), "--ladder, --compare: expected one of them"),
        (("--explain", "--compare", "a", "b"), "--compare, --explain: expected one of them"),
        (("--rows", "eager"), "--rows: expected together with --ladder, --leave_one_out, --peers"),
        (("--ladder", "--rows", "warp"), "--rows: unknown row 'warp'"),
        (("--peers", "--peer", "flux-fast"), "--peer flux-fast: one row; expected without --peers"),
        (("--ladder", "--results", "/no/such/folder/rows.jsonl"), "/no/such/folder does not exist"),
        (("--results", "/no/such/folder/rows.jsonl"), "cannot be written (No such file"),
        (("--rounds", "0"), "--rounds 0: expected 1 or more"),
        (("--ladder", "--rounds", "0"), "--rounds 0: expected 1 or more"),
    ],
)
def test_bad_input_is_one_line(flags, expected):
    command = [sys.executable, "run_benchmark.py", "--device", "cpu", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stdout
    assert expected in done.stderr and len(done.stderr.splitlines()) == 1


def test_a_disk_that_fills_up_costs_no_measured_row(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    flags = ("--ladder", "--rows", "eager,fa3", "--results", str(path), *SHORT)
    args = arguments(monkeypatch, *flags)
    spread = {"median": 1.0, "min": 1.0, "max": 1.0, "n": 1, "samples": [1.0]}
    row = {"format": 2, "total_s": spread, "quality": {"psnr_db_worst": None}}
    row |= {"call": {}, "environment": {}}
    monkeypatch.setattr(series_rows, "run_row", lambda *_: dict(row))

    def append(where, rows):
        if rows and where.exists():  # room for one row
            raise UserError("--results: cannot be written (No space left on device)")
        results.append(where, rows)

    monkeypatch.setattr(series_rows, "append", append)
    with pytest.raises(UserError, match="No space left"):
        series.run_series(args, list(flags))
    assert [row["row"] for row in read(path)] == ["eager"]
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [json.loads(line)["row"] for line in shown] == ["+ fa3"]


def test_results_do_not_make_a_commit_dirty(tmp_path, monkeypatch):
    """A ladder writes tracked results, and goes on only where the code is that of its rows."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path,
                       check=True, capture_output=True)  # fmt: skip

    for name in ("results/rows.jsonl", "utils/card.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    monkeypatch.setattr(card, "__file__", str(tmp_path / "utils" / "card.py"))
    clean = card.commit()
    assert len(clean) == 12
    (tmp_path / "results" / "rows.jsonl").write_text("2\n")
    assert card.commit() == clean
    (tmp_path / "utils" / "card.py").write_text("2\n")
    assert card.commit() == clean + "-dirty"


def test_a_full_disk_is_one_line_and_keeps_what_is_there(tmp_path):
    with pytest.raises(UserError, match="--results /dev/full: cannot be written"):
        results.append(Path("/dev/full"), [{"command": "x"}])


def test_rows_are_lines_and_one_that_was_cut_off_stays_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    for text in ("", '{"a": "é"}\n'):  # a new file, then one that ends as it should
        results.append(path, [{"a": "é"}])
        assert path.read_text() == text + '{"a": "é"}\n'
    path.write_text('{"cut')
    results.append(path, [{"b": 1}, {"c": 2}])
    assert path.read_text() == '{"cut\n{"b": 1}\n{"c": 2}\n'

"""Forward selection: what is tried on what, what is kept, what is said."""

import re
import shlex
import sys

import pytest
import report_pieces
from conftest import make_args
from test_series import SHORT, arguments

from extras.doctor import availability
from utils import card, report_plot, report_series, report_table, selection, series, series_rows
from utils.errors import UserError
from utils.hardware import Machine
from utils.pipeline_utils import STEPS
from utils.report_rows import read
from utils.steps import fa3

QUALITY = {"psnr_db_worst": 50.0, "images": 1, "latents_relative_l2": 0.01}
GAIN = {"--modulation_once": 0.8, "--fused_mlp": 0.9, "transposed": 1.1, "phases": 0.7}
WORSE = ("--fused_mlp",)  # errs more


def fake(words: list[str], n: int = 10) -> dict:
    """Make up a row whose time follows from its flags."""
    seconds = 1.0
    for word in words:
        seconds *= GAIN.get(word, 1.0)
    wrong = {"latents_relative_l2": 0.02} if set(WORSE) & set(words) else {}
    timed = report_pieces.spread(seconds, n=n, seed=len(words))
    found = {"format": 2, "total_s": timed, "quality": QUALITY | wrong, "lossless": True}
    return found | {"call": {"ckpt": "tiny-schnell"}, "environment": {"commit": "clean"}}


@pytest.fixture
def select(monkeypatch, tmp_path):
    """Give a function that runs a selection with made-up rows: its exit code, rows, commands."""
    monkeypatch.setattr(card, "commit", lambda: "clean")
    path = tmp_path / "rows.jsonl"

    def run(*flags, row=fake):
        ran = []
        monkeypatch.setattr(
            series_rows, "run_row", lambda words, _: ran.append(words) or row(words)
        )
        typed = ("--forward_selection", "--results", str(path), *SHORT, *flags)
        code = series.run_series(arguments(monkeypatch, *typed), list(typed))
        own = [" ".join(words).partition("--quality_prompts 1")[2].strip() for words in ran]
        return code, read(path) if path.exists() else [], own

    return run


UPSAMPLINGS = "subpixel_upsampling transposed,subpixel_upsampling phases"
PAIR = ("--deferred_scales", "--fusion_limits")
ROWS = ("--rows", f"fused_mlp,{UPSAMPLINGS},modulation_once")


def test_what_is_faster_and_errs_no_more_stays_on(select, capsys):
    code, rows, ran = select(*ROWS)
    mlp, phases = "--fused_mlp", "--subpixel_upsampling phases"
    both = f"{phases} --modulation_once"
    assert ran == [
        *("", mlp, ""),  # faster, but errs more
        *("--subpixel_upsampling transposed", ""),  # slower; the base before it stands already
        *(phases, ""),
        *(phases, both, phases),  # the new base once more, then on top of it
        *("", both),  # at the end, against what was typed
    ]
    assert code == 0
    labels = [(row["row"], row.get("base"), row["round"]) for row in rows]
    assert labels[:4] == [
        *[("as typed", None, 0), ("+ --fused_mlp", "as typed", 0), ("as typed", None, 1)],
        ("+ --subpixel_upsampling transposed", "as typed", 0),
    ]
    assert labels[-4:] == [
        *[("+ --modulation_once", f"+ {phases}", 0), (f"+ {phases}", "as typed", 2)],
        *[("as typed", None, 4), ("+ --modulation_once", f"+ {phases}", 1)],
    ]
    said = capsys.readouterr().out
    assert re.search(
        r"left +\+ --fused_mlp: 1\.1\d+x as fast, but errs more: latents_relative_l2", said
    )
    assert re.search(r"left +\+ --subpixel_upsampling transposed: 0\.9\d+x as fast\n", said)
    assert re.search(r"kept +\+ --modulation_once: 1\.2\d+x as fast\n", said)
    last = said.splitlines()[-2]
    assert shlex.split(last)[-3:] == both.split() and last.startswith("python run_benchmark.py ")
    assert re.search(r"together against what was typed: 1\.7\d+x as fast\n", said)


def test_it_goes_on_where_it_stopped_and_decides_the_same(select):
    _, whole, _ = select(*ROWS)

    def interrupted(words):
        raise AssertionError(f"measured again: {words}")

    assert select(*ROWS, row=interrupted)[0] == 0  # nothing is run again
    assert read_names(select(*ROWS, row=interrupted)[1]) == read_names(whole)


def read_names(rows):
    return [(row["row"], row["round"]) for row in rows]


def test_its_table_compares_each_row_with_its_neighbours(select):
    """The base drifts from 1 s to 2 s: pooled, what was tried at its end would look slower."""
    drift = iter([1.0, 1.2, 1.0, 1.6, 2.0])

    def drifting(words):
        return fake([]) | {"total_s": report_pieces.spread(next(drift))}

    _, rows, _ = select("--rows", "fused_mlp,modulation_once", row=drifting)
    assert len(rows) == 5
    (found,) = report_series.series_of([row | {"position": 0} for row in rows])
    cells = {row[0]: row[2] for row in report_table.table(found).rows}
    assert cells["+ --fused_mlp"].startswith("0.8") and cells["as typed"] == "-"
    notes = [bar.note.rpartition("s")[2].strip() for bar in report_plot.bars(found)]
    tried = [cells["+ --fused_mlp"], cells["+ --modulation_once"]]
    assert notes == ["", *(f"{float(cell.partition('x')[0]):.2f}x" for cell in tried)]
    # between 1.0 and 2.0: neither is the truth, and the spread says so
    assert cells["+ --modulation_once"].endswith("as typed (within the spread)")


def test_without_a_gain_nothing_is_confirmed(select, capsys):
    code, rows, ran = select("--rows", "modulation_once", row=lambda words: fake([]))
    assert code == 0 and ran == ["", "--modulation_once", ""] and len(rows) == 3
    assert "nothing pays beside what was typed" in capsys.readouterr().out


def test_a_gain_that_goes_away_is_not_called_one(select, capsys):
    times = iter([1.0, 0.8, 1.0, 1.0, 1.0])  # at the end both take as long

    def fading(words):
        return fake([]) | {"total_s": report_pieces.spread(next(times))}

    assert select("--rows", "modulation_once", row=fading)[0] == 0
    said = capsys.readouterr().out
    assert "kept    + --modulation_once" in said
    assert "which is within the spread; what was kept is not confirmed" in said


def test_a_percent_beyond_the_spread_counts_between_two_runs_of_the_base(select, capsys):
    """Where --compare would call it unchanged: many steps bring one or two percent."""
    quiet = {"--fused_mlp": 1.0, "--modulation_once": 0.99}

    def row(words):
        seconds = next((quiet[word] for word in words if word in quiet), 1.0)
        timed = report_pieces.spread(seconds, relative=0.001, seed=len(words))
        return fake([]) | {"total_s": timed}

    select("--rows", "fused_mlp,modulation_once", row=row)
    said = capsys.readouterr().out
    assert "left    + --fused_mlp" in said and "kept    + --modulation_once: 1.01" in said


def test_few_runs_cannot_tell_and_keep_nothing(select, capsys):
    _, _, ran = select("--rows", "modulation_once", row=lambda words: fake(words, n=2))
    assert ran == ["", "--modulation_once", ""]
    assert "cannot tell from 4 and 2 runs: 4 of each are needed" in capsys.readouterr().out


def test_rounds_take_turns_with_the_base(select):
    _, _, ran = select("--rows", "fused_mlp", "--rounds", "2")
    assert ran == ["", "--fused_mlp", "", "--fused_mlp", ""]


def test_a_candidate_that_fails_is_left_and_counted(select, capsys):
    def broken(words):
        return (
            {"format": 2, "failed": "exit code 1: Boom"} if "--fused_mlp" in words else fake(words)
        )

    code, rows, ran = select("--rows", "fused_mlp,modulation_once", row=broken)
    assert code == 1 and ran[-1] == "--modulation_once"
    assert [row["row"] for row in rows if row.get("failed")] == ["+ --fused_mlp"]
    assert "left    + --fused_mlp: failed: exit code 1: Boom" in capsys.readouterr().out


def test_a_base_that_fails_ends_it(select):
    with pytest.raises(UserError, match="row 'as typed' of the selection failed"):
        select("--rows", "modulation_once", row=lambda words: {"format": 2, "failed": "Boom"})


def test_what_changes_nothing_here_is_skipped_with_its_reason(select, capsys):
    flags = ("--modulation_once", "--rows", "modulation_once,conv_benchmark,fusion_limits")
    code, rows, ran = select(*flags)
    assert code == 0 and not ran and not rows
    said = capsys.readouterr().out
    assert "skipped + --modulation_once: changes nothing of this run" in said
    assert "skipped + --conv_benchmark: unavailable: needs an NVIDIA GPU, found a CPU" in said
    refused = "refused: --fusion_limits: found --compile_export_mode disabled, expected"
    assert f"skipped + --fusion_limits: {refused}" in said
    select("--compile_export_mode", "compile", "--rows", "deferred_scales --fusion_limits")
    said = capsys.readouterr().out
    assert f"skipped + {' '.join(PAIR)}: unavailable: needs an NVIDIA GPU" in said


def test_another_set_of_typed_steps_is_another_table(select):
    select("--rows", "modulation_once")
    _, rows, _ = select("--rows", "modulation_once", "--disable-channels-last", "--seed", "1")
    found = report_series.series_of(rows)
    assert [one.call.partition("with ")[2] for one in found] == ["", "--disable_channels_last"]


def test_every_lossless_step_that_is_off_by_default_is_a_candidate():
    plan = make_args("--device", "cpu").plan
    asked_for = {step.NAME for step in STEPS if plan[step.NAME].missing_flag}
    asked_for -= set(availability.OTHERS)
    assert asked_for - set(selection.CANDIDATES.values()) == {
        "gguf",
        "lora",
        "static_scales",
    }  # files
    order = [step.NAME for step in STEPS]
    alone = [step for words, step in selection.CANDIDATES.items() if words != PAIR]
    assert [*map(order.index, alone)] == sorted(map(order.index, alone))
    for words in selection.CANDIDATES:
        assert selection.joined(words) == words
    kept = ("--subpixel_upsampling", "transposed", "--modulation_once")
    more = ("--subpixel_upsampling", "phases")
    assert selection.joined(kept, more) == (*more, "--modulation_once")


def test_on_a_hopper_gpu_what_excludes_each_other_is_exchanged(
    select, as_machine, monkeypatch, capsys
):
    """Every flag makes a run a tenth faster, the pair that excludes the fused kernels by a half."""
    as_machine(Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139.0))
    monkeypatch.setattr(fa3, "probe", lambda backend, fp8: (backend, ""))
    call = ("--ckpt", "black-forest-labs/FLUX.1-dev", "--random_weights", "--device", "cuda")
    mode = ("--compile_export_mode", "compile", "--compile_scope", "blocks")

    def paying(words):
        seconds = 0.9 ** len(words) * (0.5 if {*PAIR} <= {*words} else 1)
        return fake([]) | {"total_s": report_pieces.spread(seconds, seed=len(words))}

    code, rows, ran = select(*call, *mode, row=paying)
    said = capsys.readouterr().out
    exchanged = "--deferred_scales --fusion_limits instead of --fused_kernels"
    assert code == 0 and exchanged in {row["row"].removeprefix("+ ") for row in rows}
    assert "left    + --deferred_scales instead of --fused_kernels" in said
    assert "left    + --triton_float8 instead of --persistent_tma" in said
    (skipped,) = (line for line in said.splitlines() if line.startswith("skipped"))
    assert "which encodes no image, expected a Kontext checkpoint" in skipped
    left = {word for words in selection.CANDIDATES for word in words} | {*call, *mode}
    left -= {"--fused_kernels", "--triton_float8", "--compile_image_encoder", "phases"}
    assert {*shlex.split(ran[-1])} == left


@pytest.mark.slow
def test_a_real_selection(monkeypatch, tmp_path, capsys):
    flags = (
        "--forward_selection",
        "--rows",
        "modulation_once",
        "--results",
        str(tmp_path / "x.jsonl"),
    )
    flags += (*SHORT, "--num_inference_steps", "1")
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *flags])
    assert series.run_series(arguments(monkeypatch, *flags), list(flags)) == 0
    assert [row["row"] for row in read(tmp_path / "x.jsonl")] == [
        *("as typed", "+ --modulation_once", "as typed")
    ]
    assert "cannot tell from 4 and 2 runs" in capsys.readouterr().out

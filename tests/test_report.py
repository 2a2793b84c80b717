"""What is rendered from results: tables, plots, refusals; rows are made up in report_pieces.py."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from report_pieces import ladder, old_row, row, spread, write

from utils import report, report_plot, report_rows
from utils.errors import UserError
from utils.report_series import series_of
from utils.report_table import si, significant

ROOT = Path(__file__).resolve().parent.parent


def run(*words: str) -> subprocess.CompletedProcess:
    """Run the module as a user does."""
    command = [sys.executable, "-m", "utils.report", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def lines_of(text: str, start: str) -> list[str]:
    """Give the lines of the table whose header starts so."""
    lines = [*text.splitlines(), ""]
    at = next(i for i, line in enumerate(lines) if line.startswith(start))
    return lines[at : lines.index("", at)]


def test_importing_needs_no_torch():
    code = "import sys, utils.report, utils.compare; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=600)


def test_rows_of_format_1_keep_their_table():
    slower = old_row() | {"quality": {"psnr_db_worst": 59.54, "latents_relative_l2": 5.6e-3}}
    text = report.markdown("x.jsonl", [old_row(), slower])
    assert text.startswith(
        "NVIDIA H200, torch 2.13.0+cu130 ([x.jsonl](x.jsonl)); "
        "median (min-max) of one call:\n\n| command | seconds | ready after |"
    )
    first, second = lines_of(text, "| command")[2:]
    assert cells(first) == [
        "`run_benchmark.py --num_runs 40`", "0.050 (0.049-0.051)", "10.5 s", "identical",
        "0.0e+00", "0.52",
    ]  # fmt: skip
    assert cells(second)[3:5] == ["59.5", "5.6e-03"]


def test_a_ladder_is_sorted_and_measured_against_eager():
    text = report.markdown("x.jsonl", [row("fp32", 2.0, position=-1), *ladder()])
    header, _, *rows = lines_of(text, "| row | seconds | speed-up")
    found = [dict(zip(cells(header), cells(line), strict=True)) for line in rows]
    names = ["fp32", "eager", "+ fa3", "+ compile", "+ quant", "+ export_aoti"]
    assert [entry["row"] for entry in found] == names
    assert [entry["speed-up"] for entry in found[:3]] == ["0.50x", "1.00x", "1.25x"]
    eager, quant, failed = found[1], found[4], found[5]
    assert eager["seconds"] == "0.996 (0.986-1.009, n 10)"
    assert eager["PSNR, dB / SSIM"] == "44.0 (+35) / 0.9971"
    assert eager["latents' error"] == "5.5e-03 (1.10x)"
    assert eager["picture"] == "lossless" and eager["peak, GiB"] == "34.00"
    assert eager["over floor / MFU"] == "1.33x / 75 %" and eager["ready after"] == "110.0 s"
    assert quant["picture"] == "lossy" and quant["latents' error"] == "1.1e-01 from eager"
    assert quant["PSNR, dB / SSIM"] == "24.3"
    assert failed["seconds"] == "failed: out of memory: 140 GiB" and failed["speed-up"] == "-"
    assert found[2]["over floor / MFU"] == "-"
    assert "checker" not in header  # no row knows it


def test_leaving_a_step_out_shows_its_worth():
    text = report.markdown("x.jsonl", ladder())
    rows = lines_of(text, "| row | seconds | worth")[2:]
    worth = [cells(line)[2] for line in rows]
    assert worth == ["-", "+0.100 s, 1.29x", "+0.001 s, 1.00x (within the spread)"]
    alone = [r for r in ladder() if r["row"] != "everything" and "export" not in r["row"]]
    last = series_of(alone)[1]
    assert last.base["row"] == "+ quant"  # the last rung stands in
    few = [
        row(name, series="leave_one_out", position=k, total_s=spread(1 + k, n=3))
        for k, name in enumerate(("everything", "without fa3"))
    ]
    assert "(too few runs to tell)" in report.markdown("x.jsonl", few)


def test_a_row_measured_again_stands_once_and_calls_stand_apart():
    dev = row("eager", 9.0)
    dev["call"] = dev["call"] | {"ckpt": "black-forest-labs/FLUX.1-dev"}
    rows = [row("eager", failed="killed", total_s=None), row("eager", 1.0), dev]
    series = series_of(rows)
    assert [len(s.rows) for s in series] == [1, 1]
    assert series[0].rows[0]["total_s"]["median"] == pytest.approx(1.0, rel=0.02)
    assert "schnell" in series[0].call and "dev" in series[1].call


def test_rounds_are_pooled_and_another_commit_replaces_them():
    rounds = [row(seconds=s, round=k) for k, s in enumerate((1.0, 1.2, 1.1))]
    (pooled,) = series_of([row(seconds=9.0), *rounds])[0].rows
    assert pooled["total_s"]["n"] == 30 and pooled["total_s"]["median"] == pytest.approx(1.1, 0.02)
    assert pooled["total_s"]["min"] < 1 and pooled["total_s"]["max"] > 1.19
    assert pooled["stages_s"]["denoising_step"]["n"] == 30
    work = pooled["roofline"]["call"]
    assert work["seconds"] == pooled["total_s"]["median"]
    assert work["mfu"] / rounds[-1]["roofline"]["call"]["mfu"] == pytest.approx(
        1.1 / work["seconds"]
    )
    failed = row(round=1, failed="killed", total_s=None)
    text = report.markdown("x.jsonl", [rounds[0], failed, rounds[2]])
    assert "n 20" in text and "1 of 3 rounds failed: killed." in text
    later = row(seconds=2.0)
    later["environment"] = later["environment"] | {"commit": "later"}
    text = report.markdown("x.jsonl", [*rounds, later, row("+ fa3")])
    assert "n 10" in text and "n 30" not in text
    assert "eager: measured at commit later." in text


def test_what_failed_early_stands_in_the_series_of_its_command():
    early = {k: row("+ fa3")[k] for k in ("format", "row", "series", "position", "command")}
    early |= {"failed": "exit code 2"}
    before, after = [row(), row("+ fa3"), early], [row(), early, row("+ fa3")]
    assert [r.get("failed") for r in series_of(before)[0].rows] == [None, "exit code 2"]
    assert [r.get("failed") for r in series_of(after)[0].rows] == [None, None]
    assert [s.call for s in series_of([row(), early])][1] == "unknown call"  # told, not lost


@pytest.mark.parametrize("key", sorted(row()))
def test_every_key_may_be_missing(key):
    bare = {k: v for k, v in row("+ x").items() if k != key}
    empty = row("+ y") | {key: None}
    for rows in ([bare, row()], [empty, row()]):
        usable = [r for r in rows if not report_rows.problem(r)]
        assert (len(usable) == 2) == (key not in ("format", "total_s"))
        assert report.markdown("x.jsonl", usable) and report.page({"x.jsonl": usable})
        report.plot(usable)


def test_commands_survive_markdown():
    wild = "python run_benchmark.py --prompt 'a ``` | <b>x</b>'"
    single = row(None, command=wild)
    assert "`````" not in report.markdown("x.jsonl", [single])
    assert "```` run_benchmark.py --prompt 'a ``` \\| <b>x</b>' ````" in report.markdown(
        "x.jsonl", [single]
    )
    text = report.markdown("x.jsonl", [row("a|b <i>_c_", command=wild)])
    assert "| a\\|b \\<i\\>\\_c\\_ |" in text
    assert f"````bash\n{wild}  # a|b <i>_c_\n````" in text


def test_random_weights_say_where_quality_was_measured():
    quality = row()["quality"] | {"quality_source": "tiny-schnell, same flags"}
    text = report.markdown("x.jsonl", [row(), row("+ fa3", quality=quality)])
    assert "\n\n+ fa3: quality measured elsewhere: tiny-schnell, same flags.\n\n" in text


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "found list, expected an object"),
        (json.dumps(row() | {"format": 3}), "format: found 3"),
        (json.dumps(row(total_s=None)), "total_s: found no median, min, max, n"),
        (json.dumps(row(lossless="yes")), "lossless: found 'yes', expected true or false"),
        (json.dumps(row(load_s=float("nan"))), "load_s: found 'nan', expected a number"),
        (json.dumps(row(load_s=10**400)), "load_s: found '1000"),
        (json.dumps(row(steps={"fa3": "on"})), "steps.fa3: found str, expected an object"),
        (json.dumps(row(quality={"images": [8]})), "quality.images: found"),
        (json.dumps(row() | {"total_s": {"median": 0, "min": 0, "max": 1, "n": 1}}), "0 s"),
        ("[" * 100_000, "not JSON"),
        ('{"format": 2, "row": "cut o', "not JSON"),
    ],
)
def test_damaged_lines_are_named_and_skipped(tmp_path, capsys, line, why):
    file = write(tmp_path / "x.jsonl", [row(), "", line, old_row()])
    assert len(report_rows.read(file)) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{file}:3: skipped: ") and why in said and said.count("\n") == 1


def test_bytes_that_are_no_text_are_skipped(tmp_path, capsys):
    file = write(tmp_path / "x.jsonl", [row()])
    file.write_bytes(file.read_bytes() + b"\xff\xfe\x00\n")
    assert len(report_rows.read(file)) == 1
    assert f"{file}:2: skipped: not UTF-8" in capsys.readouterr().err


def test_bars_are_those_of_the_ladder():
    bars = report_plot.bars(series_of(ladder())[0])
    assert [bar.label for bar in bars] == [
        "eager", "+ fa3", "+ compile", "+ quant", "+ export_aoti",
    ]  # fmt: skip
    assert [bar.lossy for bar in bars] == [False, False, False, True, False]
    assert [bar.floor for bar in bars] == [0.3, None, 0.3, 0.3, None]
    assert bars[-1].median is None and bars[-1].note == "failed: out of memory: 140 GiB"
    assert bars[0].low < bars[0].median < bars[0].high
    assert bars[3].note == "0.349 (0.345-0.353) s  2.86x"


def test_the_plot_is_the_same_every_time_and_not_blank():
    first = report.plot(ladder())
    assert first == report.plot(ladder())
    image = Image.open(io.BytesIO(first)).convert("RGB")
    pixels = np.asarray(image)
    assert image.size[0] == 2 * report_plot.WIDTH
    for style in ("bar", "edge", "floor", "text"):
        colour = tuple(bytes.fromhex(report_plot.COLOURS[style][1:]))
        assert (pixels == colour).all(-1).sum() > 100, style
    edges = np.concatenate([pixels[:4].ravel(), pixels[-4:].ravel(), pixels[:, -4:].ravel()])
    assert (edges == 255).all()  # nothing runs over the edge


def test_committed_plots_are_those_of_the_results():
    for file in report.committed():
        if report.has_plot(rows := report_rows.read(file)):
            kept = np.asarray(Image.open(file.with_suffix(".png")).convert("RGB"))
            made = np.asarray(Image.open(io.BytesIO(report.plot(rows))).convert("RGB"))
            assert np.array_equal(kept, made), "run: python -m utils.report"


@pytest.mark.parametrize("top", [1e-4, 0.0353, 0.7, 1.0, 7.2, 9.99, 123.0])
def test_ticks_are_few_and_reach_the_top(top):
    marks = report_plot.ticks(top)
    assert 3 <= len(marks) <= 9 and marks[0] == 0 and marks[-1] >= top * (1 - 1e-9)


def test_numbers_are_short():
    assert [significant(v) for v in (0.035287, 12.3456, 1234.0, 0)] == [
        "0.0353", "12.3", "1234", "0",
    ]  # fmt: skip
    assert si(74.4e12, "FLOP") == "74.4 TFLOP" and si(None, "B") == "-"


def test_the_command_writes_everything_into_a_folder(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in" / "h200.jsonl", ladder())
    write(tmp_path / "in" / "cpu.jsonl", [old_row()])
    done = run("--results", *sorted((tmp_path / "in").iterdir()), "--out", tmp_path / "a" / "b")
    assert (done.returncode, done.stderr) == (0, "")
    names = {file.name for file in (tmp_path / "a" / "b").iterdir()}
    assert names == {"report.html", "report.md", "h200.png"}  # cpu has no ladder to draw


@pytest.mark.parametrize("case", ["no file", "a folder", "nothing readable", "same name"])
def test_bad_results_are_one_line(tmp_path, case):
    (tmp_path / "other").mkdir()
    good = write(tmp_path / "x.jsonl", [row()])
    words = {
        "no file": [tmp_path / "none.jsonl"],
        "a folder": [tmp_path],
        "nothing readable": [write(tmp_path / "y.jsonl", ["\n"])],
        "same name": [good, write(tmp_path / "other" / "x.jsonl", [row()])],
    }
    done = run("--results", *words[case], "--out", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_one_line(tmp_path):
    good = write(tmp_path / "x.jsonl", [row()])
    done = run("--results", good, "--out", good)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr == f"error: --out {good}: is a file (expected a folder)\n"


def test_a_full_disk_leaves_what_was_there(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    report.write(target, b"before")

    def full(self, content):
        with open(self, "wb") as stream:
            stream.write(content[:1])
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        report.write(target, b"after")
    assert [f.name for f in tmp_path.iterdir()] == ["report.html"]
    assert target.read_bytes() == b"before"


def test_markers_are_filled_and_missing_ones_named():
    assert report.fill("a\n<!-- x -->\nold\n<!-- /x -->\nb", "x", r"new \1") == (
        "a\n<!-- x -->\nnew \\1\n<!-- /x -->\nb"
    )
    with pytest.raises(ValueError, match="no markers for x"):
        report.fill("nothing", "x", "new")

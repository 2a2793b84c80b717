"""Cold and warm starts, each in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from utils import readme, series, startup

ROOT = Path(__file__).resolve().parent.parent


def run(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "utils.startup", "--device", "cpu", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_start_is_timed_from_the_moment_it_is_asked_for(tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run("--starts", "disabled", "--images", 2, "--results", path, "--note", "busy")
    assert done.returncode == 0, done.stderr[-2000:]
    (row,) = rows_of(path)
    first, second = row["images_s"]
    assert 0 < row["load_s"] + row["optimize_s"] < first < second
    assert row["command"].startswith("python -m utils.startup --starts disabled --device cpu")
    assert (row["state"], row["note"], row["stored_mib"]) == ("cold", "busy", 0)
    assert row["cpu_s"] > 0.5  # importing torch alone takes more
    assert row["memory_gib"]["host_peak"] > 0 and row["environment"]["versions"]["torch"]
    assert "| disabled | cold | " in done.stdout


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--starts", "export"), "--starts: unknown 'export'"),
        (("--height", "17"), "error: --height 17: not divisible by 16"),
        (("--step_mask", "fast"), "error: --step_mask fast: tiny-schnell takes 4 distilled steps"),
        (("--output-file", "x.png"), "--output_file: a start keeps no picture"),
        (("--once",), "--once: found no FLUX_BENCH_STARTED"),
    ],
)
def test_wrong_flags_are_one_line_before_any_start(flags, expected, tmp_path):
    done = run(*flags, "--results", tmp_path / "rows.jsonl")
    assert expected in done.stderr and done.stderr.count("\n") == 1
    assert done.returncode == 2 and not list(tmp_path.iterdir())


def test_words_of_the_command_itself_stay_behind():
    words = ["--ckpt", "x", "--starts", "a,b", "--results=r", "--cache_dir", "c", "--seed", "1"]
    kept = series.common_flags(words, startup.OWN_FLAGS)
    assert kept == ["--ckpt", "x", "--seed", "1"]


def test_the_page_of_packages_is_up_to_date():
    page = readme.PACKAGES.read_text()
    made = readme.render(page, readme.STARTS, readme.PACKAGES.name)
    assert made == page, "run: python -m utils.readme"
    rows = [row for path in startup.STARTUP.glob("*.jsonl") for row in rows_of(path)]
    kinds = {(row["call"]["ckpt"], row["start"], row["state"]) for row in rows}
    assert (
        sum(
            line.startswith(tuple(f"| {s} |" for s in startup.STARTS)) for line in page.splitlines()
        )
        == len(kinds)
        > 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("start", ["compile blocks", "export_aoti blocks"])
def test_a_warm_start_finds_what_the_cold_one_stored(start, tmp_path):
    path = tmp_path / "rows.jsonl"
    done = run("--starts", start, "--images", 1, "--results", path)
    assert done.returncode == 0, done.stderr[-2000:]
    cold, warm = rows_of(path)
    assert cold["stored_mib"] == warm["stored_mib"] > 0.05
    assert warm["optimize_s"] < cold["optimize_s"]

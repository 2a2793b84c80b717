"""The script for a lent GPU: a part fits one call, and its commands are none that fail at once."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import run_benchmark
from utils import flux_fast, peers, series
from utils.hardware import Machine
from utils.prepare import prepare
from utils.steps import fa3

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "results" / "gpu_session.sh"
PARTS = re.findall(r"^    ([\w-]+)\)", SCRIPT.read_text(), re.M)
CALL_S = 590  # of ten minutes; what is left installs and packs


def pretended(folder: Path, part: str) -> list[list[str]]:
    """Run a part with nothing behind its commands. Returns: the words of each, timeout's first."""
    log = folder / "commands"
    log.touch()
    for name in ("timeout", "python3", "nvidia-smi"):
        words = f"printf '%q ' {name} \"$@\" >>{log}; echo >>{log}"
        (folder / name).write_text(f"#!/usr/bin/env bash\n{words}\n")
        (folder / name).chmod(0o755)
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "OUT": str(folder / "out")}
    done = subprocess.run(["bash", SCRIPT, part], env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in log.read_text().splitlines()]


def limits(ran: list[list[str]]) -> list[int]:
    """Give the seconds of each command that has a limit."""
    return [int(next(word for word in words[3:] if word.isdigit())) for words in ran]


@pytest.mark.parametrize("part", PARTS)
def test_a_part_fits_a_call_and_its_flags_are_known(part, tmp_path, monkeypatch):
    ran = [words for words in pretended(tmp_path, part) if words[0] == "timeout"]
    rows = others = 0
    for words, limit in zip(ran, limits(ran), strict=True):
        script = words[words.index("python3") + 1 :]
        is_row = script[0] == "run_benchmark.py"
        if is_row:
            monkeypatch.setattr(sys, "argv", script)
            is_row = not run_benchmark.parse_arguments().series
            assert rows_of(script, monkeypatch)
        rows, others = (limit, others) if is_row else (rows, others + limit)
    assert 0 < rows + others <= CALL_S  # the last row has what those before it have left
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"gpu.txt", "more.tar.gz"}
    assert not (tmp_path / "out" / "pictures").exists()


def test_a_row_has_what_those_before_it_have_left_of_their_limits(tmp_path):
    ran = [words for words in pretended(tmp_path, "dev") if words[0] == "timeout"]
    more = (pytest.approx(limit, abs=20) for limit in (370, 480, 570))
    assert limits(ran) == [100, *more]


def rows_of(script: list[str], monkeypatch) -> list[list[str]]:
    """Give the flags of each row of one command, of a series those that it starts."""
    monkeypatch.setattr(sys, "argv", script)
    args = run_benchmark.parse_arguments()
    if not args.series:
        return [script[1:]]
    rows = series.choose(series.LISTS[args.series](args), args.rows)
    own = series.OWN_FLAGS | ({} if args.series in series.AS_TYPED else series.OWN_STEPS)
    return [[*series.common_flags(script[1:], own), *row.flags] for row in rows]


@pytest.mark.slow  # a plan for each of 150 rows
@pytest.mark.parametrize("part", PARTS)
def test_no_row_is_refused_on_its_machine(part, tmp_path, as_machine, monkeypatch):
    """As on an H100, or a B200, with every package; what needs files from before is left out."""
    hopper = Machine("cuda", "NVIDIA H100 80GB HBM3", (9, 0), memory_gib=79.2)
    as_machine(
        Machine("cuda", "NVIDIA B200", (10, 0), memory_gib=180.0) if part == "blackwell" else hopper
    )
    monkeypatch.setattr(fa3, "probe", lambda backend, fp8: (backend, ""))
    monkeypatch.setattr(peers, "import_problem", lambda *names: "")
    monkeypatch.setattr(flux_fast, "problem", lambda args: "")
    for words in pretended(tmp_path, part):
        script = words[words.index("python3") + 1 :] if "python3" in words else words
        made = {"--gguf_file", "--use-cached-model", "--static_scales"}
        if script[:1] != ["run_benchmark.py"] or made & {*script}:
            continue
        for flags in rows_of(script, monkeypatch):
            monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *flags])
            args = run_benchmark.parse_arguments()
            args.trace_file = args.results = None  # their folders are gone
            prepare(args)
            assert args.tier == "full" or part == "memory"

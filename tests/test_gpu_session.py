"""The script for a lent GPU: a part fits one call, and its commands are none that fail at once."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import run_benchmark
from utils import series

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
            args = run_benchmark.parse_arguments()
            is_row = not args.series
            if args.series:
                listed = {"ladder": series.ladder, "peers": series.beside}
                series.choose(listed.get(args.series, series.leave_one_out)(args), args.rows)
        rows, others = (limit, others) if is_row else (rows, others + limit)
    assert 0 < rows + others <= CALL_S  # the last row has what those before it have left
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"gpu.txt", "more.tar.gz"}
    assert not (tmp_path / "out" / "pictures").exists()


def test_a_row_has_what_those_before_it_have_left_of_their_limits(tmp_path):
    ran = [words for words in pretended(tmp_path, "dev") if words[0] == "timeout"]
    assert limits(ran) == [140, pytest.approx(430, abs=10), pytest.approx(570, abs=20)]

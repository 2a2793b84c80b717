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


@pytest.mark.parametrize("part", PARTS)
def test_a_part_fits_a_call_and_its_flags_are_known(part, tmp_path, monkeypatch):
    ran = [words for words in pretended(tmp_path, part) if words[0] == "timeout"]
    limits = [int(next(word for word in words[3:] if word.isdigit())) for words in ran]
    assert limits and sum(limits) <= CALL_S
    for words in ran:
        script = words[words.index("python3") + 1 :]
        if script[0] == "run_benchmark.py":
            monkeypatch.setattr(sys, "argv", script)
            args = run_benchmark.parse_arguments()
            if args.series:
                listed = {"ladder": series.ladder, "peers": series.peer_rows}
                series.choose(listed.get(args.series, series.leave_one_out)(args), args.rows)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"gpu.txt", "more.tar.gz"}
    assert not (tmp_path / "out" / "pictures").exists()

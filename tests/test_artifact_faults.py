"""What the store survives: every kind of fault in a short run, the long one by hand (slow)."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def table(*words: str, module: str = "tests.artifact_faults") -> dict[str, tuple[int, int]]:
    """Run the faults in a process of their own, which forks and must have no threads."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr[-2000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line[:2] == "| "]
    return {name: (int(tried), int(survived)) for name, tried, survived in rows[2:]}


def check(found: dict[str, tuple[int, int]]) -> None:
    assert len(found) == 11
    assert {name: tried - survived for name, (tried, survived) in found.items()} == dict.fromkeys(
        found, 0
    )
    assert all(tried > 1 for tried, _ in found.values())


def test_every_kind_of_fault_is_survived():
    check(table("--kills", "10", "--flips", "100", "--every", "7"))


@pytest.mark.slow
def test_many_faults_are_survived():
    check(table("--seed", "1"))


@pytest.mark.slow
def test_builds_of_the_real_compiler_survive():
    found = table("--kills", "3", module="tests.aoti_faults")
    assert len(found) == 3 and all(tried == survived > 0 for tried, survived in found.values())

"""Series: what is refused before the first row, what is kept, how an early end leaves it."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import report_pieces
import torch
from test_errors import is_running, wait_for
from test_series import ROOT, SHORT, arguments

from triton_models import repository, serve
from utils import card, row_process, series, series_rows
from utils.errors import UserError
from utils.report_rows import read

SERIES = ("--ladder", "--leave_one_out", "--peers", "--forward_selection")
ROW = {
    "format": 2,
    "total_s": report_pieces.spread(1.0, n=2),
    "quality": {"psnr_db_worst": None},
    "call": {"ckpt": "tiny-schnell"},
}


@pytest.mark.parametrize("kind", SERIES)
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--height", "100"), "--height 100: not divisible by 16"),
        (("--num_runs", "0"), "--num_runs 0: expected 1 or more"),
        (("--rounds", "0"), "--rounds 0: expected 1 or more"),
        (("--ckpt", "nope"), "--ckpt nope: unknown checkpoint"),
        (("--ckpt", "someone/FLUX"), "the hub cannot be reached"),
        (("--guidance_scale", "3.5"), "has no guidance embedding"),
    ],
)
def test_a_wrong_call_is_refused_before_the_first_row(monkeypatch, tmp_path, kind, flags, expected):
    monkeypatch.setattr(series_rows, "run_row", lambda *_: pytest.fail("a row was run"))
    words = (kind, "--results", str(tmp_path / "x.jsonl"), *SHORT, *flags)
    with pytest.raises(UserError) as refusal:
        series.run_series(arguments(monkeypatch, *words), list(words))
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_refused_row_is_told_and_no_result(monkeypatch, tmp_path, capsys):
    """Running out of memory ends with code 2, too, but is found out by trying: it stays one."""
    path = tmp_path / "x.jsonl"
    words = ("--ladder", "--rows", "eager,compile,fa3", "--results", str(path), *SHORT)
    said = {
        "eager": "exit code 2: error: out of memory in tier full (MemoryError); next: ...",
        "compile": "exit code 2: error: --compile_export_mode compile: no C++ compiler found",
    }

    def run_row(command, _):
        if "compile" in command:
            return {"format": 2, "failed": said["compile"]}
        failed = {"format": 2, "failed": said["eager"]}
        return failed if "--disable_fa3" in command else ROW | {"environment": {}}

    monkeypatch.setattr(series_rows, "run_row", run_row)
    monkeypatch.setattr(card, "busy", lambda args: ["busy        so it is"])
    assert series.run_series(arguments(monkeypatch, *words), list(words)) == 2
    assert [row["row"] for row in read(path)] == ["eager", "+ fa3"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"rows go to {path}", "busy        so it is"]
    assert any(line.startswith(f"    FAILED: {said['compile']}") for line in lines)


@pytest.mark.parametrize(
    ("environment", "ran"),
    [({}, 0), ({"threads": 1}, 0), ({"threads": 2}, 1), ({"commit": "earlier"}, 1)],
)
def test_a_row_of_another_session_is_measured_again(monkeypatch, tmp_path, environment, ran):
    path = tmp_path / "x.jsonl"
    words = ("--ladder", "--rows", "eager", "--results", str(path), *SHORT)
    commands, now = [], {"commit": "clean", "threads": 1}
    monkeypatch.setattr(card, "commit", lambda: "clean")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(
        series_rows, "run_row", lambda *c: commands.append(c) or ROW | {"environment": now}
    )
    assert series.run_series(arguments(monkeypatch, *words), list(words)) == 0
    (row,) = read(path)
    kept = {"commit": "clean"} | environment
    report_pieces.write(path, [row | {"environment": kept}])
    assert series.run_series(arguments(monkeypatch, *words), list(words)) == 0
    assert len(commands) - 1 == ran
    assert [row["environment"] for row in read(path)] == [kept, *[now] * ran]


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_series_that_ends_early_ends_its_row_and_says_where_rows_are(
    tmp_path, number, code, word
):
    path = report_pieces.write(tmp_path / "x.jsonl", [report_pieces.row()])
    flags = ("--ladder", "--rows", "eager", "--device", "cpu", "--num_inference_steps", "1000")
    command = [sys.executable, "run_benchmark.py", *flags, "--results", str(path)]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not process.stdout.readline().startswith("... eager"):
        assert process.poll() is None
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: "--pictures" in _words(children))  # a fork has its parent's words at first
    (row,) = (int(pid) for pid in children.read_text().split())
    process.send_signal(number)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == code
    assert errors == f"{word}: rows so far are in {path}\n"
    assert not is_running(row)
    assert len(path.read_text().splitlines()) == 1 and json.loads(path.read_text())


@pytest.mark.parametrize("starts", ["a row", "a server"])
def test_an_interruption_amid_a_start_leaves_no_process(monkeypatch, tmp_path, starts):
    """Nobody would know it."""
    begun = []

    class Interrupted(subprocess.Popen):
        def __init__(self, command: list[str], **how) -> None:
            super().__init__(["sleep", "3600"], **how)
            begun.append(self.pid)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        if starts == "a row":
            row_process.run_row([], tmp_path)
        else:
            monkeypatch.setattr(repository, "environment", lambda env: env / "bin" / "python3")
            monkeypatch.setattr(repository, "write_backend", lambda folder, env: env / "server")
            server = serve.Server(*serve.parse_args(["--ckpt", "tiny-dev"]))
            before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
            try:
                server.start()
            finally:
                server.stop()
                for stop, handler in before.items():
                    signal.signal(stop, handler)
    assert len(begun) == 1 and not is_running(begun[0])


def _words(children: Path) -> str:
    """Give the command lines of child processes."""
    lines = [Path(f"/proc/{pid}/cmdline") for pid in children.read_text().split()]
    return " ".join(line.read_text() for line in lines if line.exists())

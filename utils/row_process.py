"""A row of a series as a process of its own: started, ended with its parent, summed up."""

import json
import subprocess
import sys
from pathlib import Path

from utils.errors import Terminated, signals_later
from utils.row import FORMAT

SCRIPT = Path(__file__).resolve().parent.parent / "run_benchmark.py"
TOLD = 4000  # characters of what a failed row has said
PATIENCE_S = 10  # for a row's own clean-up, when the series ends early


def run_row(words: list[str], pictures: Path) -> dict:
    """Run one row, its pictures kept; a row that fails is a row with its reason.

    Raises: KeyboardInterrupt, also where the row alone was interrupted
    """
    command = [sys.executable, str(SCRIPT), *words, "--pictures", str(pictures.absolute())]
    code, out, errors = _outputs(command)
    lines = out.strip().splitlines()
    if code == 0 and lines:
        try:
            return json.loads(lines[-1])
        except ValueError:
            return {"format": FORMAT, "failed": "the last line of its output is no JSON"}
    if code in (-2, 130):
        raise KeyboardInterrupt
    print(errors[-TOLD:], end="", flush=True)  # the row keeps a line: too few for a trace
    said = [line for line in errors.strip().splitlines() if line.strip()]
    reason = said[-1] if said else "no output"
    return {"format": FORMAT, "failed": f"exit code {code}: {reason[:300]}"}


def _outputs(command: list[str]) -> tuple[int, str, str]:
    """Run a command to its end, or end it; subprocess.run would kill it amid its clean-up."""
    started: list[subprocess.Popen] = []
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    try:
        with signals_later():
            started.append(subprocess.Popen(command, cwd=SCRIPT.parent, **pipes))
        out, errors = started[0].communicate()
    except BaseException as error:
        told = isinstance(error, KeyboardInterrupt) and not isinstance(error, Terminated)
        for process in started:
            with process:
                try:
                    # Ctrl-C reaches the row, too
                    if not (told and _ended(process, PATIENCE_S / 5)):
                        process.terminate()
                        _ended(process, PATIENCE_S)
                finally:
                    process.kill()
        raise
    return started[0].returncode, out, errors


def _ended(process: subprocess.Popen, seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def is_refused(row: dict) -> bool:
    """Whether a row was bad input, or lacked a package; running out of memory is a result."""
    failed = row.get("failed") or ""
    return failed.startswith("exit code 2:") and "error: out of memory" not in failed


def summary(row: dict) -> str:
    """Say in a few words what came of a row."""
    if row.get("failed"):
        return f"FAILED: {row['failed']}"
    total, scores = row["total_s"], row["quality"]
    worst = scores["psnr_db_worst"]
    quality = "identical" if worst is None else f"{worst:.1f} dB"
    return f"{total['median']:.4g} s ({total['min']:.4g}-{total['max']:.4g}), {quality}"

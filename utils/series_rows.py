"""The rows of a series: what each is, why it may be skipped, measured now or kept from before."""

import json
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from utils import card, hardware, peers
from utils.benchmark_utils import create_parser
from utils.errors import UserError
from utils.prepare import prepare
from utils.report_rows import get, read, variables
from utils.results import append
from utils.row_process import SCRIPT, is_refused, run_row, summary


@dataclass(frozen=True)
class Row:
    """One command of a series."""

    name: str
    flags: tuple[str, ...]
    step: str | None = None  # the step that the row is about: without it the row is skipped
    peer: str | None = None


def command_of(words: list[str]) -> str:
    """Write a row's command as it is stored."""
    return shlex.join(["python", SCRIPT.name, *words])


def prepared(words: list[str]):
    """Settle a run of these words. Raises: UserError"""
    args = create_parser().parse_known_args(words)[0]
    prepare(args)
    return args


def state(row: Row, common: list[str]) -> str:
    """Say why a row says nothing new here: its step is unavailable or refused; "" if it runs."""
    if row.step is None and row.peer is None:
        return ""
    if row.peer:
        machine = hardware.detect(create_parser().parse_known_args(common)[0].device)
        lacking = peers.lacking(row.peer, machine)
        return f"unavailable: {lacking}" if lacking else ""
    flags = [flag for flag in row.flags if flag != f"--disable_{row.step}"]
    try:
        verdict = prepared([*common, *flags]).plan[row.step]
    except UserError:
        return ""  # the row itself will say it, and be stored as failed
    return f"{verdict.state}: {verdict.reason}" if verdict.state == "unavailable" else ""


class Log:
    """A results file that a series appends to; rows that it has already are not measured again.

    `labels` stand in every row of the series.
    """

    def __init__(self, path: Path, labels: dict):
        self.path, self.labels = path, labels
        self.before = finished(path)
        self.failed = 0  # rows
        self.about: dict = {}  # what the rows so far say of call and machine

    def measure(self, row: Row, common: list[str], turn: int, **labels) -> dict:
        """Run a row in a process of its own and append it, or find it in the file.

        Raises: UserError if the file cannot be written; KeyboardInterrupt
        """
        words = [*common, *row.flags]
        command = command_of(words)
        labels = {"row": row.name, "round": turn} | labels | self.labels
        if before := self.before.get((command, turn)):
            named = {"with": None} | labels
            if not any(all(one.get(k) == v for k, v in named.items()) for one in before):
                append(self.path, [before[-1] | named])  # measured for another series
            print(f"ok  {row.name}: kept from before, in {self.path}", flush=True)
            return before[-1] | named
        print(f"... {row.name}: {command}", flush=True)
        start = time.perf_counter()
        found = run_row(words, self.path.parent / "pictures")
        found |= labels | {"command": command}
        if found.get("failed"):
            found |= self.about
        else:
            self.about = {key: found[key] for key in ("call", "environment")}
        try:
            append(self.path, [] if is_refused(found) else [found])
        except UserError:  # a full disk: the row took minutes, so it is at least shown
            print(json.dumps(found, ensure_ascii=False), flush=True)
            raise
        self.failed += bool(found.get("failed"))
        print(f"    {summary(found)} ({time.perf_counter() - start:.0f} s)", flush=True)
        return found


def finished(path: Path) -> dict[tuple[str, int], list[dict]]:
    """Give the rows that this very code has measured already, by their commands and rounds.

    By as many threads: on a CPU others are another session, to which no ratio would be given. And
    with the same variables of the environment, which a command does not tell.
    """
    import torch

    now, found = card.commit(), {}
    if now.endswith("-dirty") or not path.exists():
        return {}
    for row in read(path):
        same = get(row, "environment", "commit") == now
        threads = get(row, "environment", "threads") in (None, torch.get_num_threads())
        alike = threads and variables(row) == card.variables()
        if same and alike and not row.get("failed"):
            found.setdefault((row["command"], row.get("round") or 0), []).append(row)
    return found

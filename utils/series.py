"""Series of rows, one process each, so that none disturbs another: ladder, leave-one-out, peers.

The ladder turns the steps on one after the other, from plain diffusers in bf16 to everything;
leave-one-out has everything on but one; peers stand beside ours on the same call. Each row is a
command of its own, printed and stored. Rows are appended as they come, so an interruption costs the
row that was running: the same command goes on where the last one stopped. With several rounds the
rows take turns (A B C A B C), so that a machine that drifts favours none.
"""

import copy
import json
import shlex
import time
from dataclasses import dataclass, replace
from pathlib import Path

from utils import card, hardware, peers
from utils.benchmark_utils import create_parser
from utils.errors import UserError
from utils.pipeline_utils import STEPS
from utils.prepare import prepare, settle_call
from utils.report_rows import get, read, variables
from utils.results import append
from utils.row_process import SCRIPT, is_refused, run_row, summary

OWN_FLAGS = {"--ladder": 0, "--leave_one_out": 0, "--peers": 0, "--rows": 1, "--rounds": 1}
OWN_FLAGS |= {"--results": 1, "--pictures": 1}  # pictures stand beside the results
CACHE_FLAGS = ("cache_dit_config", "step_mask", "step_mask_order", "step_mask_gain")
OWN_STEPS = {"--compile_export_mode": 1} | {f"--{flag}": 1 for flag in CACHE_FLAGS}  # of a ladder
MODES = ("compile", "export_aoti")
CACHES = ("cache_dit", "step_mask")


@dataclass(frozen=True)
class Row:
    """One command of a series."""

    name: str
    flags: tuple[str, ...]
    step: str | None = None  # the step that the row is about: without it the row is skipped
    peer: str | None = None


def toggles(args) -> list[str]:
    """List the steps that have a --disable_ flag, in their order."""
    return [step.NAME for step in STEPS if hasattr(args, f"disable_{step.NAME}")]


def ladder(args) -> list[Row]:
    """List the rows from bf16 eager to everything on; fp32 comes only by --rows.

    Inductor's flags need a compiler, so they come after it; a step cache or mask only if its
    settings are given. With a step cache nothing can be exported.
    """
    off = {name: f"--disable_{name}" for name in toggles(args)}
    eager, compiled, exported = (
        ("--compile_export_mode", mode) for mode in ("disabled", "compile", "export_aoti")
    )
    rows = [
        Row("fp32", ("--disable_bf16", *off.values(), *eager)),
        Row("eager", (*off.values(), *eager)),
    ]
    order = [name for name in off if name != "inductor_tuning_flags"]
    if args.cache_dit_config:
        order.insert(order.index("quant"), "cache_dit")
    for name in order:
        off.pop(name, None)
        rows.append(Row(f"+ {name}", (*off.values(), *eager), name))
    rows.append(Row("+ compile", (*off.values(), *compiled), "compile"))
    rows.append(Row("+ inductor_tuning_flags", compiled, "inductor_tuning_flags"))
    if args.step_mask:
        rows.append(Row("+ step_mask", compiled, "step_mask"))
    if not args.cache_dit_config:
        rows.append(Row("export_aoti", exported, "export_aoti"))
    first = next((at for at, row in enumerate(rows) if row.step in CACHES), len(rows))
    cached = [replace(row, flags=row.flags + cache_flags(args)) for row in rows[first:]]
    return rows[:first] + cached


def cache_flags(args) -> tuple[str, ...]:
    """Give the flags of the step cache or mask that the series is about, if any."""
    given = {f"--{flag}": getattr(args, flag) for flag in CACHE_FLAGS}
    return tuple(str(word) for pair in given.items() if pair[1] is not None for word in pair)


def leave_one_out(args) -> list[Row]:
    """List everything on, then everything but each step."""
    mode = args.compile_export_mode or ("compile" if args.cache_dit_config else "export_aoti")
    mode_flags = ("--compile_export_mode", mode)
    settings = cache_flags(args)
    rows = [Row("everything", (*mode_flags, *settings))]
    rows += [
        Row(f"without {name}", (f"--disable_{name}", *mode_flags, *settings), name)
        for name in toggles(args)
    ]
    for name, given in (("cache_dit", args.cache_dit_config), ("step_mask", args.step_mask)):
        if given:
            rows.append(Row(f"without {name}", mode_flags, name))
    if mode in MODES:
        rows.append(Row(f"without {mode}", ("--compile_export_mode", "disabled", *settings), mode))
    return rows


def peer_rows(args) -> list[Row]:
    """List our own run as it was typed, then every peer on the same call."""
    return [Row("ours", ()), *(Row(f"peer:{p}", ("--peer", p), peer=p) for p in peers.PEERS)]


def choose(rows: list[Row], wanted: str | None) -> list[Row]:
    """Pick rows by name, given as a comma-separated list; all but fp32 when none is given.

    Raises: UserError naming an unknown row.
    """
    if wanted is None:
        return [row for row in rows if row.name != "fp32"]
    known = {row.name: row for row in rows}
    for prefix in ("+ ", "peer:"):
        known |= {row.name.removeprefix(prefix): row for row in rows}
    names = [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in known:
            listed = ", ".join(row.name for row in rows)
            raise UserError(f"--rows: unknown row {name!r} (expected some of: {listed})")
    return [row for row in rows if row in [known[name] for name in names]]


def common_flags(argv: list[str], own: dict[str, int] = OWN_FLAGS | OWN_STEPS) -> list[str]:
    """Give what was typed without the flags of the series and those that every row sets itself."""
    own = {flag.replace("_", "-"): count for flag, count in own.items()}
    kept, skip = [], 0
    for word in argv:
        flag, equals, _ = word.partition("=")
        count = own.get(flag.replace("_", "-")) if word.startswith("--") else None
        if skip:
            skip -= 1
        elif count is not None:
            skip = 0 if equals else count
        else:
            kept.append(word)
    return kept


def run_series(args, argv: list[str]) -> int:
    """Run every row in a process of its own and append what comes back to the results file.

    Returns: how many rows failed
    Raises: UserError for bad input of any kind, before the first row; KeyboardInterrupt saying
        where the rows so far are.
    """
    name = args.series
    listed = {"ladder": ladder, "leave_one_out": leave_one_out, "peers": peer_rows}[name](args)
    rows = choose(listed, args.rows)
    settled = copy.copy(args)  # the rows settle what was typed, each for itself
    settle_call(settled)
    path = results_path(args)
    append(path, [])
    print("\n".join([f"rows go to {path}", *card.busy(settled)]), flush=True)
    try:
        failed = _run_rows(args, argv, listed, rows, path)
    except KeyboardInterrupt as error:
        rows_so_far = path.exists() and path.stat().st_size
        raise type(error)(f"rows so far are in {path}" if rows_so_far else "") from None
    print(f"rows are in {path}; python -m utils.report renders them")
    return failed


def _run_rows(args, argv: list[str], listed: list[Row], rows: list[Row], path: Path) -> int:
    name = args.series
    own = OWN_FLAGS if name == "peers" else OWN_FLAGS | OWN_STEPS
    common, failed, about = common_flags(argv, own), 0, {}
    states = {row: state(row, common) for row in rows}
    for turn in range(args.rounds):
        done = _finished(path, turn)
        for row in rows:
            words = [*common, *row.flags]
            command = _command(words)
            if states[row]:
                if turn == 0:
                    print(f"--  {row.name}: {states[row]}", flush=True)
                continue
            labels = {"row": row.name, "series": name, "position": listed.index(row), "round": turn}
            if args.cache_dit_config:
                labels["with"] = f"step cache {args.cache_dit_config}"
            if args.step_mask:
                labels["with"] = f"step mask {args.step_mask}"
            if before := done.get(command):
                named = {"with": None} | labels
                if not any(all(one.get(k) == v for k, v in named.items()) for one in before):
                    append(path, [before[-1] | named])  # measured for another series
                print(f"ok  {row.name}: kept from before, in {path}", flush=True)
                continue
            print(f"... {row.name}: {command}", flush=True)
            start = time.perf_counter()
            found = run_row(words, path.parent / "pictures")
            found |= labels | {"command": command}
            if found.get("failed"):
                found |= about  # what the other rows of this series say of call and machine
            else:
                about = {key: found[key] for key in ("call", "environment")}
            try:
                append(path, [] if is_refused(found) else [found])
            except UserError:  # a full disk: the row took minutes, so it is at least shown
                print(json.dumps(found, ensure_ascii=False), flush=True)
                raise
            failed += bool(found.get("failed"))
            print(f"    {summary(found)} ({time.perf_counter() - start:.0f} s)", flush=True)
    return failed


def results_path(args) -> Path:
    """Name the results file: --results, or results/<machine>.jsonl."""
    if args.results:
        return Path(args.results)
    machine = hardware.detect(args.device)
    words = "".join(c if c.isalnum() else " " for c in machine.name.lower()).split()
    skipped = ("nvidia", "amd", "instinct", "geforce", "r", "tm", "intel", "processor", "cpu")
    return SCRIPT.parent / "results" / ("-".join(w for w in words if w not in skipped) + ".jsonl")


def state(row: Row, common: list[str]) -> str:
    """Say why a row says nothing new here: its step is unavailable or refused; "" if it runs."""
    if row.step is None and row.peer is None:
        return ""
    if row.peer:
        machine = hardware.detect(create_parser().parse_known_args(common)[0].device)
        lacking = peers.lacking(row.peer, machine)
        return f"unavailable: {lacking}" if lacking else ""
    flags = [flag for flag in row.flags if flag != f"--disable_{row.step}"]
    args = create_parser().parse_known_args([*common, *flags])[0]
    try:
        prepare(args)
    except UserError:
        return ""  # the row itself will say it, and be stored as failed
    verdict = args.plan[row.step]
    return f"{verdict.state}: {verdict.reason}" if verdict.state == "unavailable" else ""


def _command(words: list[str]) -> str:
    return shlex.join(["python", SCRIPT.name, *words])


def _finished(path: Path, turn: int) -> dict[str, list[dict]]:
    """Give the rows that this very code has measured already, by their commands.

    By as many threads: on a CPU others are another session, to which no ratio would be given. And
    with the same variables of the environment, which a command does not tell.
    """
    import torch

    now, found = card.commit(), {}
    if now.endswith("-dirty") or not path.exists():
        return {}
    for row in read(path):
        same = get(row, "environment", "commit") == now and (row.get("round") or 0) == turn
        threads = get(row, "environment", "threads") in (None, torch.get_num_threads())
        alike = threads and variables(row) == card.variables()
        if same and alike and not row.get("failed"):
            found.setdefault(row["command"], []).append(row)
    return found

"""Series of rows, one process each, so that none disturbs another.

The ladder turns the steps on one after the other, from plain diffusers in bf16 to everything;
leave-one-out has everything on but one; peers stand beside ours on the same call; a forward
selection (utils/selection.py) tries what is off by default. Each row is a command of its own,
printed and stored. Rows are appended as they come, so an interruption costs the row that was
running: the same command goes on where the last one stopped. With several rounds the rows take
turns (A B C A B C), so that a machine that drifts favours none.
"""

import copy
from dataclasses import replace
from pathlib import Path

from utils import card, hardware, peers, selection
from utils.errors import UserError
from utils.pipeline_utils import STEPS
from utils.prepare import settle_call
from utils.report_series import KINDS
from utils.results import append
from utils.row_process import SCRIPT
from utils.series_rows import Log, Row, state

OWN_FLAGS = {f"--{kind}": 0 for kind in KINDS} | {"--rows": 1, "--rounds": 1}
OWN_FLAGS |= {"--results": 1, "--pictures": 1}  # pictures stand beside the results
CACHE_FLAGS = ("cache_dit_config", "step_mask", "step_mask_order", "step_mask_gain")
OWN_STEPS = {"--compile_export_mode": 1} | {f"--{flag}": 1 for flag in CACHE_FLAGS}  # of a ladder
MODES = ("compile", "export_aoti")
CACHES = ("cache_dit", "step_mask")
AS_TYPED = ("peers", "forward_selection")  # series whose rows keep the flags of OWN_STEPS


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


LISTS = {
    "ladder": ladder,
    "leave_one_out": leave_one_out,
    "peers": peer_rows,
    "forward_selection": lambda args: selection.candidates(),
}


def choose(rows: list[Row], wanted: str | None) -> list[Row]:
    """Pick rows by name, given as a comma-separated list; all but fp32 when none is given.

    Raises: UserError naming an unknown row.
    """
    if wanted is None:
        return [row for row in rows if row.name != "fp32"]
    known = {row.name: row for row in rows}
    for prefix in ("+ ", "peer:", "+ --"):
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
    listed = LISTS[name](args)
    rows = choose(listed, args.rows)
    settled = copy.copy(args)  # the rows settle what was typed, each for itself
    settle_call(settled)
    path = results_path(args)
    append(path, [])
    print("\n".join([f"rows go to {path}", *card.busy(settled)]), flush=True)
    common = common_flags(argv, OWN_FLAGS if name in AS_TYPED else OWN_FLAGS | OWN_STEPS)
    log = Log(path, {"series": name} | labels(args, common))
    try:
        if name == "forward_selection":
            selection.run(rows, args.rounds, common, log)
        else:
            _run_rows(args, rows, listed, common, log)
    except KeyboardInterrupt as error:
        rows_so_far = path.exists() and path.stat().st_size
        raise type(error)(f"rows so far are in {path}" if rows_so_far else "") from None
    print(f"rows are in {path}; python -m utils.report renders them")
    return log.failed


def labels(args, common: list[str]) -> dict[str, str]:
    """Say what the rows of this series share beside their call, if anything: a table of its own."""
    if args.series == "forward_selection":
        return {"with": typed} if (typed := selection.typed_steps(common)) else {}
    if args.step_mask:
        return {"with": f"step mask {args.step_mask}"}
    return {"with": f"step cache {args.cache_dit_config}"} if args.cache_dit_config else {}


def _run_rows(args, rows: list[Row], listed: list[Row], common: list[str], log: Log) -> None:
    states = {row: state(row, common) for row in rows}
    for turn in range(args.rounds):
        for row in rows:
            if not states[row]:
                log.measure(row, common, turn, position=listed.index(row))
            elif turn == 0:
                print(f"--  {row.name}: {states[row]}", flush=True)


def results_path(args) -> Path:
    """Name the results file: --results, or results/<machine>.jsonl."""
    if args.results:
        return Path(args.results)
    machine = hardware.detect(args.device)
    words = "".join(c if c.isalnum() else " " for c in machine.name.lower()).split()
    skipped = ("nvidia", "amd", "instinct", "geforce", "r", "tm", "intel", "processor", "cpu")
    return SCRIPT.parent / "results" / ("-".join(w for w in words if w not in skipped) + ".jsonl")

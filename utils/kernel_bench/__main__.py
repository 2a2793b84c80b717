"""Time FLUX.1's kernels one by one, each checked first: python -m utils.kernel_bench

Names are group/shape/variant; `--cases 'product/*-4608/*,attention/*'` picks some. Cases that
compile for tens of seconds come last. One line a case as it ends, JSON rows with --results, and a
table with the shares of two bounds: the machine's own ceilings, measured at the start, and its data
sheet's. A case that fails or computes wrongly says so in one line, and the rest goes on.
"""

import dataclasses
import fnmatch
import time
from pathlib import Path

from utils import card, hardware, peaks, results
from utils.benchmark_utils import Parser, synchronize
from utils.errors import UserError, run_script
from utils.layers import Layer
from utils.quiet import quiet_libraries
from utils.report_table import piped
from utils.roofline import times_s
from utils.steps import import_problem

FORMAT = 1
GROUPS = ("product", "attention", "between", "static", "decoder", "text", "transfer")
HEADER = ("case", "ms", "TFLOP/s", "TB/s", "of ceiling", "of sheet", "error", "loss", "compile, s")


def parser() -> Parser:
    """Make the command's own parser."""
    found = Parser(description=__doc__.split("\n\n")[0])
    add = found.add_argument
    add("--cases", default="*", metavar="A,B", help="names or patterns, comma-separated")
    add("--list", action="store_true", help="name the cases and measure none")
    add("--skip_compiled", action="store_true", help="leave out what takes a compiler's minutes")
    add("--size", choices=("full", "tiny"), help="FLUX.1's shapes (CUDA) or toy ones (CPU)")
    add("--device", help="cuda, cuda:N or cpu (cuda where there is one)")
    add("--limit_s", type=float, default=285.0, help="begin no case after so many seconds")
    add("--results", metavar="JSONL", help="append one row a case")
    return found


def all_cases(setting) -> list:
    """List every case: cheap ones first, each group in its own order."""
    from utils.kernel_bench import attention, between, decoder, products, text, transfers
    from utils.kernel_bench import static_scales as static

    groups = (products, attention, between, static, decoder, text, transfers)
    found = [case for group in groups for case in group.cases(setting)]
    return sorted(found, key=lambda case: case.compiles)


def choose(listed: list, wanted: str, skip_compiled: bool = False) -> list:
    """Pick cases by name or pattern.

    Raises: UserError for a pattern that fits none.
    """
    patterns = [pattern.strip() for pattern in wanted.split(",")]
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(case.name, pattern) for case in listed):
            raise UserError(
                f"--cases {pattern}: found no such case, expected names or patterns such as "
                f"'{listed[0].name}' or 'attention/*'; --list names all"
            )
    return [
        case
        for case in listed
        if not (skip_compiled and case.compiles)
        and any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)
    ]


def run_case(case, setting) -> dict:
    """Check a case, then time it.

    Returns: "state" ("ok", "wrong", "unavailable", "failed") with a reason where it is not ok, and
        what was measured. Units: ms; compile_s of the first call in seconds
    Raises: RuntimeError if the device is lost to this process.
    """
    import torch

    from utils.kernel_bench.trial import Unavailable

    try:
        with torch.no_grad():
            return _measured(case.make(), case, setting)
    except Unavailable as error:
        return {"state": "unavailable", "reason": str(error)}
    except Exception as error:  # whatever breaks is this case's result
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    finally:
        if case.compiles:
            torch._dynamo.reset()
    if setting.device.startswith("cuda"):
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            raise RuntimeError(f"{case.name} lost the device: {reason}") from None
    return {"state": "failed", "reason": reason}


def _measured(trial, case, setting) -> dict:
    from utils.kernel_bench import timing
    from utils.kernel_bench import trial as work

    sets = timing.sets_of(trial, setting.device)
    start = time.perf_counter()
    output = trial.run(*sets[0])
    synchronize(setting.device)
    first_s = time.perf_counter() - start
    found = trial.check(output, sets[0])
    moved = work.nbytes(sets[0]) + trial.weights_bytes + work.nbytes(output)
    del output
    spread, calls = timing.measure(trial, sets, setting.device)
    ms = spread.as_dict()
    del ms["samples"]
    state = {"state": "ok"}
    if not found["error"] <= trial.bound:  # NaN is wrong, too
        state = {"state": "wrong", "reason": f"error {found['error']:.2g} > {trial.bound:.2g}"}
    return {
        **state,
        "ms": ms,
        "calls": calls,
        "sets": len(sets),
        "clock": trial.clock,
        "dtype": trial.dtype,
        "flop": trial.flop,
        "bytes": moved if trial.counts_bytes else 0,
        "bound": trial.bound,
        **found,
        **({"compile_s": round(first_s, 2)} if case.compiles else {}),
    }


def rates(row: dict, ceilings, sheet) -> dict:
    """Add what a row reached, and its shares of two rooflines; none where a rate is unknown."""
    if "ms" not in row:
        return {}
    seconds = row["ms"]["median"] / 1e3
    found = {
        "tflop_per_s": round(row["flop"] / seconds / 1e12, 2),
        "tb_per_s": round(row["bytes"] / seconds / 1e12, 4),
    }
    layer = Layer("", "linear", "", row["flop"], row["bytes"], row["dtype"])
    for name, known in (("of_ceiling", ceilings), ("of_sheet", sheet)):
        if known and (times := times_s(layer, known)) and max(times):
            found[name] = round(max(times) / seconds, 4)
    return found


def cells(row: dict) -> tuple[str, ...]:
    """Write a row for the table: a reason takes the place of a time."""

    def number(name: str, form: str) -> str:
        return format(row[name], form) if row.get(name) else "-"

    if "ms" not in row:
        return row["case"], f"{row['state']}: {row['reason']}", *("-" for _ in HEADER[2:])
    ms = row["ms"]
    time_ms = f"{ms['median']:.4g} ({ms['min']:.4g}-{ms['max']:.4g})"
    return (
        row["case"],
        time_ms if row["state"] == "ok" else f"{time_ms} {row['state'].upper()}",
        number("tflop_per_s", ".4g"),
        number("tb_per_s", ".3g"),
        number("of_ceiling", ".0%"),
        number("of_sheet", ".0%"),
        number("error", ".1e"),
        number("loss", ".1e"),
        number("compile_s", ".1f"),
    )


def line(row: dict) -> str:
    """Write a row as it ends."""
    name, what, *_ = cells(row)
    share = f", {row['of_ceiling']:.0%} of the ceiling" if "of_ceiling" in row else ""
    error = f", error {row['error']:.1e}" if "error" in row else ""
    return f"{name:48s} {what}{' ms' if 'ms' in row else ''}{share}{error}"


def settle(args):
    """Find the device and the size.

    Raises: UserError for a device that is not there.
    """
    from utils.kernel_bench.trial import Setting

    args.machine = hardware.detect(args.device)
    args.device = args.device or args.machine.device
    args.size = args.size or ("tiny" if args.machine.device == "cpu" else "full")
    if not args.limit_s > 0:  # nan is no limit either
        raise UserError(f"--limit_s {args.limit_s:g}: expected more than 0")
    if problem := import_problem("triton", "triton.language"):  # torch's CPU build brings none
        raise UserError(f"utils.kernel_bench: found {problem}; pip install triton==3.7.1")
    return Setting(args.device, args.size, args.machine)


def main() -> None:
    """Parse, measure case by case, print the table."""
    start = time.perf_counter()
    args = parser().parse_args()
    quiet_libraries()
    setting = settle(args)
    chosen = choose(all_cases(setting), args.cases, args.skip_compiled)
    if args.list:
        print("\n".join(case.name for case in chosen))
        return
    import torch

    path = Path(args.results) if args.results else None
    if path:
        results.append(path, [])  # said before anything slow
    common = {"format": FORMAT, "command": card.command(), "environment": card.environment(args)}
    ceilings = peaks.measure_ceilings(args.device, torch.bfloat16)
    sheet = peaks.datasheet(args.machine)
    common |= {"size": args.size, "ceilings": dataclasses.asdict(ceilings)}
    print(f"{len(chosen)} cases, {args.size} size, on {args.machine.name}: {ceilings}", flush=True)
    rows = []
    for k, case in enumerate(chosen):
        if time.perf_counter() - start > args.limit_s:
            print(f"left out: {len(chosen) - k} cases from {case.name} on (--limit_s)", flush=True)
            break
        row = {"case": case.name, **run_case(case, setting)}
        row |= rates(row, ceilings, sheet)
        rows.append(row)
        print(line(row), flush=True)
        if path:
            results.append(path, [common | row])
    print("\n" + piped(HEADER, sorted((cells(row) for row in rows), key=order)))
    print(f"{time.perf_counter() - start:.0f} s" + (f"; rows are in {path}" if path else ""))


def order(row: tuple[str, ...]) -> tuple:
    """Sort the table: by group and shape; a compiled variant comes beside the others."""
    group, shape, _ = row[0].split("/")
    return GROUPS.index(group), shape


if __name__ == "__main__":
    run_script(main)

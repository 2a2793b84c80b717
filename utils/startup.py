"""How long a start takes, cold and warm: python -m utils.startup [flags of gen_image.py]

Cold: nothing is stored, neither packages nor compiler caches. Warm: the same command again, with
the packages of the first and nothing else (its compiler caches are gone, as on another day or in
another container). Each start is a process of its own, timed from the moment it is asked for: the
interpreter, imports and loading count. Weights that the first start has read may still be in the
system's file cache for the second. Beside the seconds stand those that its processors worked for
it, compilers included, which say more where other work shares the machine.

Rows are appended to results/startup/<machine>.jsonl; the table is printed, and `python -m
utils.readme` puts it into docs/packages.md.
"""

import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from utils import card, results, series
from utils.benchmark_utils import create_parser, refuse_given, synchronize
from utils.errors import UserError, run_script
from utils.memory import peak_memory
from utils.prepare import announce_and_load, prepare
from utils.quiet import quiet_libraries
from utils.report_table import piped

FORMAT = 1
STARTED = "FLUX_BENCH_STARTED"  # when the parent asked for this process, by the monotonic clock
STARTS = {"disabled": ("--compile_export_mode", "disabled")} | {
    f"{mode} {scope}": ("--compile_export_mode", mode, "--compile_scope", scope)
    for mode in ("compile", "export_aoti")
    for scope in ("full", "blocks")
}
OWN_FLAGS = {"--starts": 1, "--results": 1, "--cache-dir": 1}  # not those of each start
STARTUP = Path(__file__).resolve().parent.parent / "results" / "startup"
HEADER = (
    "start", "", "first image, s", "image {n}, s", "an image, s", "optimize, s", "CPU, s",
    "stored, MiB", "peak, GiB",
)  # fmt: skip


def start_once(args) -> dict:
    """Be the process that is timed: load, optimise, make images one after another.

    Returns: the row. Units: seconds since the process was asked for
    """
    from utils.pipeline_utils import generate, optimize

    asked = float(os.environ[STARTED])
    prepare(args)
    pipeline, load_s = announce_and_load(args)
    start = time.perf_counter()
    optimize(pipeline, args)
    optimize_s, images_s = time.perf_counter() - start, []
    for _ in range(args.images):
        generate(pipeline, args)
        synchronize(args.device)
        images_s.append(round(time.perf_counter() - asked, 3))
    memory = peak_memory(args.device)
    return {
        "format": FORMAT,
        "environment": card.environment(args),
        "call": card.call(args),
        "steps": card.plan_as_dict(args),
        "load_s": round(load_s, 3),
        "optimize_s": round(optimize_s, 3),
        "images_s": images_s,
        "memory_gib": {name.removesuffix("_gib"): round(gib, 3) for name, gib in memory.items()},
    }


def run_start(words: list[str], packages: Path) -> dict:
    """Start once in a process of its own, with these packages and a compiler cache that is empty.

    Raises: UserError with the last line of what a failed start has said.
    """
    command = [sys.executable, "-m", "utils.startup", "--once", *words]
    with tempfile.TemporaryDirectory() as compiled:
        env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": compiled, "TRITON_CACHE_DIR": compiled}
        env[STARTED] = repr(time.perf_counter())
        before = _cpu_seconds()
        done = subprocess.run(
            [*command, "--cache-dir", str(packages)],
            cwd=Path(__file__).resolve().parent.parent,
            env=env,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no output"]
        raise UserError(f"--starts: exit code {done.returncode}: {said[-1][:300]}")
    row = json.loads(done.stdout.splitlines()[-1])
    row["cpu_s"] = round(_cpu_seconds() - before, 3)
    files = [path for path in packages.rglob("*") if path.is_file()] if packages.exists() else []
    row["stored_mib"] = round(sum(path.stat().st_size for path in files) / 2**20, 2)
    return row


def _cpu_seconds() -> float:
    """Add up what all ended child processes have used, and their children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def table(rows: list[dict]) -> str:
    """Render rows as Markdown."""
    cells = []
    for row in rows:
        memory = row["memory_gib"]
        peak = memory.get("allocated_peak", memory["host_peak"])
        times = row["images_s"]
        each = [later - before for before, later in pairwise(times)]
        seconds = f"{median(each):.2f}" if each else "-"
        numbers = (row["optimize_s"], row.get("cpu_s"), row["stored_mib"])
        words = ["-" if n is None else f"{n:.1f}" for n in numbers]
        ends = (f"{times[0]:.1f}", f"{times[-1]:.1f}", seconds)
        cells.append((row["start"], row["state"], *ends, *words, f"{peak:.2f}"))
    header = tuple(cell.format(n=len(rows[0]["images_s"])) for cell in HEADER)
    return piped(header, cells)


def measured() -> str:
    """Render the last row of every committed start, a table for each machine and checkpoint."""
    groups: dict[str, dict[tuple, dict]] = {}
    for path in sorted(STARTUP.glob("*.jsonl")):
        for row in map(json.loads, path.read_text().splitlines()):
            call, machine = row["call"], row["environment"]
            what = "random weights" if call["random_weights"] else "trained weights"
            title = (
                f"{machine['device']}, torch {machine['versions']['torch']}: {call['ckpt']} "
                f"({what}), {call['width']}x{call['height']}, {call['num_inference_steps']} steps "
                f"([rows](../results/startup/{path.name}); {row['note'] or 'an idle machine'}):"
            )
            groups.setdefault(title, {})[row["start"], row["state"]] = row
    order = list(STARTS)
    return "\n\n".join(
        f"{title}\n\n{table(sorted(rows.values(), key=lambda row: order.index(row['start'])))}"
        for title, rows in groups.items()
    )


def main() -> None:
    """Parse; be one start, or run all that were asked for and print their table."""
    parser = create_parser(__doc__.split("\n\n")[0])
    add = parser.add_argument_group("which starts").add_argument
    add("--starts", default=",".join(STARTS), help="comma-separated, of the default's")
    add("--images", type=int, default=10, help="made in each start")
    add("--note", help="kept in every row, such as what else the machine was doing")
    add("--results", metavar="JSONL", help="append the rows here")
    add("--once", action="store_true", help="be one start (what this command runs)")
    args = parser.parse_args()
    quiet_libraries()
    if args.images < 1:
        raise UserError(f"--images {args.images}: expected 1 or more")
    if args.once:
        if STARTED not in os.environ:
            raise UserError(f"--once: found no {STARTED}; it is for the processes of this command")
        print(json.dumps(start_once(args), ensure_ascii=False))
        return
    refuse_given(
        args,
        ("output_file", "compile_export_mode"),
        "a start keeps no picture, and --starts has its mode",
    )
    names = [name.strip() for name in args.starts.split(",")]
    if unknown := [name for name in names if name not in STARTS]:
        raise UserError(f"--starts: unknown {unknown[0]!r} (expected some of: {', '.join(STARTS)})")
    for name in names:  # each start will say it too, behind seconds of imports
        prepare(parser.parse_args([*sys.argv[1:], *STARTS[name]]))
    path = series.results_path(args)
    if not args.results:
        path = path.parent / "startup" / path.name
        path.parent.mkdir(exist_ok=True)
    results.append(path, [])  # said before anything slow
    common, rows = series.common_flags(sys.argv[1:], OWN_FLAGS), []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold",) if name == "disabled" else ("cold", "warm"):
                row = run_start([*common, *STARTS[name]], Path(folder) / "packages")
                row |= {"start": name, "state": state, "note": args.note}
                words = ["python", "-m", "utils.startup", "--starts", name, *common]
                row["command"] = shlex.join(words)
                results.append(path, [row])
                rows.append(row)
                print(f"{name}, {state}: first image {row['images_s'][0]:.1f} s", flush=True)
    print(f"{table(rows)}\nrows are in {path}")


if __name__ == "__main__":
    run_script(main)

"""Time the stack, beside its quality and memory: python run_benchmark.py [--trace-file t.json.gz]

One row by default; `--ladder`, `--leave_one_out`, `--peers` and `--forward_selection` measure many,
each in a process of its own. The last line of a row's stdout is the row as JSON.
"""

import json
import sys
from pathlib import Path

from utils import compare_files, kernel_table, pipeline_utils, results, row
from utils.benchmark_utils import create_parser
from utils.errors import UserError, run_script
from utils.explain import explain
from utils.peers import PEERS
from utils.quiet import quiet_libraries
from utils.report_series import KINDS as SERIES
from utils.series import run_series
from utils.steps.memory import out_of_memory_explained


def parse_arguments():
    """Add what only the benchmark needs to the common parser."""
    parser = create_parser("Measure speed, quality and memory of one set of steps, or of many.")
    add = parser.add_argument_group("how to measure").add_argument
    add("--num_runs", type=int, default=10, help="timed runs")
    add("--num_warmup", type=int, default=2, help="runs of the same call before them")
    add("--quality_prompts", type=int, default=8, help="how many of the 8 prompts are compared")
    add(
        "--fp32_reference",
        action="store_true",
        help="compare latents with fp32 as well (always for the bundled checkpoints)",
    )
    add("--clip_score", metavar="CLIP", help="score pictures by this CLIP (folder, or on the hub)")
    add("--trace-file", help="Chrome trace of one more run; gzip if it ends in .gz")
    add("--measure_ceilings", action="store_true", help="this machine's own peaks, not a sheet's")
    add("--kernel_table", action="store_true", help="where the time of one more run goes")
    add("--pictures", metavar="FOLDER", help="keep the quality prompts' pictures here, as strips")
    add(
        "--quality_source",
        choices=("bundled", "none"),
        default="bundled",
        help="whose pictures stand for random weights: the bundled checkpoint's, same flags",
    )
    add("--results", metavar="JSONL", help="append the rows here (series: results/<machine>.jsonl)")
    add("--peer", choices=PEERS, help="measure this in place of our steps")
    add = parser.add_argument_group("series of rows, one process each").add_argument
    add("--ladder", action="store_true", help="from bf16 eager, one step more in each row")
    add("--leave_one_out", action="store_true", help="everything on but one step in each row")
    add("--peers", action="store_true", help="our run, and every peer on the same call")
    add(
        "--forward_selection",
        action="store_true",
        help="the run as typed, and on top of it, one by one, the lossless steps that are off by "
        "default: what is faster beyond the spread stays on",
    )
    add("--rows", metavar="A,B,C", help="only these rows of the series (fp32 only by this)")
    add("--rounds", type=int, default=1, help="how often the rows take turns")
    add = parser.add_argument_group("instead of measuring").add_argument
    add(
        "--explain",
        nargs="?",
        const="",
        metavar="GPU",
        help="FLUX block by block: FLOP, bytes, what bounds it (default: this GPU, or an H200)",
    )
    add("--compare", nargs=2, metavar="JSONL", help="which rows changed beyond their spread")
    parser.set_defaults(output_file=None)
    args = parser.parse_args()
    series = [name for name in SERIES if getattr(args, name)]
    args.series = series[0] if series else None
    instead = ["compare"] * bool(args.compare) + ["explain"] * (args.explain is not None)
    if len(series + instead) > 1:
        named = ", ".join(f"--{name}" for name in series + instead)
        raise UserError(f"{named}: expected one of them")
    if args.rows and not series:
        raise UserError(f"--rows: expected together with {', '.join(f'--{s}' for s in SERIES)}")
    if args.pictures and series:
        raise UserError("--pictures: a series keeps its pictures beside its rows; leave it out")
    if args.swap_loras:
        raise UserError("--swap_loras: gen_image.py swaps; a row measures one set of LoRAs")
    if args.peer and args.lora:
        raise UserError(f"--peer {args.peer}: no peer adds LoRAs here; leave out --lora")
    if args.peer and series:
        raise UserError(f"--peer {args.peer}: one row; expected without --{series[0]}")
    return args


def main() -> None:
    """Parse, then measure one row or a series of them."""
    args = parse_arguments()
    quiet_libraries()
    if args.compare:
        sys.exit(compare_files.main(*args.compare))
    if args.explain is not None:
        print(explain(args, args.explain))
        return
    if args.series:
        sys.exit(1 if run_series(args, sys.argv[1:]) else 0)

    if args.results:
        results.append(Path(args.results), [])
    with out_of_memory_explained(args):
        found, pipeline, result = row.measure_row(args)
    print(row.render(found), flush=True)
    if args.results:  # before anything else may fail or be cut off
        results.append(Path(args.results), [found])
    if args.trace_file:
        row.write_trace(Path(args.trace_file), lambda: pipeline_utils.generate(pipeline, args))
        print(f"trace       {args.trace_file}")
    if args.kernel_table:
        print(kernel_table.render(lambda: pipeline_utils.generate(pipeline, args), args.device))
    if args.output_file:
        from utils.images import save_images

        save_images(result.images, args, found["step_cache"])
    print(json.dumps(found, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)

"""Stages against the single pass: python -m extras.compare_stages --ckpt tiny-schnell

Both draw the same held-out prompts at every size; the checker of the bundled checkpoints reads the
pictures back. On a CPU seconds are those of the process, so that a busy machine does not count.
"""

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

from extras import stages
from utils.benchmark_utils import create_parser, refuse_given
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

RESULTS = Path("results/extras/stages.jsonl")


def parse(argv: list[str] | None = None):
    """Read the flags of extras.stages and what is to be compared."""
    parser = create_parser(__doc__.splitlines()[0])
    stages.add_flags(parser)
    add = parser.add_argument_group("comparison").add_argument
    add("--sizes", type=int, nargs="+", default=[128, 192, 256], help="edges, pixels")
    # not dest="pictures": that is run_benchmark.py's folder, which prepare() looks at
    add("--pictures", dest="count", type=int, default=20, help="held-out prompts")
    add("--page", type=Path, help="put the table between this page's markers")
    add("--results", type=Path, default=RESULTS, help="file to which rows are appended")
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Refuse what would fail behind the first pictures.

    Raises: UserError with one line per problem.
    """
    from utils import checks

    refuse_given(args, ("prompt", "height", "width", "seed"), "the comparison sets them itself")
    refuse_given(args, ("output_file",), "the comparison keeps no picture")
    problems = [f"--pictures {args.count}: expected 1 or more"] * (args.count < 1)
    for size in args.sizes:
        square = copy.copy(args)
        square.height = square.width = size
        wrong = [line for line in checks.number_problems(square) if line.startswith("--height")]
        problems += [line.replace("--height", "--sizes") for line in wrong]
    if args.page and not args.page.is_file():
        problems.append(f"--page {args.page}: no such file")
    if problems:
        raise UserError("\n".join(problems))


def compare(args: argparse.Namespace, run: stages.Stages, size: int, prompts: list) -> list[dict]:
    """Draw all prompts at one size both ways.

    Units: seconds of one picture, median; quality in per cent
    """
    from utils.pipeline_utils import generate

    args.height = args.width = size
    run.fit()
    on_cpu = args.device == "cpu"
    run.clock = time.process_time if on_cpu else time.perf_counter
    ways = {
        "single": lambda: run.timed("single", lambda: generate(run.first, args)),
        "stages": run.run,
    }
    rows = []
    for how, draw in ways.items():
        pictures, seconds = [], []
        for k, (prompt, _) in enumerate(prompts):
            args.prompt = run.small.prompt = [prompt]
            args.seed = run.small.seed = k
            run.seconds.clear()
            pictures += draw()
            seconds.append(dict(run.seconds))
        middle = {
            name: round(statistics.median(one[name] for one in seconds), 4) for name in seconds[0]
        }
        about = {"size": size, "how": how, "clock": "process" if on_cpu else "wall"}
        about |= stages.about(args) if how == "stages" else {}
        about |= {"seconds": middle, "total_s": round(sum(middle.values()), 4)}
        rows.append(about | {"quality": _quality(pictures, [scene for _, scene in prompts])})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def _quality(pictures: list, scenes: list) -> dict[str, float]:
    from tiny_flux.evaluate import score

    found = score(pictures, scenes)
    return {name: round(found[name], 1) for name in ("all", "shape", "position", "overlap")}


def table(rows: list[dict]) -> str:
    """Write rows as a Markdown table: each size, both ways."""
    from tiny_flux.evaluate import markdown

    head = ["checkpoint", "size", "how", "s/picture", "of it", "all five right", "shape", "overlap"]
    cells = []
    for row in rows:
        spent, quality = row["seconds"], row["quality"]
        split = ", ".join(f"{name} {s / row['total_s']:.0%}" for name, s in spent.items())
        right = [f"{quality[name]} %" for name in ("all", "shape", "overlap")]
        size, total = f"{row['size']}x{row['size']}", f"{row['total_s']:.2f}"
        shape = [f"{row[name]:g}" for name in stages.SETTINGS if name in row]
        how = " ".join([row["how"], ", ".join(shape)]).strip()
        cells.append([row["ckpt"], size, how, total, split, *right])
    return markdown(head, cells)


def main() -> None:
    """Load once, compare at every size, append the rows."""
    args = parse()
    quiet_libraries()  # the checks import diffusers
    stages.check(args)
    from tiny_flux.evaluate import held_out_prompts, put_between_markers
    from utils import card
    from utils.prepare import announce_and_load, prepare

    check(args)
    prepare(args)
    if args.checkpoint.source != "bundled":
        raise UserError(f"--ckpt {args.ckpt}: expected a bundled one, whose pictures can be read")
    pipeline, _ = announce_and_load(args)
    run = stages.Stages(pipeline, args)
    run.optimize()
    prompts = held_out_prompts(args.count, seed=2026)
    about = {"command": card.command(), "ckpt": args.ckpt, "pictures": args.count}
    about |= {"num_inference_steps": args.num_inference_steps}
    rows = [row for size in args.sizes for row in compare(args, run, size, prompts)]
    lines = [json.dumps(about | row | {"environment": card.environment(args)}) for row in rows]
    with args.results.open("a") as file:
        file.write("".join(line + "\n" for line in lines))
    found = table([json.loads(line) for line in args.results.read_text().splitlines()])
    print(found)
    if args.page:
        put_between_markers(args.page, found, "stages")


if __name__ == "__main__":
    run_script(main)

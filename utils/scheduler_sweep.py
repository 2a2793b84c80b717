"""Measure every solver and schedule at several numbers of steps: python -m utils.scheduler_sweep

Each row is compared with the converged picture of the same prompts and seeds, Heun's method at many
steps, and read by the checker. The table in docs/schedulers.md is written from the rows. In fp32
and eager, so that what is measured is the solver alone; the text is short, which changes no
conclusion and costs a fifth (tiny_flux/README.md).

With FLUX.1's own weights: python -m utils.scheduler_sweep --ckpt black-forest-labs/FLUX.1-dev
--max_sequence_length 512 --results results/schedulers/FLUX.1-dev.json
"""

import copy
import json
import shlex
import sys
from pathlib import Path

from utils import card, quality, reference, schedulers
from utils.benchmark_utils import create_parser, refuse_given
from utils.errors import UserError, run_script
from utils.prepare import prepare
from utils.prompts import quality_prompts
from utils.quiet import quiet_libraries
from utils.report import fill, write
from utils.report_table import piped
from utils.schedulers import SOLVERS

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs" / "schedulers.md"
STEPS = (4, 6, 8, 12, 16, 20, 28)
CONVERGED = ("heun", "default", 100)


def points() -> list[tuple[str, str]]:
    """List every solver with every schedule that it takes."""
    return [(name, sigmas) for name, solver in SOLVERS.items() for sigmas in solver.schedules]


def measure(argv: list[str], steps: tuple[int, ...]) -> dict:
    """Run every point at every number of steps.

    Returns: the command, the call, the environment and a row for each
    """
    from utils.pipeline_utils import load_pipeline

    args = parser().parse_args(argv)
    prepare(args)
    prompts = quality_prompts(args)[: args.quality_prompts]
    args.prompt, pipeline = prompts, load_pipeline(args)
    own = pipeline.scheduler

    def run(scheduler: str, sigmas: str, count: int):
        part = copy.copy(args)
        part.scheduler, part.sigmas, part.num_inference_steps = scheduler, sigmas, count
        pipeline.scheduler = own
        schedulers.install(pipeline, part)
        return quality.run(pipeline, part), schedulers.evaluations(part)

    converged, _ = run(*CONVERGED)
    again = copy.copy(args)
    again.num_inference_steps, again.seed = 28, args.seed + reference.OTHER_SEED
    pipeline.scheduler = own
    other = quality.mean_psnr_db(quality.run(pipeline, again).images, converged.images)
    rows = []
    for scheduler, sigmas in points():
        for count in steps:
            found, evaluations = run(scheduler, sigmas, count)
            scores = quality.compare(found, converged)
            rows.append(
                {
                    "scheduler": scheduler,
                    "sigmas": sigmas,
                    "steps": count,
                    "evaluations": evaluations,
                    "psnr_db_mean": scores["psnr_db_mean"],
                    "psnr_db_worst": scores["psnr_db_worst"],
                    "latents_relative_l2": round(scores["latents_relative_l2"], 5),
                    "checker_right": reference.checker_share(found.images, args, prompts),
                }
            )
            print(rows[-1], flush=True)
    return {
        "command": shlex.join(["python", "-m", "utils.scheduler_sweep", *argv]),
        "call": card.call(args) | {"num_inference_steps": list(steps)},
        "weights": args.checkpoint.identity(args.cache_dir),
        "environment": card.environment(args),
        "converged": dict(zip(("scheduler", "sigmas", "steps"), CONVERGED, strict=True)),
        "converged_checker_right": reference.checker_share(converged.images, args, prompts),
        "other_seed_psnr_db": other,
        "rows": rows,
    }


def table(found: dict) -> str:
    """Write the rows as Markdown: a line a solver and schedule, a column a number of steps."""
    steps, lines = sorted({row["steps"] for row in found["rows"]}), []
    for name, sigmas in points():
        cells = []
        for count in steps:
            row = next(
                row
                for row in found["rows"]
                if (row["scheduler"], row["sigmas"], row["steps"]) == (name, sigmas, count)
            )
            cell = f"{row['psnr_db_mean']:.1f} dB"
            if row["evaluations"] != count:
                cell += f" ({row['evaluations']})"
            if row["checker_right"] is not None:
                cell += f", {100 * row['checker_right']:.0f} %"
            cells.append(cell)
        lines.append((name, sigmas, *cells))
    return piped(("scheduler", "sigmas", *(f"{n} steps" for n in steps)), lines)


def parser():
    """Add what only the sweep needs to the common parser."""
    made = create_parser(__doc__.split("\n\n")[0])
    add = made.add_argument_group("the table").add_argument
    add("--quality_prompts", type=int, default=8, help="how many of the 8 prompts are compared")
    add("--results", metavar="JSON", default=str(ROOT / "results" / "schedulers" / "tiny-dev.json"))
    made.set_defaults(
        ckpt="tiny-dev",
        output_file=None,
        disable_bf16=True,
        max_sequence_length=64,
        compile_export_mode="disabled",
    )
    return made


def main() -> None:
    """Measure, store, and write the table where the results are the committed ones."""
    argv = sys.argv[1:]
    args = parser().parse_args(argv)
    if args.scheduler or args.sigmas or args.true_cfg_scale or args.lora:
        raise UserError("--scheduler, --sigmas, --true_cfg_scale, --lora: the sweep is without")
    unheard = ("prompt", "num_inference_steps", "output_file")
    refuse_given(args, unheard, "the sweep has its own prompts and steps, and keeps no picture")
    applied = ("gguf_file", "step_mask", "cache_dit_config", "memory")
    refuse_given(args, applied, "the sweep measures the solver alone, and applies no step")
    quiet_libraries()
    path = Path(args.results)
    found = measure(argv, STEPS)
    write(path, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())
    print(table(found))
    if path.resolve() == ROOT / "results" / "schedulers" / "tiny-dev.json":
        text = fill(DOCS.read_text(), "schedulers", table(found), DOCS.name)
        write(DOCS, text.encode())


if __name__ == "__main__":
    run_script(main)

"""Time the stack, beside its quality and memory: python run_benchmark.py [--trace-file t.json.gz]

The reference is the same pipeline, same seeds, before `optimize()` touched it (bf16 eager). Then
the steps are applied, the run's own call warms everything up, and the timed runs follow; a
recompilation inside one of them is an error. The last line of stdout is the result as JSON.
"""

import json
import os
import time
from pathlib import Path

from utils.benchmark_utils import create_parser
from utils.errors import run_script
from utils.quiet import quiet_libraries


def parse_arguments():
    """Add what only the benchmark needs to the common parser."""
    parser = create_parser("Measure speed, quality and memory of one set of steps.")
    group = parser.add_argument_group("how to measure")
    group.add_argument("--num_runs", type=int, default=10, help="timed runs")
    group.add_argument(
        "--num_warmup", type=int, default=2, help="runs of the same call before them"
    )
    group.add_argument(
        "--trace-file", default=None, help="Chrome trace of one more run; gzip if it ends in .gz"
    )
    parser.set_defaults(output_file=None)
    return parser.parse_args()


def write_trace(path: Path, run) -> None:
    """Profile one run and write its Chrome trace under a temporary name first."""
    import torch

    with torch.profiler.profile() as profile:
        run()
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the suffix decides about gzip
    try:
        profile.export_chrome_trace(str(temporary))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def stage_seconds(regions: list[dict[str, list[float]]]) -> dict:
    """Turn the clock's regions of every timed run into one spread per stage.

    `postprocessing` contains `pil_conversion`; it is given without it. Units: seconds;
    `denoising_step` is per step, every other stage per call.
    """
    from utils.benchmark_utils import Spread

    def spread(title):
        return Spread(tuple(s for run in regions for s in run.get(title, ())))

    stages = {
        title: spread(title)
        for title in ("prompt_encoding", "denoising_step", "decoding", "pil_conversion")
    }
    post = zip(spread("postprocessing").samples, stages["pil_conversion"].samples, strict=True)
    stages["postprocessing"] = Spread(tuple(whole - pil for whole, pil in post))
    return stages


def main() -> None:
    """Parse, check, load, reference, optimise, measure, compare, report."""
    args = parse_arguments()

    quiet_libraries()
    from utils import card, quality
    from utils.benchmark_utils import StageClock, annotate_pipeline, measure
    from utils.memory import peak_memory, reset_peak_memory
    from utils.pipeline_utils import generate, optimize
    from utils.prepare import begin
    from utils.steps.cache_dit import last_call

    pipeline, load_s = begin(args)
    reference = quality.run(pipeline, args)

    start = time.perf_counter()
    optimize(pipeline, args)
    optimize_s = time.perf_counter() - start

    clock = StageClock(args.device)
    annotate_pipeline(pipeline, clock)
    regions = []
    reset_peak_memory(args.device)
    total = measure(
        lambda: generate(pipeline, args),
        args.device,
        args.num_runs,
        args.num_warmup,
        before_timed=clock.read,  # forget the warm-up's regions
        after_run=lambda: regions.append(clock.read()),
    )
    memory = peak_memory(args.device)
    result = quality.run(pipeline, args)
    used = last_call(pipeline, args)
    if args.trace_file:
        write_trace(Path(args.trace_file), lambda: generate(pipeline, args))
    if args.output_file:
        from utils.images import save_images

        save_images(result.images, args, used)

    stages = stage_seconds(regions)
    scores = quality.compare(result, reference)
    worst = scores["psnr_db_worst"]
    note = "  (random weights: the picture means nothing)" if args.random_weights else ""
    print(f"load        {load_s:.2f} s, optimize and compile {optimize_s:.2f} s")
    print(f"total       {total} s per call")
    for title, spread in stages.items():
        print(f"  {title:16s} {spread} s{' per step' if title == 'denoising_step' else ''}")
    for line in card.step_cache(used):
        print(line)
    print("memory      " + ", ".join(f"{name} {gib:.2f}" for name, gib in memory.items()))
    print(
        f"quality     against {card.call(args)['dtype']} eager: PSNR "
        + ("identical" if worst is None else f"{scores['psnr_db_mean']:.1f} dB (worst {worst:.1f})")
        + f", latents' relative L2 error {scores['latents_relative_l2']:.2e}{note}"
    )
    if args.trace_file:
        print(f"trace       {args.trace_file}")
    row = {
        "format": 1,
        "command": card.command(),
        "environment": card.environment(args),
        "call": card.call(args),
        "steps": card.plan_as_dict(args),
        "step_cache": used,
        "lossless": card.is_lossless(args),
        "load_s": round(load_s, 3),
        "optimize_s": round(optimize_s, 3),
        "total_s": total.as_dict(),
        "stages_s": {title: spread.as_dict() for title, spread in stages.items()},
        "memory_gib": {name.removesuffix("_gib"): round(gib, 3) for name, gib in memory.items()},
        "quality": scores | {"reference": f"{card.call(args)['dtype']} eager"},
    }
    print(json.dumps(row, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)

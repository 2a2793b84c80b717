"""One row of a benchmark: time, quality, memory and distance from the floor of one set of steps.

The reference is the same pipeline, same prompts and seeds, before `optimize()` touched it. Then the
steps are applied, the run's own call warms everything up, and the timed runs follow; compiling,
exporting or recording inside one of them is an error.
"""

import dataclasses
import time
from pathlib import Path

from utils import card, peaks, peers, quality, quality_source, reference, roofline
from utils.artifacts import replacing
from utils.benchmark_utils import Spread, StageClock, annotate_pipeline, measure
from utils.memory import add_graphs, peak_memory, reset_peak_memory, weights_gib
from utils.prepare import announce_and_load, prepare
from utils.prompts import quality_prompts
from utils.report_rows import OF_LOOP, get

FORMAT = 2


def measure_row(args) -> tuple[dict, object, object]:
    """Measure the run that `args` describes.

    Returns: the row as it is stored, the optimised pipeline, and the Result on the quality prompts.
    Raises: UserError if fp32 is wanted and has no room beside the run's own weights; RuntimeError
        for a broken picture, a recompilation, or a row that is called lossless and is not.
    """
    from utils import cudagraph
    from utils.pipeline_utils import generate, reused_steps

    prepare(args)
    if clip := getattr(args, "clip_score", None):
        quality.check_clip(clip)
    with_fp32 = args.fp32_reference or args.checkpoint.source == "bundled"
    with_fp32 = with_fp32 and not args.disable_bf16  # there eager is fp32
    if with_fp32:
        reference.check_room(args)
    for line in card.busy(args):
        print(line)
    pipeline, load_s = announce_and_load(args)
    prompts = quality_prompts(args)[: args.quality_prompts]
    kept, _ = reference.load_or_make(pipeline, args, prompts, with_fp32)

    start = time.perf_counter()
    pipeline = peers.optimize(pipeline, args)
    optimize_s = time.perf_counter() - start

    clock = StageClock(args.device)
    annotate_pipeline(pipeline, clock)
    regions, states = [], [card.gpu_state(args)]
    reset_peak_memory(args.device)
    total = measure(
        lambda: generate(pipeline, args),
        args.device,
        args.num_runs,
        args.num_warmup,
        before_timed=clock.read,  # forget the warm-up's regions
        after_run=lambda: regions.append(clock.read()),
    )
    states.append(card.gpu_state(args))
    memory = {"weights_gib": weights_gib(pipeline), **peak_memory(args.device)}
    if args.machine.device == "cuda":
        add_graphs(memory)
    rates = peaks.datasheet(args.machine)
    if args.measure_ceilings:  # after the memory: a CPU's peak cannot be reset
        rates = peaks.measure_ceilings(args.device, args.dtype)
    used = reused_steps(pipeline, args)
    result = quality.run(pipeline, args, prompts)
    clock.read()
    seconds = stage_seconds(regions, args.num_inference_steps)
    stages = {title: spread.as_dict() for title, spread in seconds.items()}
    row = {
        "format": FORMAT,
        "command": card.command(),
        "environment": card.environment(args) | _clocks(states),
        "call": card.call(args),
        "steps": card.plan_as_dict(args),
        "step_cache": used,
        "cuda_graphs": cudagraph.usage(pipeline),
        **peers.about(args),
        "lossless": card.is_lossless(args),
        "load_s": round(load_s, 3),
        "optimize_s": round(optimize_s, 3),
        "total_s": total.as_dict(),
        "stages_s": stages,
        "memory_gib": {name.removesuffix("_gib"): round(gib, 3) for name, gib in memory.items()},
        "quality": reference.scores(result, kept, args, prompts),
        **_strips(args, result, kept["eager"]),
        "roofline": roofline.rows_of(roofline.work_of(args), rates, stages, total.as_dict()),
        "peaks": dataclasses.asdict(rates) if rates else None,
    }
    if args.random_weights and args.quality_source == "bundled":
        row["full_size"], row["quality"] = row["quality"], quality_source.measure(args)
    problem = quality.lossless_problem(row["quality"]) if row["lossless"] else ""
    if problem and "peer" in row:
        row["lossless"] = False  # a peer may be what it is
    elif problem:
        raise RuntimeError(problem)
    return row, pipeline, result


def _strips(args, result, eager) -> dict[str, str]:
    """Keep the quality prompts' pictures and the reference's; random weights' mean nothing.

    The paths are relative to the folder of the results (--pictures is a folder in it).
    """
    if not args.pictures or args.random_weights:
        return {}
    from utils.images import write_strip

    folder = Path(args.pictures)
    made = {"pictures": result.images, "reference_pictures": eager.images}
    return {name: f"{folder.name}/{write_strip(images, folder)}" for name, images in made.items()}


def _clocks(states: list[dict]) -> dict:
    """Give the lowest and highest SM clock seen before and after the timed runs."""
    seen = [int(state["clocks.sm"]) for state in states if state.get("clocks.sm", "").isdigit()]
    return {"clocks_mhz": {"min": min(seen), "max": max(seen)}} if seen else {}


def stage_seconds(regions: list[dict[str, list[float]]], steps: int) -> dict:
    """Turn the clock's regions of every timed run into one spread per stage.

    `postprocessing` contains `pil_conversion`; it is given without it. Units: seconds;
    `denoising_step` is per forward of the transformer and `prompt_encoding` per encoding (with true
    CFG two of either), every other stage per call. `image_encoding` is Kontext's alone. Of a loop
    that is one graph (step `loop_graph`) a step is the loop over `steps`.
    """

    def spread(title):
        return Spread(tuple(s for run in regions for s in run.get(title, ())))

    stages = {
        title: spread(title)
        for title in ("prompt_encoding", "denoising_step", "decoding", "pil_conversion")
    }
    if loops := spread("denoising_loop").samples:
        stages["denoising_step"] = Spread(tuple(loop / steps for loop in loops))
    if any("image_encoding" in run for run in regions):
        stages["image_encoding"] = spread("image_encoding")
    post = zip(spread("postprocessing").samples, stages["pil_conversion"].samples, strict=True)
    stages["postprocessing"] = Spread(tuple(whole - pil for whole, pil in post))
    return stages


def render(row: dict) -> str:
    """Write a row for people: seconds of every stage, memory, quality."""

    def spread(title):
        return Spread(tuple(row["stages_s"][title]["samples"]))

    total = Spread(tuple(row["total_s"]["samples"]))
    ready = f"load        {row['load_s']:.2f} s, optimize and compile {row['optimize_s']:.2f} s"
    lines = [ready, f"total       {total} s per call", *outliers(total)]
    for title in row["stages_s"]:
        per = " per step" if title == "denoising_step" else ""
        if per and (loop := get(row, *OF_LOOP)):
            per += f" ({loop})"
        lines.append(f"  {title:16s} {spread(title)} s{per}")
    lines += card.step_cache(row["step_cache"])
    lines += card.cuda_graphs(row.get("cuda_graphs"))
    memory = ", ".join(f"{name} {gib:.2f}" for name, gib in row["memory_gib"].items())
    lines.append(f"memory      {memory} GiB")
    lines += _quality_lines(row["quality"])
    lines += floors(row["roofline"])
    if own := row.get("full_size"):
        lines.append(
            f"full size   random weights: latents' relative L2 error "
            f"{own['latents_relative_l2']:.2e} against eager; the pictures mean nothing"
        )
    elif row["call"]["random_weights"]:
        lines.append("note        random weights: the pictures mean nothing")
    return "\n".join(lines)


def _quality_lines(scores: dict) -> list[str]:
    """Write how far a row is from the reference."""
    worst, source = scores["psnr_db_worst"], scores.get("quality_source")
    against = f"quality     {scores['prompts']} prompts against {scores['reference']}"
    against += f" ({source}): PSNR " if source else ": PSNR "
    if worst is None:
        lines = [against + "identical"]
    else:
        lines = [
            against + f"{scores['psnr_db_mean']:.1f} dB (worst {worst:.1f}; another seed: "
            f"{scores['other_seed_psnr_db']:.1f}), SSIM {scores['ssim_mean']:.4f}"
        ]
    error = f"latents     relative L2 error {scores['latents_relative_l2']:.2e} against eager"
    if scores["fp32_relative_l2"] is not None:
        error += (
            f", {scores['fp32_relative_l2']:.2e} against fp32 (eager itself "
            f"{scores['eager_fp32_relative_l2']:.2e})"
        )
    lines.append(error)
    if scores["checker_right"] is not None:
        lines.append(f"checker     {100 * scores['checker_right']:.0f} % of the pictures right")
    if "clip_score" in scores:
        lines.append(
            f"CLIP score  {scores['clip_score']:.2f} (eager: {scores['eager_clip_score']:.2f})"
        )
    return lines


def floors(found: dict) -> list[str]:
    """Write each stage's rate and, where the machine's peaks are known, its distance from them."""
    lines = []
    for stage, part in found.items():
        if part["seconds"] is None or part["tflop_per_s"] is None:
            continue
        line = f"  {stage:16s} {part['tflop_per_s']:.3g} TFLOP/s"
        if part["time_over_floor"] is not None:
            line += (
                f", {100 * part['mfu']:.1f} % of the peak; {part['time_over_floor']:.2f} times the "
                f"floor of {part['floor_s']:.3g} s, most of it bound by {part['bound']}"
            )
        lines.append(line)
    return ["roofline", *lines] if lines else []


def outliers(total) -> list[str]:
    """Warn about single slow runs, and say what to do about them.

    Beyond the upper quartile by three times the quartiles' distance, as box plots' far outliers.
    """
    if len(total.samples) < 5:
        return []
    ordered = sorted(total.samples)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    far = [s for s in ordered if s > high + 3 * max(high - low, 0.01 * total.median)]
    if not far:
        return []
    return [
        f"  warning: {len(far)} of {len(ordered)} runs took far longer (up to {far[-1]:.4g} s): "
        "something else ran here; close it, or raise --num_warmup, and measure again"
    ]


def write_trace(path: Path, run) -> None:
    """Profile one run and write its Chrome trace, zipped if the name says so."""
    import torch

    with torch.profiler.profile() as profile:
        run()
    with replacing(path) as new:
        profile.export_chrome_trace(str(new))

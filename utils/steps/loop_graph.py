"""All steps of a call as one CUDA graph: nothing of the host between them.

Last, because it decides only how often the finished forward is queued. It needs step `modulation`,
whose loop (utils/denoise.py) asks nothing of the host: every step is unrolled into a graph per
number of steps, size and batch, and between two steps the copies into and out of a step's own graph
go. The transformer then has no graph by itself. Recording a new kind of call runs its loop four
times, against four forwards of a graph per step.

The progress bar jumps to its end when the loop is queued, and no step can be timed: the benchmark's
`denoising_step` is the loop's time over its steps, and its row says so. `--kernel_table` sees every
kernel as before; a trace would show no step, so it is refused.

Unmeasured on a GPU, and therefore off by default.
"""

from utils.progress import say
from utils.steps import Verdict, not_given, on, refused, unavailable, uncompiled

NAME = "loop_graph"
AFTER = ("modulation", "compile", "export_aoti")
PARTS = ("pipeline",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--loop_graph",
        action="store_true",
        help="with --modulation_once: one CUDA graph of all steps (lossless; unmeasured on a GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flags: a loop that is one graph leaves nothing to decide in a step."""
    if not args.loop_graph:
        return not_given("--loop_graph")
    if not args.modulation_once:
        return refused(
            "--loop_graph: found no --modulation_once, whose loop asks nothing of the host; add it"
        )
    if args.step_mask:
        return refused(
            "--loop_graph: --step_mask counts the steps on the host; leave out one of the two"
        )
    if getattr(args, "trace_file", None):
        return refused(
            "--loop_graph: --trace-file shows steps, and the host has none of them here; leave out "
            "one of the two"
        )
    if args.machine.device != "cuda":
        return unavailable(f"CUDA graphs need a CUDA device, found {args.machine.short()}")
    if problem := uncompiled(args, "--loop_graph", " (graphs come with them)"):
        return refused(problem)
    return on(denoising_step=f"loop/{args.num_inference_steps}")


def apply(pipeline, args) -> None:
    """Put the loop into a graph of the pipeline's pool, and record the run's own call."""
    from utils.cudagraph import pool_of
    from utils.pipeline_utils import generate

    wrap(pipeline, pool_of(pipeline))
    say(NAME, f"recording {args.num_inference_steps} steps as one graph")
    generate(pipeline, args)


def wrap(pipeline, pool) -> None:
    """Let the pipeline's own loop go through graphs of one pool, one for each kind of call."""
    from utils.cudagraph import CUDAGraphWrapper
    from utils.denoise import denoise
    from utils.kernels.modulation import Constants

    transformer = pipeline.transformer

    def loop(latents, reference, lengths, **constants):
        return denoise(transformer, latents, reference, Constants(**constants), lengths)

    pipeline.loop_graph = CUDAGraphWrapper(loop, "denoising loop", pool)

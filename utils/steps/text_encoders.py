"""T5 and CLIP compiled by their blocks and, on a GPU, replayed as one CUDA graph each.

Some 1,100 small kernels per prompt, launched one by one by eager code, for 2.5 ms of work on an
H200 (256 tokens): the graph removes the launches, the compiler two thirds of the kernels. All
blocks of an encoder share one graph of code (T5's first, which makes the position bias, has its
own), so this adds little to compilation; whole encoders would compile for minutes and gain nothing
that the CUDA graph has not. With export_aoti the three graphs of code are packages of their own,
made and stored as all others.

After the flags that the compiler reads, before the steps that warm everything up.
"""

from utils.steps import Verdict, compile, inductor_tuning_flags, not_given, on, refused, uncompiled

NAME = "text_encoders"
AFTER = ("inductor_tuning_flags",)
PARTS = ("pipeline",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--compile_text_encoders",
        action="store_true",
        help="compile T5 and CLIP too, and record them as CUDA graphs (lossless; unmeasured on a "
        "GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flags: who wants no compiler gets none."""
    if not args.compile_text_encoders:
        return not_given("--compile_text_encoders")
    problem = uncompiled(args, "--compile_text_encoders") or compile.missing_compiler()
    if problem:
        return refused(problem)
    return on(**compile.compiler_mode(args))


def blocks(encoder) -> list:
    """List the repeated blocks of a T5 or CLIP text encoder."""
    inner = getattr(encoder, "text_model", encoder).encoder  # older transformers: one deeper
    return list(inner.block if hasattr(inner, "block") else inner.layers)


def groups(pipeline) -> dict[str, list]:
    """List the blocks that are built alike, so that one graph of code serves all of them."""
    first, *others = blocks(pipeline.text_encoder_2)
    clip = blocks(pipeline.text_encoder)
    return {"clip_block": clip, "t5_first_block": [first], "t5_block": others}


def apply(pipeline, args) -> None:
    """Compile every block in place, or leave that to export_aoti; the first call warms them up."""
    if args.compile_export_mode == "export_aoti":
        return
    how = {
        "fullgraph": True,
        "dynamic": compile.dynamic(args.machine),
        "options": {**compile.compiler_mode(args), **inductor_tuning_flags.options(args)},
    }
    for group in groups(pipeline).values():
        for block in group:
            block.compile(**how)
    if args.machine.device == "cuda":
        from utils.cudagraph import pool_of

        wrap(pipeline, pool_of(pipeline))


def wrap(pipeline, pool) -> None:
    """Put the encoders' forwards into CUDA graphs of one pool."""
    for name, encoder in (("CLIP", pipeline.text_encoder), ("T5", pipeline.text_encoder_2)):
        encoder.forward = _graphed(encoder.forward, name, pool)


def as_eager(forward, *args, **kwargs):
    """Call an encoder in a capture as outside of one.

    transformers 5.17 takes a capture for a trace, and then makes masks of ones where the warm-up
    had none: another kind of call, for which the blocks would be compiled inside of the capture.
    """
    from unittest.mock import patch

    from transformers.utils import import_utils

    def no() -> bool:
        return False

    with patch.object(import_utils, "is_cuda_stream_capturing", no):
        return forward(*args, **kwargs)


def _graphed(forward, name: str, pool):
    """Graph the tensors alone: what comes out is a class that pytree does not look into."""
    from utils.cudagraph import CUDAGraphWrapper

    kinds = []

    def tensors(*args, **kwargs) -> dict:
        found = as_eager(forward, *args, **kwargs)
        kinds[:] = [type(found)]
        return dict(found)

    graph = CUDAGraphWrapper(tensors, name, pool)

    def run(*args, **kwargs):
        found = graph(*args, **kwargs)
        return kinds[0](**found)

    return run

"""T5's Linears in float8, by the same recipe as the transformer's: half the memory, half the reads.

T5-XXL is 8.9 GiB in bf16, of which 8.6 are its blocks' Linears: in float8 it is 4.6 GiB, so that
all of FLUX.1 in float8 stays resident on a 24 GB card. One scale per row, as `quant` has it, and
all of its guards. Embeddings, norms and the position bias stay in bf16, CLIP as a whole. Lossy: the
text of every picture changes a little. Measured on a CPU: tests/test_text_quant.py.

Beside `quant`, before `memory` places the weights and the compiler sees them.
"""

from utils.errors import UserError
from utils.steps import Verdict, not_given, on, quant, refused, unavailable

NAME = "text_quant"
AFTER = ("quant",)
PARTS = ("text",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on: lossy and unmeasured, so it is off by default."""
    parser.add_argument(
        "--quant_text_encoder",
        action="store_true",
        help="T5's Linears in float8, half of its memory (lossy; unmeasured on a GPU, so off by "
        "default)",
    )


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.quant_text_encoder:
        return not_given("--quant_text_encoder")
    if args.disable_quant:
        return refused("--quant_text_encoder: found --disable_quant; leave out one of the two")
    if reason := quant.lacking(args.machine):
        return unavailable(reason)
    if str(args.dtype) == "torch.float32":
        return refused(
            "--quant_text_encoder: row-wise float8 needs bf16 weights, found --disable_bf16; leave "
            "out one of the two"
        )
    if problem := quant.missing_torchao():
        return refused(problem)
    return on(lossless=False, granularity="row", dtype=quant.dtype_of(args.machine))


def apply(pipeline, args) -> str:
    """Quantise, and say how many layers it was.

    Raises: UserError if there was nothing to quantise; RuntimeError as quant.cast.
    """
    import torch

    settings, encoder = args.plan[NAME].settings, pipeline.text_encoder_2.encoder
    chosen, left_out = quant.fitting(encoder, settings["granularity"], lambda name: True)
    for name in [*chosen]:  # transformers keeps an MLP's wo in fp32 where it loads T5 in fp16
        dtype = encoder.get_submodule(name).weight.dtype
        if dtype != torch.bfloat16:
            chosen.remove(name)
            left_out[name] = f"{dtype}, not bf16"
    if not chosen:
        raise UserError(
            f"--quant_text_encoder: no layer of T5 can be float8: {left_out}; leave it out"
        )
    quant.cast(encoder, chosen, settings)
    return quant.report(f"text_quant: {len(chosen)} Linears of T5", settings, left_out)

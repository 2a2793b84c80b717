"""The VAE decoder's upsamplings and the convolutions behind them as one layer: 4/9 of the work.

The three convolutions behind an upsampling are 2.78 of the decoder's 10.47 TFLOP at 1024x1024; with
their taps summed (utils/kernels/subpixel_upsampling.py) they are 1.24. The enlarged tensors, four
times their input, are neither written nor read: 1.7 GB less (`python -m tests.decoder_codegen`).
Two ways, since which one the libraries have the faster kernel for only a GPU tells: a transposed
convolution is a stride-2 gradient to cuDNN, phases are interleaved by a copy. Unmeasured, so off.

First of the decoder's steps: the new weights are then laid out like all others.
"""

from utils.errors import UserError
from utils.steps import Verdict, not_given, on

NAME = "subpixel_upsampling"
AFTER = ()
PARTS = ("decoder",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--subpixel_upsampling",
        choices=("transposed", "phases"),
        help="the VAE decoder's upsamplings inside of their convolutions, as transposed ones or "
        "with the four output phases as channels (lossless; unmeasured on a GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flag: it is arithmetic, right on any device and in any mode."""
    if args.subpixel_upsampling is None:
        return not_given("--subpixel_upsampling")
    return on(way=args.subpixel_upsampling)


def apply(pipeline, args) -> None:
    """Put one layer in place of each upsampling of the decoder, one after the other.

    Raises: UserError if one is not diffusers' plain one.
    """
    from diffusers.models.upsampling import Upsample2D

    from utils.kernels.subpixel_upsampling import SubpixelUpsample

    way = args.plan[NAME].settings["way"]
    for index, block in enumerate(pipeline.vae.decoder.up_blocks):
        for place, old in enumerate(block.upsamplers or ()):
            is_plain = type(old) is Upsample2D and old.norm is None and old.interpolate
            if not (is_plain and old.use_conv and old.conv.kernel_size == (3, 3)):
                raise UserError(
                    f"--subpixel_upsampling: found {type(old).__name__} at up_blocks.{index}, "
                    "expected nearest upsampling with a convolution; leave out the flag"
                )
            block.upsamplers[place] = SubpixelUpsample(old.conv, way == "transposed")

"""The VAE decoder's upsamplings and the convolutions behind them as one layer: 4/9 of the work.

The three convolutions behind an upsampling are 2.78 of the decoder's 10.47 TFLOP at 1024x1024; as
transposed convolutions of stride 2 (utils/kernels/subpixel_upsampling.py) they are 1.24. The
enlarged tensors, four times their input, are neither written nor read: 1.7 GB less. Instead one
2x2 convolution could give the four phases as channels, but its output has to be interleaved
afterwards. Which kernels cuDNN has for it decides what the count is worth: unmeasured, so off.

First of the decoder's steps: the new weights are then laid out like all others.
"""

from utils.steps import Verdict, off, on

NAME = "subpixel_upsampling"
AFTER = ()


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--subpixel_upsampling",
        action="store_true",
        help="the VAE decoder's upsamplings inside of their convolutions (lossless; unmeasured on "
        "a GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flag: it is arithmetic, right on any device and in any mode."""
    if not args.subpixel_upsampling:
        return off("no --subpixel_upsampling")
    return on()


def apply(pipeline, args) -> None:
    """Put one layer in place of each upsampling of the decoder, one after the other.

    Raises: UserError if one is not diffusers' plain one.
    """
    from diffusers.models.upsampling import Upsample2D

    from utils.errors import UserError
    from utils.kernels.subpixel_upsampling import fold

    for index, block in enumerate(pipeline.vae.decoder.up_blocks):
        for place, old in enumerate(block.upsamplers or ()):
            is_plain = type(old) is Upsample2D and old.norm is None and old.interpolate
            if not (is_plain and old.use_conv and not old.use_conv_transpose):
                raise UserError(
                    f"--subpixel_upsampling: found {type(old).__name__} at up_blocks.{index}, "
                    "expected nearest upsampling with a convolution; leave out the flag"
                )
            block.upsamplers[place] = fold(old.conv)

"""The VAE's convolutions in channels-last memory format, the layout of the tensor cores.

Before compilation, which specialises on strides. The transformer has no convolution.
"""

from utils.steps import Verdict, off, on

NAME = "channels_last"
AFTER = ()
PARTS = ("decoder",)


def add_flags(parser) -> None:
    """Add the flag that turns the step off."""
    parser.add_argument(
        "--disable_channels_last",
        action="store_true",
        help="keep the VAE in the default memory format",
    )


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if args.disable_channels_last:
        return off("--disable_channels_last")
    return on()


def apply(pipeline, args) -> None:
    """Change the strides of the VAE's weights; activations follow them."""
    import torch

    pipeline.vae.to(memory_format=torch.channels_last)

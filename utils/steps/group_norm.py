"""The VAE decoder's GroupNorms in channels-last order: statistics per channel, then per group.

After channels_last, whose layout they are made for, and before compilation, which they need: they
are plain torch that only a compiler makes fast. Counted in Inductor's code for an H200, never run
(docs/performance.md): at 1024x1024 the statistics read 24 GB in memory sectors by torch's own
formula and 3.7 GB, every sector once, by this one: 5 ms and 0.8 ms at the memory's full rate.
"""

from utils.steps import Verdict, not_given, on, refused, uncompiled

NAME = "group_norm"
AFTER = ("channels_last",)
PARTS = ("decoder",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--channel_group_norm",
        action="store_true",
        help="the VAE decoder's GroupNorms read along the channels (lossless; unmeasured on a GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flags: worth it in channels-last and under a compiler only."""
    if not args.channel_group_norm:
        return not_given("--channel_group_norm")
    if args.disable_channels_last:
        return refused("--channel_group_norm: found --disable_channels_last; leave out one of them")
    why = " (without a compiler it is slower)"
    if problem := uncompiled(args, "--channel_group_norm", why):
        return refused(problem)
    return on()


def apply(pipeline, args) -> None:
    """Exchange the class of every GroupNorm of the decoder; the weights stay where they are."""
    import torch

    from utils.kernels.group_norm import ChannelGroupNorm

    for module in pipeline.vae.decoder.modules():
        if type(module) is torch.nn.GroupNorm:
            module.__class__ = ChannelGroupNorm

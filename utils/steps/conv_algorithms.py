"""cuDNN times its algorithms for each of the decoder's convolutions, instead of guessing one.

A flag of the process (`torch.backends.cudnn.benchmark`), which torch reads at every convolution,
eager, Inductor's extern call and AOTInductor's alike. It is on only while the decoder runs. What
cuDNN has chosen for a shape and a layout it keeps for the process, guessed or timed: so the flag
has to be on at the first call, and a CUDA graph, recorded after warm-up calls, times nothing. After
channels_last for that reason: in the default layout plain diffusers' reference run, in the same
process, has been first. Sums may come in another order than last time: lossless, not bitwise.
"""

from utils.hardware import Machine
from utils.steps import Verdict, not_given, on, refused, unavailable

NAME = "conv_algorithms"
AFTER = ("channels_last",)
PARTS = ("decoder",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--conv_benchmark",
        action="store_true",
        help="let cuDNN time its algorithms for the VAE decoder's convolutions (unmeasured)",
    )


def lacking(machine: Machine) -> str:
    """Say why a machine has no cuDNN; "" if it has."""
    return "" if machine.is_cuda else f"needs an NVIDIA GPU, found {machine.short()}"


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.conv_benchmark:
        return not_given("--conv_benchmark")
    if reason := lacking(args.machine):
        return unavailable(reason)
    if args.disable_channels_last:
        return refused(
            "--conv_benchmark: found --disable_channels_last, whose convolutions the reference run "
            "has chosen already; leave out one of them"
        )
    return on()


def apply(pipeline, args) -> None:
    """Switch the flag on before each call of the decoder and back behind it, failed or not."""
    import torch

    before = []  # as the flag was; a call inside of a call (record_inputs) nests

    def switch_on(*_) -> None:
        before.append(torch.backends.cudnn.benchmark)
        torch.backends.cudnn.benchmark = True

    def switch_back(*_) -> None:
        torch.backends.cudnn.benchmark = before.pop()

    decoder = pipeline.vae.decoder
    decoder.register_forward_pre_hook(switch_on)
    decoder.register_forward_hook(switch_back, always_call=True)

"""Four of Inductor's switches, with the values that flux-fast found best for FLUX.1.

They are handed to the compiler with the module (`options=` of torch.compile, `inductor_configs=`
of AOTInductor), never set globally: compilation happens at the first call, when globals that were
set and restored around `optimize()` would no longer be read. Off means that the compiler is told
the opposite value, so that the two runs differ in these switches alone.
"""

from utils.steps import Verdict, off, on

NAME = "inductor_tuning_flags"
AFTER = ("quant",)
PARTS = ("pipeline",)

FLAGS = {
    "conv_1x1_as_mm": True,  # 1x1 convolutions (the VAE's shortcuts) become matrix products
    "epilogue_fusion": False,  # pointwise work stays out of the products' epilogues
    "coordinate_descent_tuning": True,  # search block sizes one axis at a time
    "coordinate_descent_check_all_directions": True,  # and along the diagonals
}


def add_flags(parser) -> None:
    """Add the flag that turns the step off."""
    parser.add_argument(
        "--disable_inductor_tuning_flags",
        action="store_true",
        help="tell Inductor the opposite of " + ", ".join(f"{k}={v}" for k, v in FLAGS.items()),
    )


def check(args) -> Verdict:
    """Decide from the flags alone: without a compiler there is nothing to tell."""
    if args.disable_inductor_tuning_flags:
        return off("--disable_inductor_tuning_flags")
    if args.compile_export_mode == "disabled":
        return off("no compiler in this run (--compile_export_mode disabled)")
    return on(**FLAGS)


def options(args) -> dict[str, bool]:
    """Give the four switches as this run wants them; compile and export pass them on."""
    wanted = not args.disable_inductor_tuning_flags
    return {name: value if wanted else not value for name, value in FLAGS.items()}


def apply(pipeline, args) -> None:
    """Change nothing here: compile and export_aoti call `options()`."""

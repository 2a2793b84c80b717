"""Static activation scales where a scale per row costs a pass: behind the GELU of the MLPs.

After `triton_float8`, whose product is the one that can take GELU and the cast to float8 into its
epilogue: it writes what the MLP's last Linear reads, where the product elsewhere is stored in bf16
and read again. 226 MB less in each of Dev's blocks at 1024x1024, 2.7 ms of a step at an H200's full
rate; what the longer epilogue costs is unmeasured.

Lossy beside scales per row: one scale holds for all rows of all calls, fitted to the weights by
`python -m utils.calibrate_scales`, and twice the largest input that was seen fits into it; what
lies beyond saturates. e4m3's relative error is the same over fifteen octaves, so the pictures of
the bundled checkpoints lose nothing (docs/performance.md).

Of all other inputs a scale costs nothing: norm + modulation has the whole row at hand, and what the
attention kernel writes has to be read once more either way.
"""

import hashlib
from pathlib import Path

from utils import scales_file
from utils.errors import UserError
from utils.steps import Verdict, fused_kernels, not_given, on, quant, refused, triton_float8

NAME = "static_scales"
AFTER = ("fused_kernels", "triton_float8")
PARTS = ("pipeline",)  # its scales are those of the transformer, not of a ControlNet

ENDS = ("ff.net.2", "ff_context.net.2", "proj_out")  # of the names of Linears behind a GELU
HEADROOM = 2  # times the largest input of the calibration


def add_flags(parser) -> None:
    """Add the file, which turns the step on: unmeasured and lossy, so it is off by default."""
    parser.add_argument(
        "--static_scales",
        metavar="FILE.json",
        help="fixed float8 scales behind GELU, of python -m utils.calibrate_scales, so that the "
        "product before writes float8 (with --triton_float8 and --fused_kernels; unmeasured)",
    )


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.static_scales:
        return not_given("--static_scales")
    flag = f"--static_scales {args.static_scales}"
    missing = [name for name in ("triton_float8", "fused_kernels") if not getattr(args, name)]
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        return refused(f"{flag}: is for their kernels, expected {names}; add what is missing")
    if args.fused_mlp:
        return refused(
            f"{flag}: found --fused_mlp, whose product also gives Q, K and V, to which no GELU "
            "belongs; leave out one of the two"
        )
    try:
        found = scales_file.load(args.static_scales)
        if problem := scales_file.problem(found, args):
            raise ValueError(problem)
    except ValueError as error:
        return refused(f"{flag}: {error}")
    for step in (triton_float8, fused_kernels):
        if not (verdict := step.check(args)).is_on:
            return verdict
    digest = hashlib.sha256(Path(args.static_scales).read_bytes()).hexdigest()[:12]
    return on(lossless=False, calibrated=digest, headroom=HEADROOM)


def select(transformer) -> list[str]:
    """Name the Linears behind a GELU: the last ones of the MLPs, and single blocks' proj_out."""
    names = [name for name, _ in transformer.named_modules() if name.endswith(ENDS)]
    return [name for name in names if name.startswith(quant.BLOCKS)]


def apply(pipeline, args) -> None:
    """Give every Linear behind a GELU the scale of its input.

    Raises: UserError if the file has other Linears than the transformer, or a block is not float8.
    """
    from utils.kernels.flash_attention import E4M3_MAX
    from utils.kernels.float8_gelu import static_scale

    transformer, flag = pipeline.transformer, f"--static_scales {args.static_scales}"
    largest, names = scales_file.load(args.static_scales).largest, select(pipeline.transformer)
    if differing := sorted(set(names) ^ set(largest)):
        raise UserError(f"{flag}: found other Linears than the transformer's: {differing[0]}, ...")
    for part in quant.BLOCKS:
        for index, block in enumerate(getattr(transformer, part)):
            if not block.float8:
                raise UserError(f"{flag}: {part}.{index} has Linears that are not float8")
    for name in names:
        linear = transformer.get_submodule(name)
        scale = HEADROOM * largest[name] / E4M3_MAX
        # A buffer: diffusers takes a model's dtype from its parameters
        linear.register_buffer("input_scale", static_scale(scale, linear.weight.device))

"""Scales and bias of a row-wise float8 product behind it, where the compiler fuses them.

`(x8 @ w8) * sa * sb + bias`: the product runs as if it had one scale per tensor, which is 1, and no
bias, so it can be cuBLASLt's plain kernel or Inductor's persistent TMA template, which takes no
bias. What follows is pointwise, in fp32 with one rounding, and joins whatever reads the product
next. So the quality is row-wise (tests/test_deferred_scales.py) and the kernel the per-tensor one.

Inductor has to put the longer expressions into their readers: with its own limits it stores
[attention, GELU(MLP)] of a single block in bf16 instead, 170 MB a block more than without this
step. So two of them are raised: then it generates 20 kernels and 0.89 GB in a double block of Dev
(27 and 1.45 without this step), 13 and 0.83 in a single one (14 and 0.94), by
`python -m tests.block_codegen`; nothing was run. Unmeasured, so off.

After `quant`, whose weights it reads.
"""

from utils.hardware import Machine
from utils.steps import Verdict, not_given, off, on, quant, refused, unavailable, uncompiled

NAME = "deferred_scales"
AFTER = ("quant",)
PARTS = ("blocks",)

LIMITS = {  # up to which Inductor repeats an expression in each of its readers
    "realize_reads_threshold": 8,  # tensors it reads: product, two scales, bias, and what joins
    "realize_opcount_threshold": 60,
}


def add_flags(parser) -> None:
    """Add the flag that turns the step on: unmeasured, so it is off by default."""
    parser.add_argument(
        "--deferred_scales",
        action="store_true",
        help="row-wise float8 products without scales and bias, which are applied behind them "
        "(unmeasured, so off by default)",
    )


def lacking(machine: Machine) -> str:
    """Say why a machine has no such products; "" if it has them."""
    return machine.lacks((8, 9))


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.deferred_scales:
        return not_given("--deferred_scales")
    if reason := lacking(args.machine):
        return unavailable(reason)
    why = " (it is the compiler that fuses the scales)"
    if problem := uncompiled(args, "--deferred_scales", why):
        return refused(problem)
    for flag, expected in (("granularity", "row"), ("dtype", "float8")):
        if (found := getattr(args, f"quant_{flag}")) not in (None, expected):
            return refused(
                f"--deferred_scales: found --quant_{flag} {found}, expected {expected} (other "
                "scales cost nothing, or cannot leave the product); leave out one of the two"
            )
    if args.fused_kernels:
        return refused(
            "--deferred_scales: found --fused_kernels, whose kernels the scales cannot be fused "
            "into; leave out one of the two"
        )
    products = quant.check(args)
    if products.state == "refused":
        return off("quant is refused")  # which says it all
    if not products.is_on:
        return refused(
            f"--deferred_scales: found no float8 products ({products.reason}), expected step quant "
            "to be on; leave out --deferred_scales"
        )
    return on(lossless=False, **LIMITS)


def options(args) -> dict[str, int]:
    """Give the compiler's limits; compile and export pass them on, before there is a plan too."""
    return LIMITS if check(args).is_on else {}


def apply(pipeline, args) -> None:
    """Move scales and bias of every float8 Linear of the transformer behind its product."""
    import torch

    from utils.kernels.deferred_scales import LinearThenScales

    for module in pipeline.transformer.modules():
        if type(module) is torch.nn.Linear and quant.is_float8(module):
            module.__class__ = LinearThenScales
            one = torch.ones(1, 1, device=module.weight.device)
            module.register_buffer("one", one, persistent=False)

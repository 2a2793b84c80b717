"""A Triton kernel for the blocks' float8 products, instead of torch's.

After `quant`, whose Linears it takes, weights and all. torch's product for row scales is cuBLAS's
on Hopper (CUTLASS's before CUDA 12.9); the kernel of utils/kernels/float8_product.py is one of the
same kind, whose tile is chosen by what each multiprocessor has to load, and with `fused_kernels` it
takes gate and residual of a block's end along: 76 passes less a step, 3.2 GB of 1024x1024 in Dev.
Compiled for sm_90 it spills nothing; unmeasured.

The kernel makes its TMA descriptors itself, in scratch memory for each program. Packages of torch
before 2.13 allot that of one program to all, so there they are refused.
"""

from utils.hardware import Machine
from utils.steps import (
    Verdict,
    missing_triton,
    not_given,
    on,
    persistent_tma,
    quant,
    refused,
    unavailable,
)

NAME = "triton_float8"
AFTER = ("quant", "fused_kernels")
PARTS = ("blocks",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on: unmeasured, so it is off by default."""
    parser.add_argument(
        "--triton_float8",
        action="store_true",
        help="Triton kernel for the float8 products (Hopper; unmeasured, so off by default)",
    )


def lacking(machine: Machine) -> str:
    """Say why a machine cannot run the kernel; "" if it can."""
    if machine.is_hopper:
        return ""
    return f"needs a Hopper GPU (sm90), found {machine.short()}"


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.triton_float8:
        return not_given("--triton_float8")
    if reason := lacking(args.machine):
        return unavailable(reason)
    float8 = quant.check(args)
    if not float8.is_on or args.quant_granularity != "row":
        found = float8.reason or f"--quant_granularity {args.quant_granularity}"
        return refused(
            f"--triton_float8: multiplies float8 with one scale per row, found {found}; leave one "
            "of the two out"
        )
    others = ("persistent_tma", "deferred_scales")
    if found := ", ".join(f"--{name}" for name in others if getattr(args, name)):
        return refused(
            f"--triton_float8: found {found}, for kernels of products that are taken already; "
            "leave one of the two out"
        )
    if problem := missing_triton("--triton_float8"):
        return refused(problem)
    if problem := persistent_tma.package_problem(args):
        return refused(f"--triton_float8: {problem}")
    return on()


def apply(pipeline, args) -> None:
    """Give the blocks' float8 Linears another class; names and weights stay."""
    from utils.kernels.float8_linear import TritonFloat8Linear

    for name in quant.select(pipeline.transformer, "row", "blocks")[0]:
        pipeline.transformer.get_submodule(name).__class__ = TritonFloat8Linear

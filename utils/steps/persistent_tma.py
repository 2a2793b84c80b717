"""Inductor's persistent TMA kernels among its candidates for the products, float8 and bf16.

Under max-autotune Inductor times its own Triton templates against cuBLAS and CUTLASS, product by
product, and keeps the fastest; the persistent ones, which load through Hopper's tensor memory
accelerator, are left out unless asked for, and in float8 whenever the product has a bias. So the
bias of every float8 Linear moves behind the product, after `quant` has made it float8. One more
rounding to bf16, no more traffic: the addition joins the pointwise kernel that follows. Unmeasured.
"""

from utils.hardware import Machine
from utils.steps import Verdict, not_given, on, quant, refused, unavailable, uncompiled

NAME = "persistent_tma"
AFTER = ("quant", "fused_kernels")
PARTS = ("blocks",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on: unmeasured, so it is off by default."""
    parser.add_argument(
        "--persistent_tma",
        action="store_true",
        help="let the compiler try persistent TMA kernels for the products (unmeasured, so off by "
        "default)",
    )


def lacking(machine: Machine) -> str:
    """Say why a machine has no such kernels; "" if it has them."""
    return machine.lacks((9, 0))


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.persistent_tma:
        return not_given("--persistent_tma")
    if reason := lacking(args.machine):
        return unavailable(reason)
    why = " (it is the compiler's choice of kernels)"
    if problem := uncompiled(args, "--persistent_tma", why):
        return refused(problem)
    if problem := package_problem(args):
        return refused(f"--persistent_tma: {problem}")
    return on(bias="after" if quant.precision(quant.check(args)) == "fp8" else "inside")


def package_problem(args) -> str:
    """Say why packages of this run cannot hold kernels with TMA descriptors; "" if they can.

    Such a kernel keeps its descriptors in scratch memory, a part for each program. The C++ wrapper
    of torch 2.11 allots one part for all of them, and the others write behind it.
    """
    import torch

    version = torch.__version__.split("+")[0]
    known = tuple(map(int, version.split(".")[:2])) >= (2, 13)
    if args.compile_export_mode != "export_aoti" or known:
        return ""
    return (
        f"packages of torch {version} give its kernels too little scratch memory, expected torch "
        "2.13 or newer; use --compile_export_mode compile"
    )


def options(args) -> dict[str, bool]:
    """Give the compiler's switch; compile and export pass it on, before there is a plan too."""
    return {"triton.enable_persistent_tma_matmul": True} if check(args).is_on else {}


def apply(pipeline, args) -> None:
    """Move the bias of every float8 Linear of the transformer behind its product."""
    import torch

    from utils.kernels.linear import LinearThenBias

    for module in pipeline.transformer.modules():
        is_plain = type(module) is torch.nn.Linear and module.bias is not None
        if is_plain and quant.is_float8(module):
            module.__class__ = LinearThenBias

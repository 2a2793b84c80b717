"""Triton kernels for what stands between the products: norm, modulation, GELU, RoPE, float8 casts.

Unmeasured, so off unless asked for. What Inductor would write instead can be generated without a
GPU (`python -m tests.fused_kernel_codegen`; Dev, 1024x1024): from Q, K and V to the float8 inputs
of the attention 16 kernels and 670 MB in a double block, 10 and 470 MB in a single one, since the
scale of a head spans all tokens; here 4 and 160 MB: 21.5 GB or 4.5 ms less a step at 4.8 TB/s. In
bf16 it is 350 against 180 MB, in double blocks only. A norm with its modulation and cast is one
kernel either way (113 and 88 MB), and so is [attention, gelu(MLP)] with its cast (212 MB). Over
whole blocks it is 29 instead of 67 GB a step, 7.7 ms less (`python -m tests.block_codegen`).

After `fa3`, whose attention op it feeds, and with or without fused projections. Before `quant`,
which finds the same Linears under the same names: with one scale per row they then take inputs that
are quantised already, otherwise torchao quantises as before.
"""

from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import Verdict, missing_triton, not_given, on, quant, refused, unavailable

NAME = "fused_kernels"
AFTER = ("fused_projections", "fused_mlp", "fa3")
PARTS = ("blocks",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on: unmeasured, so it is off by default."""
    parser.add_argument(
        "--fused_kernels",
        action="store_true",
        help="Triton kernels between the products of a block (unmeasured, so off by default)",
    )


def lacking(machine: Machine) -> str:
    """Say why a machine cannot run the kernels; "" if it can."""
    return machine.lacks((8, 9))  # the first with float8 casts


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.fused_kernels:
        return not_given("--fused_kernels")
    if reason := lacking(args.machine):
        return unavailable(reason)
    if args.disable_fa3:
        return refused(
            "--fused_kernels: writes queries, keys and values for the attention op of fa3, found "
            "--disable_fa3; leave out one of the two"
        )
    if problem := missing_triton("--fused_kernels"):
        return refused(problem)
    return on(float8=quant.check(args).settings.get("granularity") == "row")


def apply(pipeline, args) -> None:
    """Give every block of the transformer the forward over the kernels; weights stay.

    Raises: UserError if a block is not diffusers' own, or there is no processor of step fa3.
    """
    from diffusers.models.transformers import transformer_flux

    from utils.kernels import fused_blocks
    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.kernels.joint_projection import JointFluxSingleTransformerBlock

    transformer = pipeline.transformer
    wanted = {
        transformer_flux.FluxTransformerBlock: fused_blocks.FusedFluxTransformerBlock,
        transformer_flux.FluxSingleTransformerBlock: fused_blocks.FusedFluxSingleTransformerBlock,
        JointFluxSingleTransformerBlock: fused_blocks.FusedJointFluxSingleTransformerBlock,
    }
    chosen = set()
    if args.plan[NAME].settings["float8"]:
        settings = args.plan[quant.NAME].settings
        chosen = set(quant.select(transformer, settings["granularity"], settings["filter"])[0])
    for part in quant.BLOCKS:
        for index, block in enumerate(getattr(transformer, part)):
            name = f"{part}.{index}"
            found = type(block), type(block.attn.processor)
            if found[0] not in wanted or found[1] is not FlashFusedFluxAttnProcessor3_0:
                names = " with ".join(kind.__name__ for kind in found)
                raise UserError(
                    f"--fused_kernels: found {names} at {name}, expected FLUX's own block with the "
                    "processor of fa3; leave out --fused_kernels"
                )
            block.__class__ = wanted[found[0]]
            block.float8 = _linears(block, name) <= chosen
    # By these names regional compilation finds the blocks
    transformer._repeated_blocks = [kind.__name__ for kind in wanted.values()]


def _linears(block, name: str) -> set[str]:
    """Name a block's Linears without modulation."""
    import torch

    return {
        f"{name}.{inner}"
        for inner, module in block.named_modules()
        if isinstance(module, torch.nn.Linear) and not inner.startswith("norm")
    }

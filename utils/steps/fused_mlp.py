"""Q, K, V and the MLP's first layer of each single block as one product, as in FLUX's own code.

After `fused_projections`, whose fused matrix it joins with the MLP's, and before whatever reads the
matrices: with one float8 scale per row and channel the numbers stay, with one per tensor both parts
share it. What may be won is the tail: in tiles of 128x256 on 132 multiprocessors the products of
4,352 tokens take 10 and 13 rounds (N = 9,216 and 12,288; 9.3 and 12.4 full), together 22 (21.6);
of 4,608 tokens 10 and 14, together 23. Unmeasured.

LoRAs have to be fused before, as with the projections: a later one finds other names.
"""

from utils.errors import UserError
from utils.steps import Verdict, fused_projections, not_given, on, refused

NAME = "fused_mlp"
AFTER = ("fused_projections",)
PARTS = ("blocks",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on: unmeasured, so it is off by default."""
    parser.add_argument(
        "--fused_mlp",
        action="store_true",
        help="Q, K, V and the MLP of a single block as one product (unmeasured, so off by default)",
    )


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.fused_mlp:
        return not_given("--fused_mlp")
    projections = fused_projections.check(args)
    if projections.is_on and "modules" not in projections.settings:
        return on()
    found = projections.reason or "--gguf_mode compressed (dequantize makes matrices)"
    return refused(
        f"--fused_mlp: joins the fused Q, K and V with the MLP, found {found}; leave one of the "
        "two out"
    )


def apply(pipeline, args) -> None:
    """Join the matrices of every single block, one after the other; nothing is left twice.

    Raises: UserError if a block is not diffusers' own.
    """
    from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock

    from utils.kernels.joint_projection import JointFluxSingleTransformerBlock, join

    transformer = pipeline.transformer
    for index, block in enumerate(transformer.single_transformer_blocks):
        if type(block) is not FluxSingleTransformerBlock:
            raise UserError(
                f"--fused_mlp: found {type(block).__name__} at single_transformer_blocks.{index}, "
                "expected FLUX's own block; leave out --fused_mlp"
            )
        join(block)
        block.__class__ = JointFluxSingleTransformerBlock
    if names := transformer._repeated_blocks:  # regional compilation finds the blocks by them
        transformer._repeated_blocks = [*names, JointFluxSingleTransformerBlock.__name__]

"""The VAE decoder's one attention as two cuBLAS products and a softmax (utils/kernels/).

After fused_projections, whose matrices it calls, and before compilation, which makes one kernel of
scale, exponential, sum and cast. By count at 1024x1024, 16,384 queries and keys of 512: 0.55 TFLOP
either way. torch's kernel reads K and V for each 32 queries (17 GB) and reads and writes its fp32
accumulator for each 128 keys (9 GB): some 26 GB through the second level cache. Ours writes and
reads the scores in fp32 and the weights in bf16: 3.2 GB through the memory. Unmeasured, so off.
"""

from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import Verdict, not_given, on, unavailable

NAME = "vae_attention"
AFTER = ("fused_projections",)
PARTS = ("decoder",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--vae_attention",
        action="store_true",
        help="the VAE decoder's attention as plain matrix products (lossless; unmeasured)",
    )


def lacking(machine: Machine) -> str:
    """Say why a machine gains nothing from it; "" if it may."""
    return machine.lacks((8, 0))


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if not args.vae_attention:
        return not_given("--vae_attention")
    if reason := lacking(args.machine):
        return unavailable(reason)
    return on()


def apply(pipeline, args) -> None:
    """Give the attention of the decoder's middle block its processor.

    Raises: UserError if it has several heads, or norms that the processor does not know.
    """
    from utils.kernels.vae_attention import ExplicitAttnProcessor

    for attn in pipeline.vae.decoder.mid_block.attentions:
        known = attn is None or (
            attn.heads == 1
            and attn.residual_connection
            and attn.group_norm is not None
            and attn.spatial_norm is attn.norm_q is attn.norm_k is None
        )
        if not known:
            raise UserError(
                f"--vae_attention: found {attn.heads} heads, or other norms than a GroupNorm, in "
                "the decoder's middle block; expected FLUX's; leave out --vae_attention"
            )
        if attn is not None:
            attn.set_processor(ExplicitAttnProcessor())

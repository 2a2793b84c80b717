"""Q, K and V of each attention as one product instead of three, in the transformer and the VAE.

First of the structural steps: whatever comes later (attention processor, float8, compile) must see
the fused matrices and nothing else. The separate ones are deleted, since diffusers keeps them: 2.15
billion parameters of FLUX.1, 4 GiB in bf16. Each module is fused and freed before the next, so the
peak grows by one module's matrices only. After it unfuse_qkv_projections() and loading a LoRA by
the old names fail; fuse LoRAs before.
"""

from utils.steps import Verdict, gguf, off, on

NAME = "fused_projections"
AFTER = ("gguf",)
PARTS = ("blocks", "decoder")

SEPARATE = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def add_flags(parser) -> None:
    """Add the flag that turns the step off."""
    parser.add_argument(
        "--disable_fused_projections",
        action="store_true",
        help="keep the separate Q, K and V projections",
    )


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if args.disable_fused_projections:
        return off("--disable_fused_projections")
    if gguf.is_compressed(args):
        return on(modules="VAE")  # a GGUF's matrices are bytes of types of their own
    if args.swap_loras:
        return off("--swap_loras: fused matrices would leave the LoRA's Q, K and V out")
    return on()


def _fuse(module) -> None:
    separate = module._modules.get("to_q")
    if separate is not None and hasattr(separate.weight, "quant_type"):  # bytes of a GGUF file
        return
    # A cross attention's fused matrix is K and V only: its to_q is still read
    if getattr(module, "is_cross_attention", False):
        return
    if not module.fused_projections:
        wants_grad = module.to_q.weight.requires_grad
        module.fuse_projections()
        for name in ("to_qkv", "to_added_qkv"):
            if name in module._modules:
                module._modules[name].requires_grad_(wants_grad)
    for name in SEPARATE:
        if name in module._modules:
            delattr(module, name)


def apply(pipeline, args) -> None:
    """Fuse the projections and free the separate ones."""
    import torch
    from diffusers.models.attention import AttentionModuleMixin
    from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0

    # nn.Linear draws weights before diffusers overwrites them: keep that out of the random state
    present = [part for part in (pipeline.transformer, pipeline.vae) if part is not None]
    cuda = [p.device for p in present[0].parameters() if p.is_cuda][:1]
    with torch.random.fork_rng(devices=cuda):
        for module in [module for part in present for module in part.modules()]:
            if isinstance(module, AttentionModuleMixin) and module._supports_qkv_fusion:
                _fuse(module)
            elif isinstance(module, Attention) and not module.is_cross_attention:
                _fuse(module)
                module.set_processor(FusedAttnProcessor2_0())

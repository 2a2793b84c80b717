"""What Inductor writes for an H200 between a whole block's products, by steps and limits.

python -m tests.block_codegen      prints JSON lines: kernels and bytes of each kind of block

A block of FLUX.1-dev's size, QKV fused, in bf16 or float8 by torchao, attention by our op, is
exported as export_aoti does it, and lowered by tests/fused_kernel_codegen.py for a pretended
device; bytes are counted as there. All places between two products are in it: Q, K and V to the
attention's inputs, MLP up through GELU to MLP down, attention through residual and norm to the MLP.
"""

import json

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from tests import emulation
from tests.fused_kernel_codegen import (
    ALL,
    IMG,
    TORCH,
    TXT,
    C,
    D,
    H,
    count,
    generate,
    pretend_h200,
    tokens,
)

BLOCKS = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}
PRODUCTS = ("bf16", "float8", "deferred")  # the last: float8 with step deferred_scales


def exported(kind: str, products: str):
    """Export one block with products of one kind, its shapes from FLUX.1-dev, its values none."""
    from types import SimpleNamespace

    from torchao.utils import unwrap_tensor_subclass

    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.steps import deferred_scales, on, quant

    block = BLOCKS[kind](dim=C, num_attention_heads=H, attention_head_dim=D).bfloat16()
    block.attn.fuse_projections()
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        if hasattr(block.attn, name):
            delattr(block.attn, name)
    block.attn.set_processor(FlashFusedFluxAttnProcessor3_0(backend="fa3", fp8=products != "bf16"))
    transformer = torch.nn.Module()
    transformer.transformer_blocks = torch.nn.ModuleList([block.requires_grad_(False)])
    pipeline = SimpleNamespace(transformer=transformer)
    settings = on(granularity="row", filter="blocks")
    if products != "bf16":
        with emulation.float8():
            quant.apply(pipeline, SimpleNamespace(plan={"quant": settings}))
    if products == "deferred":
        deferred_scales.apply(pipeline, None)
    inputs = {
        "hidden_states": torch.zeros(tokens(IMG, C)[0], dtype=torch.bfloat16),
        "encoder_hidden_states": torch.zeros(tokens(TXT, C)[0], dtype=torch.bfloat16),
        "temb": torch.zeros(1, C, dtype=torch.bfloat16),
        "image_rotary_emb": (torch.zeros(ALL, D), torch.zeros(ALL, D)),
    }
    with torch.no_grad():
        return torch.export.export(unwrap_tensor_subclass(block), (), inputs, strict=False)


def counted(program, limits: dict) -> tuple[int, int]:
    """Count kernels (without products and attention) and bytes of the generated code."""
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [(tuple(x.shape), x.dtype) for x in values if isinstance(x, torch.Tensor)]

    def run(*tensors):
        left = iter(tensors)
        given = [next(left) if isinstance(x, torch.Tensor) else x for x in values]
        return program.graph_module(*given)

    with torch._inductor.config.patch(**limits):
        return count(generate(run, inputs, on_cpu=True), inputs)


def main() -> None:
    """Print what each block has with each kind of product, under each step's limits."""
    from contextlib import redirect_stdout
    from io import StringIO

    from utils.steps import deferred_scales, fusion_limits

    limits = {"own": {}, "deferred": deferred_scales.LIMITS, "raised": fusion_limits.LIMITS}
    with redirect_stdout(StringIO()):
        programs = {(kind, p): exported(kind, p) for kind in BLOCKS for p in PRODUCTS}
    torch.set_num_threads(1)
    pretend_h200()
    torch.utils._triton.has_triton.cache_clear()  # asked before there was a GPU
    for (kind, products), program in programs.items():
        for name, values in limits.items():
            if name == "deferred" and products == "bf16":
                continue
            kernels, size = counted(program, values)
            row = {"torch": TORCH, "block": kind, "products": products, "limits": name}
            print(json.dumps(row | {"kernels": kernels, "mb": round(size / 1e6)}), flush=True)


if __name__ == "__main__":
    main()

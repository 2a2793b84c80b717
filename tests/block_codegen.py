"""What Inductor writes for an H200 between a whole block's products, by steps and limits.

python -m tests.block_codegen      prints JSON lines: kernels and bytes of each kind of block

A block of FLUX.1-dev's size, QKV fused, in bf16 or float8 by torchao, attention by our op, is
exported as export_aoti does it, and lowered by tests/fused_kernel_codegen.py for a pretended
device; bytes are counted as there. All places between two products are in it: Q, K and V to the
attention's inputs, MLP up through GELU to MLP down, attention through residual and norm to the MLP.
Of a product that ends a block itself (step triton_float8) the residual that it reads is counted.
"""

import json
import re
from contextlib import ExitStack
from functools import partial
from unittest import mock

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
    split_arguments,
    tokens,
)

BLOCKS = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}
# float8 with step deferred_scales; or with fused_kernels, then triton_float8, then static_scales
KERNELS = ("fused", "own", "static")
PRODUCTS = ("bf16", "float8", "deferred", *KERNELS)


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
    if products in KERNELS:
        _over_kernels(block, kind, products)
    inputs = {
        "hidden_states": torch.zeros(tokens(IMG, C)[0], dtype=torch.bfloat16),
        "encoder_hidden_states": torch.zeros(tokens(TXT, C)[0], dtype=torch.bfloat16),
        "temb": torch.zeros(1, C, dtype=torch.bfloat16),
        "image_rotary_emb": (torch.zeros(ALL, D), torch.zeros(ALL, D)),
    }
    with torch.no_grad(), launched():
        return torch.export.export(unwrap_tensor_subclass(block), (), inputs, strict=False)


def _over_kernels(block, kind: str, products: str) -> None:
    """Do to one block what the steps do to all."""
    from utils.kernels import float8_gelu, float8_linear, fused_blocks
    from utils.steps import quant, static_scales

    fused = "FusedFluxTransformerBlock", "FusedFluxSingleTransformerBlock"
    block.__class__ = getattr(fused_blocks, fused[kind == "single"])
    block.float8 = True
    for name, linear in block.named_modules():
        if products != "fused" and isinstance(linear, torch.nn.Linear) and quant.is_float8(linear):
            linear.__class__ = float8_linear.TritonFloat8Linear
        if products == "static" and name.endswith(static_scales.ENDS):
            linear.register_buffer("input_scale", float8_gelu.static_scale(1.0, "cpu"))


def launched() -> ExitStack:
    """Let our ops trace their kernels on a CPU too, where they are their twins."""
    from utils.kernels import float8_gelu, float8_linear, fused_blocks, modulate, norm_rope
    from utils.kernels.float8_product import launch_float8_product

    stack, h200 = ExitStack(), {"programs": 132}
    for owner, name, launch in (
        (fused_blocks, "norm_modulate", modulate.launch_norm_modulate),
        (fused_blocks, "gelu_quantize", modulate.launch_gelu_quantize),
        (fused_blocks, "norm_rope", norm_rope.launch_norm_rope),
        (fused_blocks, "float8_gelu", partial(float8_gelu.launch_float8_gelu, **h200)),
        (float8_linear, "float8_product", partial(launch_float8_product, **h200)),
    ):
        stack.enter_context(mock.patch.object(owner, name, launch))
    return stack


def without_products(code: str) -> str:
    """Leave of our products the residual that they read, and of a cast's output its own columns."""

    def rest(found) -> str:
        _, _, _, unread, _, *parts = split_arguments(found[2])[:7]
        parts = {*parts} - {unread}
        return f"{found[1]}residual.run({', '.join(parts)})" if parts else f"{found[1]}pass"

    def cast(found) -> str:
        view, _, out = split_arguments(found[2])[:3]
        return f"{found[1]}cast.run({view}, {re.sub(r'buf[0-9]+', out, view)})"

    code = re.sub(r"(?m)^( *)cast_rows_kernel_\d+\.run\((.*)\)$", cast, code)
    return re.sub(r"(?m)^( *)float8_product_kernel_\d+\.run\((.*)\)$", rest, code)


def counted(program, limits: dict) -> tuple[int, int]:
    """Count kernels (without products and attention) and bytes of the generated code."""
    values = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    inputs = [(tuple(x.shape), x.dtype) for x in values if isinstance(x, torch.Tensor)]

    def run(*tensors):
        left = iter(tensors)
        given = [next(left) if isinstance(x, torch.Tensor) else x for x in values]
        return program.graph_module(*given)

    with torch._inductor.config.patch(**limits):
        return count(without_products(generate(run, inputs, on_cpu=True)), inputs)


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
            if (products in KERNELS and name != "own") or (products, name) == ("bf16", "deferred"):
                continue
            kernels, size = counted(program, values)
            row = {"torch": TORCH, "block": kind, "products": products, "limits": name}
            print(json.dumps(row | {"kernels": kernels, "mb": round(size / 1e6)}), flush=True)


if __name__ == "__main__":
    main()

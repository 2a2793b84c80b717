"""What Inductor writes for an H200 between a whole block's products, scales inside or behind them.

python -m tests.deferred_scales_codegen      prints one JSON line per block: kernels and bytes

A block of FLUX.1-dev's size, QKV fused, float8 by torchao, attention by our op, is exported as
export_aoti does it, and lowered by tests/fused_kernel_codegen.py for a pretended device; bytes are
counted as there. All places between two products are in it: Q, K and V to the attention's inputs,
MLP up through GELU to MLP down, the attention's output through residual and norm to the MLP.
"""

import json

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from tests.fused_kernel_codegen import ALL, IMG, TXT, C, D, H, count, generate, pretend_h200, tokens

BLOCKS = {"double": FluxTransformerBlock, "single": FluxSingleTransformerBlock}


def exported(kind: str, deferred: bool):
    """Export one float8 block, its shapes from FLUX.1-dev, its values none."""
    from types import SimpleNamespace
    from unittest import mock

    from torchao.quantization import quant_api
    from torchao.utils import unwrap_tensor_subclass

    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.steps import deferred_scales, on, quant

    block = BLOCKS[kind](dim=C, num_attention_heads=H, attention_head_dim=D).bfloat16()
    block.attn.fuse_projections()
    for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
        if hasattr(block.attn, name):
            delattr(block.attn, name)
    block.attn.set_processor(FlashFusedFluxAttnProcessor3_0(backend="fa3", fp8=True))
    transformer = torch.nn.Module()
    transformer.transformer_blocks = torch.nn.ModuleList([block.requires_grad_(False)])
    pipeline = SimpleNamespace(transformer=transformer)
    settings = on(granularity="row", filter="blocks")
    with mock.patch.object(quant_api, "_check_hardware_support", lambda granularity: None):
        quant.apply(pipeline, SimpleNamespace(plan={"quant": settings}))
    if deferred:
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
    """Print what each block has by itself, with the step, and with the step but not its limits."""
    from contextlib import redirect_stdout
    from io import StringIO

    from utils.steps.deferred_scales import LIMITS

    with redirect_stdout(StringIO()):
        programs = {(k, deferred): exported(k, deferred) for k in BLOCKS for deferred in (0, 1)}
    torch.set_num_threads(1)
    pretend_h200()
    torch.utils._triton.has_triton.cache_clear()  # asked before there was a GPU
    for kind in BLOCKS:
        row = {"block": kind}
        cases = {"inside": (0, {}), "behind": (1, LIMITS), "behind_without_limits": (1, {})}
        cases["inside_with_limits"] = (0, LIMITS)
        for case, (deferred, limits) in cases.items():
            row[f"{case}_kernels"], size = counted(programs[kind, deferred], limits)
            row[f"{case}_mb"] = round(size / 1e6)
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()

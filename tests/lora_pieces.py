"""LoRAs of random matrices for the bundled checkpoints."""

from pathlib import Path

import torch
from conftest import make_args
from safetensors.torch import save_file

from utils import loras

RANK = 4
DOUBLE, SINGLE = "transformer_blocks.0.", "single_transformer_blocks.1."
LAYERS = (
    *(f"{DOUBLE}attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_v_proj")),
    f"{DOUBLE}ff.net.0.proj",
    f"{DOUBLE}norm1.linear",
    *(f"{SINGLE}{name}" for name in ("attn.to_q", "attn.to_v", "proj_mlp", "proj_out")),
    "context_embedder",
)


def write_lora(
    path: Path,
    layers: tuple[str, ...] = LAYERS,
    ckpt: str = "tiny-schnell",
    seed: int = 0,
    rank: int = RANK,
    scale: float = 0.5,
) -> str:
    """Write a LoRA in diffusers' names and give its path; `scale` is that of its up matrices."""
    known = loras.layers_of(make_args("--device", "cpu", "--ckpt", ckpt).checkpoint)
    random, made = torch.Generator().manual_seed(seed), {}
    for name in layers:
        out, inner = known[name]
        down = torch.randn(rank, inner, generator=random) / inner**0.5
        made[f"transformer.{name}.lora_A.weight"] = down
        made[f"transformer.{name}.lora_B.weight"] = scale * torch.randn(out, rank, generator=random)
    save_file(made, path)
    return str(path)

"""The bundled ControlNet of tiny-schnell: edges decide where and how large, the prompt what.

A ControlNet is as wide as its transformer, and one double block of tiny-schnell alone takes 4.7 MB.
So the file holds what training changed: products of rank 24 for the block's picture side, and in
full the three layers that are a ControlNet's own or feed it. `build` adds them to a copy of the
transformer's block; the result is diffusers' FluxControlNetModel, and as a folder anyone's:

python -m tiny_flux.controlnet FOLDER

Source: Zhang et al. 2023, arXiv:2302.05543; the low rank of the change is Control-LoRA's idea
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

HERE = Path(__file__).parent
WEIGHTS = HERE / "edges-controlnet.safetensors"
BASE = HERE / "tiny-schnell" / "transformer"
RANK = 24
WHOLE = ("x_embedder", "controlnet_x_embedder", "controlnet_blocks.0")  # trained in full
LOW_RANK = tuple(
    f"transformer_blocks.0.{name}"
    for name in (
        "norm1.linear",
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "ff.net.0.proj",
        "ff.net.2",
    )
)


class LowRank(nn.Module):
    """Add a product of rank 24 to a weight, at first zero."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.up = nn.Parameter(torch.zeros(rows, RANK))
        self.down = nn.Parameter(torch.randn(RANK, columns) / columns**0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + self.up @ self.down


def copy_of(transformer: FluxTransformer2DModel) -> FluxControlNetModel:
    """Copy the transformer's double block into a ControlNet that changes nothing yet.

    It reads edges as the transformer reads pictures: of the two layers that begin as zero in
    diffusers one is enough, and training takes off sooner.
    """
    config = transformer.config
    controlnet = FluxControlNetModel.from_transformer(
        transformer,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=config.attention_head_dim,
        num_attention_heads=config.num_attention_heads,
    )
    controlnet.controlnet_x_embedder.load_state_dict(transformer.x_embedder.state_dict())
    return controlnet


def make_trainable(controlnet: FluxControlNetModel) -> None:
    """Freeze all but the layers named above."""
    controlnet.requires_grad_(False)
    for name in WHOLE:
        controlnet.get_submodule(name).requires_grad_(True)
    for name in LOW_RANK:
        linear = controlnet.get_submodule(name)
        parametrize.register_parametrization(linear, "weight", LowRank(linear.weight))
        linear.bias.requires_grad_(True)


def save_changes(controlnet: FluxControlNetModel, path: Path = WEIGHTS) -> None:
    """Write what training changed, in bf16."""
    changed = {}
    for name in (*WHOLE, *LOW_RANK):
        linear = controlnet.get_submodule(name)
        if parametrize.is_parametrized(linear):
            product = linear.parametrizations.weight[0]
            changed |= {f"{name}.up": product.up, f"{name}.down": product.down}
        else:
            changed[f"{name}.weight"] = linear.weight
        changed[f"{name}.bias"] = linear.bias
    changed = {key: value.detach().bfloat16().contiguous() for key, value in changed.items()}
    new = path.with_suffix(".new")
    save_file(changed, new, {"base": "tiny-schnell", "condition": "canny edges", "format": "pt"})
    new.replace(path)


@torch.no_grad()
def build(dtype: torch.dtype = torch.bfloat16, weights: Path = WEIGHTS) -> FluxControlNetModel:
    """Make the trained ControlNet from tiny-schnell's transformer and the stored changes."""
    controlnet = copy_of(FluxTransformer2DModel.from_pretrained(BASE, dtype=torch.float32))
    changed = {key: value.float() for key, value in load_file(weights).items()}
    for name in (*WHOLE, *LOW_RANK):
        linear = controlnet.get_submodule(name)
        linear.bias.copy_(changed[f"{name}.bias"])
        if name in LOW_RANK:
            linear.weight.add_(changed[f"{name}.up"] @ changed[f"{name}.down"])
        else:
            linear.weight.copy_(changed[f"{name}.weight"])
    return controlnet.to(dtype).eval()


def main() -> None:
    """Write the ControlNet as a folder in diffusers' layout."""
    parser = argparse.ArgumentParser(description="Write the bundled ControlNet as a folder.")
    parser.add_argument("folder", type=Path)
    build().save_pretrained(parser.parse_args().folder)


if __name__ == "__main__":
    main()

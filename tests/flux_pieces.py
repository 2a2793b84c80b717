"""Small random FLUX parts for tests that need no picture."""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel


def transformer(
    dtype=torch.bfloat16, heads: int = 2, channels: int = 16, seed: int = 0, guidance: bool = False
):
    """Build 1 double and 2 single blocks with heads of 128, whose blocks really matter.

    A fresh model's gates are nearly zero, so that its blocks hardly reach the output and any error
    in them would pass. Here the modulation has biases of order 1.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=channels,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=128,
            num_attention_heads=heads,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=guidance,
            axes_dims_rope=(16, 56, 56),
        )
        for name, parameter in model.named_parameters():
            if ".norm" in name and name.endswith("linear.bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False).eval().to(dtype)


def inputs(batch: int = 1, text: int = 7, height: int = 3, width: int = 5, dtype=torch.bfloat16):
    """Make the transformer's arguments; every count is odd on purpose."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    ids = torch.zeros(height * width, 3)
    ids[:, 1] = torch.arange(height * width) // width
    ids[:, 2] = torch.arange(height * width) % width
    return {
        "hidden_states": random(batch, height * width, 16),
        "encoder_hidden_states": random(batch, text, 64),
        "pooled_projections": random(batch, 64),
        "timestep": torch.rand(batch, generator=generator).to(dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def vae(dtype=torch.bfloat16):
    """Build a two-level AutoencoderKL with the attention of FLUX's middle block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
            latent_channels=16,
            block_out_channels=(32, 64),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=8,
            layers_per_block=1,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.36,
            shift_factor=0.12,
        )
    return model.requires_grad_(False).eval().to(dtype)


def pipeline(dtype=torch.bfloat16):
    """Give what steps see of a pipeline."""
    return SimpleNamespace(transformer=transformer(dtype), vae=vae(dtype))


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()

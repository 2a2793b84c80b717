"""Full-size FLUX.1 without its weights: the right architecture, and activations that behave."""

import pytest
import torch
from conftest import make_args

from utils import quality
from utils.pipeline_utils import load_pipeline
from utils.random_weights import modules


def parameters(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("ckpt", "transformer"),
    [
        ("black-forest-labs/FLUX.1-schnell", 11_891_178_560),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320),
    ],
)
def test_parameter_counts_are_those_of_the_published_checkpoints(ckpt, transformer, roomy):
    args = make_args("--ckpt", ckpt, "--random_weights", "--device", "cpu")
    parts = modules(args.checkpoint, torch.bfloat16, "meta")
    assert parameters(parts["transformer"]) == transformer
    assert parameters(parts["vae"]) == 83_819_683
    assert parameters(parts["vae"].decoder) == 49_545_475
    assert parameters(parts["text_encoder"]) == 123_060_480
    assert parameters(parts["text_encoder_2"]) == 4_762_310_656
    assert {p.dtype for part in parts.values() for p in part.parameters()} == {torch.bfloat16}


def test_random_pipelines_draw_the_same_finite_noise_for_the_same_seed():
    args = make_args("--random_weights", "--ckpt", "tiny-schnell", "--device", "cpu")
    first = quality.run(load_pipeline(args), args)
    again = quality.run(load_pipeline(args), args)
    assert torch.equal(first.latents, again.latents)
    assert 0.1 < first.latents.std() < 10
    other = make_args(
        "--random_weights", "--ckpt", "tiny-schnell", "--device", "cpu", "--seed", "1"
    )
    assert not torch.equal(first.latents, quality.run(load_pipeline(other), other).latents)


@pytest.mark.slow
def test_activations_stay_finite_through_all_57_blocks():
    """All blocks of FLUX.1 at an eighth of its width: depth is what makes activations grow."""
    from diffusers import FluxTransformer2DModel

    from utils.random_weights import _fill

    model = FluxTransformer2DModel(num_attention_heads=3, joint_attention_dim=256).eval()
    _fill(model, torch.Generator().manual_seed(0))
    spreads = []
    for block in model.single_transformer_blocks:
        block.register_forward_hook(lambda m, i, out: spreads.append(out[1].std().item()))
    ids = torch.zeros(64, 3)
    ids[:, 1], ids[:, 2] = torch.arange(64) // 8, torch.arange(64) % 8
    with torch.no_grad():
        out = model(
            hidden_states=torch.randn(1, 64, 64),
            encoder_hidden_states=torch.randn(1, 32, 256),
            pooled_projections=torch.randn(1, 768),
            timestep=torch.tensor([0.5]),
            img_ids=ids,
            txt_ids=torch.zeros(32, 3),
        ).sample
    assert out.isfinite().all() and 0.05 < out.std() < 20
    assert max(spreads) < 100

"""Full-size FLUX.1 without its weights: the right architecture, and activations that behave."""

import pytest
import torch
from conftest import make_args
from diffusers import FluxTransformer2DModel

from utils import quality, random_weights
from utils.checkpoints import resolve
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


@pytest.mark.parametrize(("room_gib", "drawn_on"), [(80, "cuda"), (0.001, "cpu")])
def test_weights_for_the_host_are_drawn_on_a_gpu_with_room(room_gib, drawn_on, monkeypatch):
    asked, filled = [], random_weights.filled
    checkpoint = resolve("tiny-schnell", random_weights=True)

    def on_a_cpu(checkpoint, dtype, device, seed):
        asked.append(device)
        return filled(checkpoint, dtype, "cpu", seed)

    monkeypatch.setattr(random_weights, "filled", on_a_cpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (int(room_gib * 2**30), 0))
    pipeline = random_weights.build(checkpoint, torch.bfloat16, "cpu", 0)
    assert asked == [drawn_on] and pipeline.device.type == "cpu"


@pytest.fixture(scope="module")
def seen():
    """Run all 57 blocks at a sixth of FLUX.1's width, in bf16.

    Returns: the velocity; the standard deviation behind every block, of text and image; per
    product the RMS of its input's channels
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_attention_heads=4, guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device="cpu").eval()
    model.pos_embed = type(model.pos_embed)(theta=10000, axes_dim=[16, 56, 56])
    random_weights._fill(model, torch.Generator().manual_seed(0))
    random_weights._let_channels_stand_out(model)
    spreads, inputs = [], {}

    def spread(module, args, streams):
        spreads.append([stream.float().std().item() for stream in streams])

    def channels(name):
        def hook(module, args, output):
            rows = args[0].float().flatten(0, -2)
            inputs[name] = rows.square().mean(0).sqrt()

        return hook

    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.register_forward_hook(spread)
    for name, module in model.named_modules():
        if name.endswith(("to_q", "add_q_proj", "net.0.proj", "proj_mlp", "net.2", "proj_out")):
            module.register_forward_hook(channels(name))
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    with torch.no_grad():
        velocity = model(
            hidden_states=draw(1, 64, 64),
            timestep=torch.tensor([0.7], dtype=torch.bfloat16),
            guidance=torch.tensor([3.5]),
            pooled_projections=draw(1, 768),
            encoder_hidden_states=draw(1, 32, 4096),
            txt_ids=torch.zeros(32, 3),
            img_ids=torch.zeros(64, 3),
            return_dict=False,
        )[0]
    return velocity, spreads, inputs


def test_activations_stay_of_order_one_through_57_blocks(seen):
    velocity, spreads, _ = seen
    assert len(spreads) == 57
    assert all(0.5 < one < 5 for pair in spreads for one in pair), spreads
    assert velocity.isfinite().all() and 0.3 < velocity.float().std() < 3


def test_a_few_channels_stand_far_out_before_every_product_behind_a_norm(seen):
    _, _, inputs = seen
    behind = {n: rms for n, rms in inputs.items() if "net.2" not in n and "proj_out" not in n}
    assert len(behind) == 19 * 4 + 38 * 2
    for name, rms in behind.items():
        ordered = rms.sort(descending=True).values
        assert 5 < ordered[0] / rms.median() < 100, name
        assert ordered[len(rms) // 50] < 5 * rms.median(), name  # the other 98 % do not


def test_outliers_cost_a_per_tensor_quantiser_what_they_should(seen):
    """int8 with one scale loses an order of magnitude more to an outlier than to none."""
    _, _, inputs = seen
    rms = inputs["transformer_blocks.5.attn.to_q"]
    values = torch.randn(256, len(rms), generator=torch.Generator().manual_seed(2)) * rms
    plain = torch.where(rms > 5 * rms.median(), rms.median(), rms)
    usual = values / rms * plain

    def error(x):
        scale = x.abs().max() / 127
        kept = rms < 5 * rms.median()
        return (((x / scale).round() * scale - x)[:, kept].norm() / x[:, kept].norm()).item()

    assert error(values) > 3 * error(usual)

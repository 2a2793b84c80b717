"""Steps that change modules and must not change the picture: fused projections, channels-last."""

from types import SimpleNamespace

import pytest
import torch

from tests.flux_pieces import inputs, pipeline, relative_error
from utils.steps import channels_last, fused_projections


def parameters(module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 16, 6, 10, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("batch", [1, 2])
def test_fusing_is_bitwise_and_frees_the_separate_projections(latents, batch):
    pipe = pipeline()
    counts = parameters(pipe.transformer), parameters(pipe.vae)
    before = pipe.transformer(**inputs(batch))[0]
    picture, moments = pipe.vae.decode(latents).sample, pipe.vae.encode(picture_like(latents))
    fused_projections.apply(pipe, SimpleNamespace())
    assert (parameters(pipe.transformer), parameters(pipe.vae)) == counts
    separate = [
        name
        for part in (pipe.transformer, pipe.vae)
        for name, _ in part.named_modules()
        if name.split(".")[-1] in fused_projections.SEPARATE
    ]
    assert not separate
    assert torch.equal(pipe.transformer(**inputs(batch))[0], before)
    assert torch.equal(pipe.vae.decode(latents).sample, picture)
    after = pipe.vae.encode(picture_like(latents))
    assert torch.equal(after.latent_dist.mean, moments.latent_dist.mean)


def picture_like(latents):
    return latents.new_ones(1, 3, 2 * latents.shape[2], 2 * latents.shape[3])


def test_fusing_twice_changes_nothing():
    pipe = pipeline()
    fused_projections.apply(pipe, SimpleNamespace())
    names = set(dict(pipe.transformer.named_parameters()))
    fused_projections.apply(pipe, SimpleNamespace())
    assert set(dict(pipe.transformer.named_parameters())) == names


def test_fusing_leaves_the_random_state_alone():
    # nn.Linear fills its weights from the global generator before they are overwritten
    pipe = pipeline()
    state = torch.get_rng_state()
    fused_projections.apply(pipe, SimpleNamespace())
    assert torch.equal(torch.get_rng_state(), state)


# Convolutions may sum in another order: measured 1.8e-6 in fp32; in bf16 0 here, one rounding
# (2^-8) in other shapes.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
def test_channels_last_changes_strides_and_not_the_picture(latents, dtype, tolerance):
    pipe, latents = pipeline(dtype), latents.to(dtype)
    before = pipe.vae.decode(latents).sample
    channels_last.apply(pipe, SimpleNamespace())
    convolutions = [m.weight for m in pipe.vae.modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convolutions)
    assert any(not w.is_contiguous() for w in convolutions)
    after = pipe.vae.decode(latents).sample
    assert relative_error(after, before) < tolerance


@pytest.mark.parametrize("step", [fused_projections, channels_last])
def test_flag_turns_the_step_off(step):
    flag = f"disable_{step.NAME}"
    given = {"swap_loras": False, "gguf_file": None}
    assert step.check(SimpleNamespace(**given, **{flag: False})).is_on
    assert step.check(SimpleNamespace(**given, **{flag: False})).lossless
    verdict = step.check(SimpleNamespace(**given, **{flag: True}))
    assert (verdict.state, verdict.reason) == ("off", f"--{flag}")

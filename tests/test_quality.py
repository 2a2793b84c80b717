"""How far pictures and latents are from a reference, on numbers that can be worked out by hand."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from utils import pipeline_utils, quality
from utils.prompts import QUALITY, quality_prompts


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (level,) * 3)


@pytest.fixture
def pipeline(monkeypatch):
    """Stand in for a pipeline that decodes one latent a prompt, and keeps its calls."""
    pipeline = SimpleNamespace(vae=SimpleNamespace(decode=lambda z: z), calls=[], value=1.0)

    def generate(pipeline, args):
        pipeline.calls.append((args.prompt, args.num_images_per_prompt, args.seed))
        seeds = torch.arange(args.seed, args.seed + len(args.prompt))
        pipeline.vae.decode(pipeline.value * seeds.view(-1, 1, 1, 1))
        gradient = Image.linear_gradient("L").convert("RGB")
        return [gradient.rotate(90 * int(seed)) for seed in seeds]

    monkeypatch.setattr(pipeline_utils, "generate", generate)
    return pipeline


def test_prompts_fill_calls_of_the_batch_size_each_with_the_next_seed(pipeline):
    args = SimpleNamespace(prompt=["own"], num_images_per_prompt=2, seed=5)
    result = quality.run(pipeline, args, ["a", "b", "c"])
    assert pipeline.calls == [(["a", "b"], 1, 5), (["c", "a"], 1, 7)]
    assert result.latents.flatten().tolist() == [5, 6, 7] and len(result.images) == 3
    assert args.prompt == ["own"] and args.seed == 5


def test_a_broken_run_is_no_result_and_leaves_the_decoder_as_it_was(pipeline):
    decode, pipeline.value = pipeline.vae.decode, math.nan
    args = SimpleNamespace(prompt=["own"], num_images_per_prompt=1, seed=1)
    with pytest.raises(RuntimeError, match="not finite"):
        quality.run(pipeline, args)
    assert pipeline.vae.decode is decode


@pytest.mark.parametrize(
    ("source", "kind", "key"),
    [
        ("bundled", "dev", "tiny"),
        ("bundled", "kontext", "tiny edits"),
        ("hub", "schnell", "pictures"),
        ("hub", "kontext", "edits"),
    ],
)
def test_a_checkpoint_gets_prompts_that_it_understands(source, kind, key):
    args = SimpleNamespace(checkpoint=SimpleNamespace(source=source, kind=kind))
    assert quality_prompts(args) == list(QUALITY[key])


def test_psnr_is_that_of_its_definition():
    assert quality.psnr_db(grey(100), grey(0)) == pytest.approx(20 * math.log10(255 / 100))
    assert quality.psnr_db(grey(0), grey(100)) == pytest.approx(20 * math.log10(255 / 100))
    assert quality.psnr_db(grey(7), grey(7)) == math.inf


def test_the_mean_and_the_worst_are_those_of_the_pictures_that_differ():
    latents = torch.tensor([3.0, 4.0])
    references = quality.Result([grey(100)] * 3, latents)
    scores = quality.compare(quality.Result([grey(100), grey(110), grey(200)], latents), references)
    near, far = 20 * math.log10(255 / 10), 20 * math.log10(255 / 100)
    assert scores["psnr_db_mean"] == pytest.approx((near + far) / 2, abs=0.01)
    assert scores["psnr_db_worst"] == pytest.approx(far, abs=0.01)
    assert scores["identical_images"] == 1 and scores["images"] == 3
    assert scores["ssim_worst"] == pytest.approx(0.8, abs=0.01)
    assert 0.8 < scores["ssim_mean"] < 1
    assert scores["latents_relative_l2"] == 0 and scores["latents_cosine"] == pytest.approx(1)


def test_latents_are_compared_by_length_and_by_angle():
    reference = torch.tensor([3.0, 4.0])
    assert quality.relative_l2(2 * reference, reference) == pytest.approx(1)
    assert quality.cosine(2 * reference, reference) == pytest.approx(1)
    assert quality.cosine(torch.tensor([-4.0, 3.0]), reference) == pytest.approx(0, abs=1e-9)


def test_lossless_is_a_bound_not_a_word():
    scores = {"fp32_relative_l2": 0.011, "eager_fp32_relative_l2": 0.01}
    assert quality.lossless_problem(scores) == ""
    scores["fp32_relative_l2"] = 0.013
    assert "expected at most 1.25 times" in quality.lossless_problem(scores)
    assert quality.lossless_problem({"fp32_relative_l2": None}) == ""


def test_ssim_knows_equal_noisy_and_shifted():
    gradient = Image.linear_gradient("L").convert("RGB")
    noisy = Image.effect_noise((256, 256), 40).convert("RGB")
    assert quality.ssim(gradient, gradient) == pytest.approx(1.0)
    assert quality.ssim(gradient, Image.blend(gradient, noisy, 0.1)) > 0.3
    assert quality.ssim(gradient, noisy) < 0.2


def test_pictures_of_two_sizes_are_refused_where_numpy_would_stretch_one():
    with pytest.raises(ValueError, match="differ in shape"):
        quality.psnr_db(grey(8), Image.new("RGB", (1, 1), (8, 8, 8)))

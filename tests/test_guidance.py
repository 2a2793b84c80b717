"""True classifier-free guidance: only if asked for, diffusers' own picture, counted as it costs."""

import json

import pytest
import torch
from conftest import make_args, optimized

from utils import card, quality, roofline
from utils.errors import UserError

CFG = ("--true_cfg_scale", "3", "--negative_prompt", "a large blue ring")
SHORT = ("--num_inference_steps", "3", "--max_sequence_length", "64")
DEV = ("--ckpt", "tiny-dev", *SHORT)


@pytest.mark.parametrize("call", [DEV, SHORT], ids=["dev", "schnell"])
@pytest.mark.parametrize("prompts", [1, 2])
def test_the_picture_is_plain_diffusers(call, prompts):
    from diffusers import FluxPipeline

    from utils.pipeline_utils import generate, load_pipeline

    texts = ["a red circle on a blue background", "a small white star at the top"][:prompts]
    words = [word for text in texts for word in ("--prompt", text)]
    args = make_args("--device", "cpu", *call, *CFG, *words)
    pipeline = load_pipeline(args)
    found = generate(pipeline, args, output_type="latent")
    plain = FluxPipeline.from_pretrained(args.checkpoint.path, dtype=torch.bfloat16)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        texts,
        negative_prompt=["a large blue ring"] * prompts,
        true_cfg_scale=3.0,
        guidance_scale=3.5,
        height=128,
        width=128,
        num_inference_steps=3,
        max_sequence_length=64,
        generator=[torch.Generator("cpu").manual_seed(k) for k in range(prompts)],
        output_type="latent",
    ).images
    assert torch.equal(found, expected)
    without = make_args("--device", "cpu", *call, *words)
    assert quality.relative_l2(generate(pipeline, without, output_type="latent"), found) > 0.05


@pytest.mark.parametrize(
    "mode",
    [
        ("disabled",),
        pytest.param(("compile", "--compile_scope", "blocks"), marks=pytest.mark.slow),
        pytest.param(("export_aoti",), marks=pytest.mark.slow),
    ],
    ids=lambda mode: mode[0],
)
def test_every_step_keeps_its_picture(mode, reference, tmp_path):
    """In every mode: the second forward is a call of the same kind, and makes nothing anew."""
    from utils.calls import only_known_calls

    cache = ("--cache-dir", str(tmp_path / "cache"))
    pipeline, args = optimized(*DEV, *CFG, *cache, "--compile_export_mode", *mode)
    with only_known_calls():
        found = quality.run(pipeline, args)
    assert quality.compare(found, reference(*DEV, *CFG))["psnr_db_mean"] > 35


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (CFG[:2], "--true_cfg_scale 3: has no effect without --negative_prompt"),
        (("--negative_prompt", "x" * 61), f"--negative_prompt '{'x' * 60}...': has no effect"),
        (CFG[2:], "--negative_prompt 'a large blue ring': has no effect without --true_cfg_scale"),
        (("--true_cfg_scale", "1", *CFG[2:]), "expected a finite number above 1"),
        (("--true_cfg_scale", "nan", *CFG[2:]), "nan: expected a finite number above 1"),
        (("--modulation_once", *CFG), "--modulation_once: its loop calls the transformer once"),
        (("--step_mask", "fast", *CFG), "the mask counts one forward a step"),
        (
            ("--cache_dit_config", "cache_config.yaml", *CFG),
            "one cache would mix the two forwards",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, expected):
    with pytest.raises(UserError) as refusal:
        make_args("--device", "cpu", "--ckpt", "tiny-dev", *flags)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_it_is_told_and_counted():
    one, two = (make_args("--device", "cpu", *DEV, *flags) for flags in ((), CFG))
    assert "true CFG 3 away from 'a large blue ring'" in card.render(two)
    assert card.call(two)["true_cfg_scale"] == 3 and "true_cfg_scale" not in card.call(one)
    rows = [roofline.rows_of(roofline.work_of(args), None, {}) for args in (one, two)]
    for stage in ("prompt_encoding", "denoising_step", "decoding"):
        assert rows[0][stage]["flop"] == rows[1][stage]["flop"]  # of one run
    once = rows[0]["prompt_encoding"]["flop"] + 3 * rows[0]["denoising_step"]["flop"]
    assert rows[1]["call"]["flop"] - rows[0]["call"]["flop"] == once


def test_an_image_of_a_batch_is_told_like_its_single_image(tmp_path):
    from PIL import Image

    from utils.images import save_images

    file, two = str(tmp_path / "x.png"), ("--prompt", "a ring", "--prompt", "a star")
    args = make_args("--device", "cpu", *DEV, *CFG, *two, "--output-file", file)
    save_images([Image.new("RGB", (16, 16))] * 2, args)
    for k in range(2):
        with Image.open(tmp_path / f"x_{k}.png") as image:
            assert json.loads(image.text["call"])["negative_prompt"] == ["a large blue ring"]

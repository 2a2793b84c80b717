"""The tiny pipeline: its files, its tokenizers, its checker, and that it draws what it is told."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny_flux import evaluate
from tiny_flux.checker import check_image, read_image
from tiny_flux.scenes import (
    COLOURS,
    SHAPES,
    Scene,
    caption,
    describe,
    held_out,
    parse,
    render,
    sample_jitter,
    sample_scene,
)

CKPT = Path(__file__).parent.parent / "tiny_flux" / "tiny-schnell"
STRANGE = ["", "Ünïcode ☃ 漢字", "A RED Circle!", "a  b\n c", "x" * 900, "<|endoftext|> </s>", "\0"]


@pytest.fixture(scope="module")
def pipe():
    import torch
    from diffusers import FluxPipeline

    pipe = FluxPipeline.from_pretrained(CKPT, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _scenes(count: int, seed: int, of_held_out: bool = False) -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, of_held_out) for _ in range(count)]


def test_captions_are_read_back():
    rng = random.Random(1)
    for scene in _scenes(500, 1):
        assert parse(describe(scene)) == scene
        assert parse(caption(scene, rng)) == scene
    assert parse("a red circle on a blue background") == Scene("circle", "red", "blue")
    assert parse("a small red circle at the top left on a blue background") == Scene(
        "circle", "red", "blue", "small", "top left"
    )
    assert parse("a white star").background == "black"
    assert parse("hello") is None


def test_held_out_triples_are_disjoint_and_about_a_tenth():
    triples = [Scene(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if b != c]
    kept = [t for t in triples if held_out(t)]
    assert 0.08 < len(kept) / len(triples) < 0.12
    for name, values in (("shape", SHAPES), ("colour", COLOURS), ("background", COLOURS)):
        assert {getattr(t, name) for t in kept} == set(values)
    assert not any(held_out(s) for s in _scenes(500, 2))
    assert all(held_out(s) for s in _scenes(500, 3, of_held_out=True))
    assert all(held_out(scene) for _, scene in evaluate.held_out_prompts(200, 2026))


def test_checker_reads_all_of_the_renderers_pictures():
    rng = random.Random(4)
    for scene in _scenes(75, 4):
        assert all(check_image(render(scene, sample_jitter(rng)), scene).values()), scene


def test_checker_reads_nothing_in_noise_blanks_and_blobs():
    rng = np.random.default_rng(0)
    for scene in _scenes(24, 5):
        noise = Image.fromarray(rng.integers(0, 256, (128, 128, 3)).astype(np.uint8))
        blobs = noise.resize((6, 6)).resize((128, 128), Image.Resampling.BICUBIC)
        blank = Image.new("RGB", (128, 128), COLOURS[scene.background])
        for picture in (noise, blobs, blank):
            assert read_image(picture) is None
            assert not any(check_image(picture, scene).values())


def test_checker_tells_scenes_apart():
    rng = random.Random(6)
    scenes = _scenes(40, 6)
    right = [check_image(render(a, sample_jitter(rng)), b) for a, b in itertools.pairwise(scenes)]
    for name in ("shape", "colour", "background", "position"):
        assert np.mean([r[name] for r in right]) < 0.4
    circle = render(Scene("circle", "red", "blue"))
    assert not check_image(circle, Scene("square", "red", "blue"))["shape"]


def test_layout_and_size(pipe):
    files = [f for f in CKPT.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 11_000_000
    assert {d.name for d in CKPT.iterdir() if d.is_dir()} == {
        "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer",
        "vae",
    }  # fmt: skip
    assert not any("_name_or_path" in f.read_text() for f in CKPT.glob("*/config.json"))
    names = {name: type(part).__name__ for name, part in pipe.components.items()}
    assert names["transformer"] == "FluxTransformer2DModel" and names["vae"] == "AutoencoderKL"
    assert names["text_encoder"] == "CLIPTextModel" and names["text_encoder_2"] == "T5EncoderModel"
    assert pipe.transformer.config.guidance_embeds is False
    assert pipe.transformer.config.attention_head_dim == 128
    assert pipe.vae.config.latent_channels == 16 and pipe.vae_scale_factor == 8
    assert pipe.scheduler.config.shift == 1.0
    assert pipe.tokenizer_max_length == 77 and pipe.tokenizer_2.model_max_length == 512
    assert pipe.text_encoder.config.eos_token_id == pipe.tokenizer.eos_token_id != 2


def test_tokenizers_survive_saving(pipe, tmp_path):
    from tiny_flux.words import build_clip_tokenizer, build_t5_tokenizer, caption_words

    words = caption_words()
    rng = random.Random(7)
    texts = STRANGE + [caption(scene, rng) for scene in _scenes(100, 7)]
    for name, built in (
        ("tokenizer", build_clip_tokenizer(words)),
        ("tokenizer_2", build_t5_tokenizer(words)),
    ):
        shipped = getattr(pipe, name)
        shipped.save_pretrained(tmp_path / name)
        again = type(shipped).from_pretrained(tmp_path / name)
        for text in texts:
            assert shipped(text).input_ids == built(text).input_ids == again(text).input_ids
        assert shipped.decode(shipped(describe(Scene("star", "red", "blue"))).input_ids[:-1])


def test_it_draws_held_out_prompts(pipe):
    prompts = evaluate.held_out_prompts(10, seed=8)
    pictures = evaluate.draw(pipe, [text for text, _ in prompts], 4, 256, seed=8)
    checks = [check_image(p, scene) for p, (_, scene) in zip(pictures, prompts, strict=True)]
    for name in ("colour", "background", "position"):
        assert sum(check[name] for check in checks) >= 9, name
    assert sum(check["shape"] for check in checks) >= 8


def test_the_seed_decides_the_picture(pipe):
    text = "a red circle on a blue background"
    one, same, other = (evaluate.draw(pipe, [text], 4, 256, seed)[0] for seed in (1, 1, 2))
    assert one.tobytes() == same.tobytes() != other.tobytes()
    assert evaluate.psnr_db(one, other) > 15
    assert all(check_image(one, parse(text)).values())


def test_strange_prompts_draw_something(pipe):
    assert len(evaluate.draw(pipe, STRANGE, 1, 256, seed=0)) == len(STRANGE)


def test_the_readme_shows_the_committed_evaluation():
    folder = CKPT.parent
    rows = json.loads((folder / "evaluation.json").read_text())
    assert evaluate.table(rows) in (folder / "README.md").read_text()
    four = next(row for row in rows if (row["steps"], row["tokens"]) == (4, 256))
    assert min(four["colour"], four["background"]) >= 98
    assert four["shape"] >= 92 and four["position"] >= 90

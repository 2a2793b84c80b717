"""tiny-dev as it is committed: its layout, what it draws and edits, and what its README says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_flux import evaluate, evaluate_dev
from tiny_flux.edits import BEGUN, MAX_DRIFT, MAX_SHIFT_PX, TAUGHT
from tiny_flux.scenes import COLOURS, SHAPES
from utils.artifacts import files_below

FOLDER = Path(__file__).parent.parent / "tiny_flux"
CKPT = FOLDER / "tiny-dev"
STEPS, TOKENS = 14, 128  # half and a quarter of its own: a sixth of the time, hardly worse


def _load(kind: str):
    import diffusers
    import torch

    pipe = getattr(diffusers, kind).from_pretrained(CKPT, dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def flux():
    return _load("FluxPipeline")


@pytest.fixture(scope="module")
def kontext():
    return _load("FluxKontextPipeline")


def test_layout_and_size(flux, kontext):
    import safetensors

    assert sum(f.stat().st_size for f in files_below(CKPT, "*") if f.is_file()) <= 11_000_000
    assert not any("_name_or_path" in f.read_text() for f in CKPT.glob("*/config.json"))
    for file in files_below(CKPT, "*.safetensors"):
        with safetensors.safe_open(file, "pt") as weights:
            names = weights.keys()
            assert {weights.get_slice(name).get_dtype() for name in names} == {"BF16"}, file
    config = flux.transformer.config
    assert config.guidance_embeds is True and config.attention_head_dim == 128
    assert (config.joint_attention_dim, config.pooled_projection_dim) == (64, 32)
    assert flux.text_encoder.config.hidden_size == 32 and flux.text_encoder_2.config.d_ff == 96
    assert flux.scheduler.config.use_dynamic_shifting is True
    assert flux.tokenizer_max_length == 77 and flux.tokenizer_2.model_max_length == 512
    assert kontext.transformer.config == config


def test_its_tokenizers_are_those_of_the_training(flux):
    from tiny_flux.words import build_clip_tokenizer, build_t5_tokenizer, edit_words

    words = edit_words()
    assert flux.tokenizer.get_vocab() == build_clip_tokenizer(words).get_vocab()
    assert flux.tokenizer_2.get_vocab() == build_t5_tokenizer(words).get_vocab()


def test_it_draws_held_out_prompts(flux):
    prompts = evaluate.held_out_prompts(20, seed=11)
    right = {}
    for guidance in (1.0, evaluate_dev.GUIDANCE):
        texts = [text for text, _ in prompts]
        pictures = evaluate.draw(flux, texts, STEPS, TOKENS, 11, guidance)
        right[guidance] = evaluate.score(pictures, [scene for _, scene in prompts])["all"]
    assert right[evaluate_dev.GUIDANCE] >= 75 > right[1.0], right


def test_it_edits_held_out_pictures(kontext, monkeypatch):
    monkeypatch.setattr(evaluate_dev, "STEPS", STEPS)
    monkeypatch.setattr(evaluate_dev, "TOKENS", TOKENS)
    tasks = evaluate_dev.held_out_edits(20, seed=12)
    rows, _ = evaluate_dev.editing_rows(kontext, tasks, seed=12, guidances=(2.5,))
    right = {row["pictures"]: row["right"] for row in rows}
    assert right["ideal, through the autoencoder"] >= 90
    assert right["guidance 2.5"] >= 65, right  # of 20; the goal is in a test of the evaluation


def test_the_readme_shows_the_committed_evaluation():
    rows = json.loads((FOLDER / "evaluation-dev.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert evaluate_dev.drawing_table(rows["drawing"]) in readme
    assert evaluate_dev.editing_table(rows["editing"]) in readme
    right = {row["pictures"]: row["right"] for row in rows["editing"]}
    assert right["ideal edits"] == 100 and right["sources, unedited"] == 0
    for sheet in ("guidance.webp", "edits.webp"):
        assert f"({sheet})" in readme and (FOLDER / sheet).stat().st_size <= 80_000


def test_guidance_sharpens_what_it_draws():
    rows = json.loads((FOLDER / "evaluation-dev.json").read_text())["drawing"]
    default = {"steps": 28, "tokens": 512}.items()
    right = {row["guidance"]: row["all"] for row in rows if default <= row.items()}
    assert right[evaluate_dev.GUIDANCE] >= 85 > 60 > right[1.0]


def test_nine_edits_in_ten_are_right():
    """As the checker sees it; to the pixel fewer, which the README says."""
    rows = json.loads((FOLDER / "evaluation-dev.json").read_text())["editing"]
    default = next(row for row in rows if row["pictures"] == "guidance 2.5")
    assert default["all"] >= 90 and default["right"] >= 80
    kinds = default["kinds"]
    assert set(kinds) >= set(TAUGHT) and all(kinds[kind]["all"] >= 90 for kind in TAUGHT)


def test_the_readme_names_the_bounds_of_a_right_edit():
    readme = " ".join((FOLDER / "README.md").read_text().split())
    assert f"{MAX_DRIFT:g} levels" in readme and f"{MAX_SHIFT_PX:g} px" in readme
    assert all(word in readme for word in (*TAUGHT, *BEGUN, *SHAPES, *COLOURS))

"""tiny-dev: its edits, their judge, its vocabulary, its start, its training, and what it does."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiny_flux import evaluate, evaluate_dev
from tiny_flux.checker import ATTRIBUTES, read_image
from tiny_flux.edits import (
    BEGUN,
    KINDS,
    MAX_DRIFT,
    MAX_SHIFT_PX,
    TAUGHT,
    Edit,
    instruction,
    judge,
    obey,
    sample_edit,
    sample_nameless,
)
from tiny_flux.scenes import COLOURS, SHAPES, Jitter, Scene, caption, held_out, render, sample_scene

FOLDER = Path(__file__).parent.parent / "tiny_flux"
CKPT = FOLDER / "tiny-dev"
TRAIN = ("--no-compile", "--pool", "32", "--steps-teacher", "2")


def _edits(count: int, seed: int, of_held_out: bool = False) -> list[Edit]:
    rng = random.Random(seed)
    return [sample_edit(rng, of_held_out) for _ in range(count)]


@pytest.mark.parametrize("of_held_out", [False, True])
def test_instructions_are_read_back(of_held_out):
    rng = random.Random(1)
    for edit in _edits(1000, 1, of_held_out):
        text = instruction(edit, rng)
        assert obey(text, edit.before) == edit.after, text


def test_every_kind_has_several_wordings():
    rng = random.Random(2)
    scene = Scene("circle", "red", "blue")
    for kind, values in KINDS.items():
        after = replace(scene, **{kind: next(v for v in values if v != getattr(scene, kind))})
        texts = {instruction(Edit(kind, scene, after), rng).lower() for _ in range(200)}
        assert len(texts) >= 10, (kind, texts)
    assert obey("hello", scene) is None


@pytest.mark.parametrize("of_held_out", [False, True])
def test_an_edit_changes_one_attribute(of_held_out):
    edits = _edits(1000, 3, of_held_out)
    for edit in edits:
        changed = [n for n in ATTRIBUTES if getattr(edit.before, n) != getattr(edit.after, n)]
        assert changed == [edit.kind] and edit.after.colour != edit.after.background
    for kind in KINDS:
        assert sum(edit.kind == kind for edit in edits) > 100, kind


def test_training_edits_keep_away_from_held_out_triples():
    assert not any(held_out(e.before) or held_out(e.after) for e in _edits(1000, 4))
    for edit in _edits(1000, 4, of_held_out=True):
        assert held_out(edit.after)
        # no two held-out triples differ in shape or colour alone
        assert held_out(edit.before) or edit.kind in ("shape", "colour", "background")


def test_nameless_edits_are_clear_read_back_and_no_held_out_triple():
    rng, polygons, colours = random.Random(6), 0, 0
    for _ in range(500):
        edit = sample_nameless(rng, TAUGHT + BEGUN)
        changed = [n for n in ATTRIBUTES if getattr(edit.before, n) != getattr(edit.after, n)]
        assert changed == [edit.kind]
        text = instruction(edit, rng)
        assert obey(text, edit.before) == edit.after, text
        assert getattr(edit.after, edit.kind) in KINDS[edit.kind]
        polygons += edit.after.shape not in SHAPES
        colours += edit.after.background not in COLOURS
        made = read_image(render(edit.after))
        if edit.after.shape in SHAPES and made and made.scene.shape == edit.after.shape:
            assert not held_out(made.scene), edit
    assert 100 < polygons < 300 and 200 < colours < 450


def test_edits_depend_on_their_generator_alone():
    for of_held_out in (False, True):
        one, again = (random.Random(5) for _ in range(2))
        for _ in range(100):
            edits = [sample_edit(rng, of_held_out) for rng in (one, again)]
            assert edits[0] == edits[1]
            assert instruction(edits[0], one) == instruction(edits[1], again)
    one, again = (evaluate_dev.held_out_edits(8, 5) for _ in range(2))
    assert one == again != evaluate_dev.held_out_edits(8, 6)
    assert [task.edit.kind for task in one] == 4 * list(TAUGHT)
    assert {task.edit.kind for task in evaluate_dev.held_out_edits(4, 5, BEGUN)} == set(BEGUN)


def test_ideal_edits_are_right_and_sources_and_other_jitters_wrong():
    tasks = evaluate_dev.held_out_edits(50, 7)
    ideal = evaluate_dev.score_edits([task.ideal for task in tasks], tasks)
    assert ideal["right"] == 100 and ideal["drift"] == ideal["shift_px"] == 0
    assert evaluate_dev.score_edits([task.source for task in tasks], tasks)["right"] == 0
    other = evaluate_dev.score_edits([task.other for task in tasks], tasks)
    assert other["all"] == 100 and other["right"] < 20


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_that_moves_or_tints_the_rest_is_wrong(kind):
    for edit in [edit for edit in _edits(100, 8) if edit.kind == kind][:5]:
        source, ideal = render(edit.before), render(edit.after)

        def verdict(picture: Image.Image):
            return judge(picture, edit, source, ideal)  # noqa: B023

        assert verdict(ideal).right
        moved = verdict(render(edit.after, Jitter(dx=1.5, dy=1.5)))
        assert all(moved.attributes.values()) and moved.shift_px > MAX_SHIFT_PX and not moved.right
        pixels = np.asarray(ideal).astype(int)
        away = np.where(pixels < 128, MAX_DRIFT + 6, -MAX_DRIFT - 6)
        tinted = verdict(Image.fromarray((pixels + away).astype(np.uint8)))
        assert tinted.shift_px < MAX_SHIFT_PX and tinted.drift > MAX_DRIFT and not tinted.right


def test_a_picture_of_nothing_is_no_edit():
    task = evaluate_dev.held_out_edits(1, 9)[0]
    blank = Image.new("RGB", (128, 128), COLOURS[task.edit.after.background])
    verdict = judge(blank, task.edit, task.source, task.ideal)
    assert not any(verdict.attributes.values()) and verdict.shift_px == 128 and not verdict.right


def test_every_word_is_one_token():
    from tiny_flux.words import build_clip_tokenizer, build_t5_tokenizer, caption_words, edit_words

    words = edit_words()
    t5, clip = build_t5_tokenizer(words), build_clip_tokenizer(words)
    assert set(caption_words()) < set(words)
    rng = random.Random(10)
    texts = [instruction(edit, rng) for edit in _edits(500, 10) + _edits(500, 10, True)]
    texts += [caption(sample_scene(rng), rng) for _ in range(500)]
    for text in texts:
        ids = t5(text).input_ids
        assert t5.unk_token_id not in ids, text
        parts = text.replace(".", " .").replace(",", " ,").split()
        assert len(ids) == len(parts) + 1, text
        assert len(clip(text).input_ids) == len(parts) + 2, text


@pytest.fixture(scope="module")
def start():
    """Give tiny-schnell, tiny-dev's start, and the map from its CLIP's width to the old one."""
    import torch
    from diffusers import FluxPipeline

    from tiny_flux import grow

    back = torch.nn.Linear(grow.CLIP_WIDTH, 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grow, "_distil_clip", lambda *args: back)
        schnell = FluxPipeline.from_pretrained(FOLDER / "tiny-schnell", dtype=torch.float32)
        plain = FluxPipeline.from_pretrained(FOLDER / "tiny-schnell", dtype=torch.float32)
        yield schnell, grow.teach_instructions(plain, random.Random(0)), back


def test_the_start_is_tiny_schnell_behind_another_clip(start):
    import torch

    schnell, dev, back = start
    old, new = schnell.transformer.state_dict(), dev.transformer.state_dict()
    folded = {f"time_text_embed.text_embedder.linear_1.{part}" for part in ("weight", "bias")}
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old.keys() - folded)
    pooled = torch.randn(4, back.in_features)
    found = dev.transformer.time_text_embed.text_embedder(pooled)
    expected = schnell.transformer.time_text_embed.text_embedder(back(pooled))
    torch.testing.assert_close(found, expected)
    assert dev.scheduler.config.use_dynamic_shifting and dev.scheduler.config.shift == 3.0
    for name, value in schnell.vae.state_dict().items():
        assert torch.equal(dev.vae.state_dict()[name], value)


def test_known_words_keep_their_t5_rows(start):
    import torch

    schnell, dev, _ = start
    old_ids, new_ids = schnell.tokenizer_2.get_vocab(), dev.tokenizer_2.get_vocab()
    assert set(old_ids) < set(new_ids) and {"▁make", "▁bigger", "▁replace"} <= set(new_ids)
    old, new = schnell.text_encoder_2.shared.weight, dev.text_encoder_2.shared.weight
    for token, row in old_ids.items():
        assert torch.equal(old[row], new[new_ids[token]]), token
    for before, after in zip(
        schnell.text_encoder_2.encoder.block, dev.text_encoder_2.encoder.block, strict=True
    ):
        for name, value in before.layer[0].state_dict().items():
            assert torch.equal(value, after.layer[0].state_dict()[name]), name
        rows = {tuple(row) for row in before.layer[1].DenseReluDense.wi_0.weight.tolist()}
        kept = after.layer[1].DenseReluDense.wi_0.weight.tolist()
        assert all(tuple(row) in rows for row in kept) and len(kept) < len(rows)


def test_guidance_is_ignored_at_first(start):
    import torch

    from tiny_flux.grow import with_guidance
    from tiny_flux.train_flow import predict

    teacher = start[1].transformer
    student = with_guidance(teacher)
    torch.manual_seed(0)
    inputs = torch.randn(2, 64, 64), torch.tensor([0.9, 0.3]), torch.randn(2, 32)
    tokens, reference = torch.randn(2, 16, 64), torch.randn(2, 64, 64)
    with torch.no_grad():
        expected = predict(teacher, *inputs, tokens, reference)
        for scale in (1.0, 5.0):
            found = predict(student, *inputs, tokens, reference, torch.full((2,), scale))
            torch.testing.assert_close(found, expected)
    assert expected.std() > 0.1


def test_training_runs_and_resumes(tmp_path, monkeypatch):
    """In this process, with next to no distillation of CLIP."""
    import torch

    from tiny_flux import grow, train_dev

    out, work = tmp_path / "out", tmp_path / "work"
    monkeypatch.setattr(grow, "CLIP_STEPS", 2)
    monkeypatch.setattr(train_dev, "launch", lambda work, procs, *args: work(0, 1, *args))
    for steps in (2, 3):
        command = ["train_dev", *TRAIN, "--steps-student", str(steps), "--procs", "1"]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(out), "--work", str(work)])
        train_dev.main()
        assert torch.load(work / "teacher.pt")["step"] == 2
        assert torch.load(work / "student.pt")["step"] == steps
    assert json.loads((out / "transformer" / "config.json").read_text())["guidance_embeds"] is True


@pytest.mark.slow
def test_the_training_command(tmp_path):
    command = [sys.executable, "-m", "tiny_flux.train_dev", *TRAIN, "--steps-student", "2"]
    command += ["--procs", "2", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    root = FOLDER.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "done: " in done.stdout, done.stderr[-2000:]
    assert (tmp_path / "out" / "model_index.json").exists()


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

    assert sum(f.stat().st_size for f in CKPT.rglob("*") if f.is_file()) <= 11_000_000
    assert not any("_name_or_path" in f.read_text() for f in CKPT.glob("*/config.json"))
    for file in CKPT.rglob("*.safetensors"):
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
        pictures = evaluate.draw(flux, [text for text, _ in prompts], 28, 512, 11, guidance)
        right[guidance] = evaluate.score(pictures, [scene for _, scene in prompts])["all"]
    assert right[evaluate_dev.GUIDANCE] >= 75 > right[1.0], right


def test_it_edits_held_out_pictures(kontext):
    tasks = evaluate_dev.held_out_edits(20, seed=12)
    rows, _ = evaluate_dev.editing_rows(kontext, tasks, seed=12, guidances=(2.5,))
    right = {row["pictures"]: row["right"] for row in rows}
    assert right["ideal, through the autoencoder"] >= 90
    assert right["guidance 2.5"] >= 50, right  # the goal is in a test of the evaluation


def test_the_readme_shows_the_committed_evaluation():
    rows = json.loads((FOLDER / "evaluation-dev.json").read_text())
    readme = (FOLDER / "README.md").read_text()
    assert evaluate_dev.drawing_table(rows["drawing"]) in readme
    assert evaluate_dev.editing_table(rows["editing"]) in readme
    right = {row["pictures"]: row["right"] for row in rows["editing"]}
    assert right["ideal edits"] == 100 and right["sources, unedited"] == 0
    for sheet in ("guidance.png", "edits.png"):
        assert f"({sheet})" in readme and (FOLDER / sheet).stat().st_size <= 350_000


def test_guidance_sharpens_what_it_draws():
    rows = json.loads((FOLDER / "evaluation-dev.json").read_text())["drawing"]
    default = {"steps": 28, "tokens": 512}.items()
    right = {row["guidance"]: row["all"] for row in rows if default <= row.items()}
    assert right[evaluate_dev.GUIDANCE] >= 85 > 60 > right[1.0]


@pytest.mark.xfail(strict=True, reason="still being learnt: tiny_flux/README.md")
def test_nine_edits_in_ten_are_right():
    rows = json.loads((FOLDER / "evaluation-dev.json").read_text())["editing"]
    assert next(row["right"] for row in rows if row["pictures"] == "guidance 2.5") >= 90


def test_the_readme_names_the_bounds_of_a_right_edit():
    readme = " ".join((FOLDER / "README.md").read_text().split())
    assert f"{MAX_DRIFT:g} levels" in readme and f"{MAX_SHIFT_PX:g} px" in readme
    assert all(word in readme for word in (*TAUGHT, *BEGUN, *SHAPES, *COLOURS))

"""tiny-dev's start, made of tiny-schnell, and its training."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_flux.scenes import Scene, render

FOLDER = Path(__file__).parent.parent / "tiny_flux"
TRAIN = ("--no-compile", "--pool", "32", "--steps-teacher", "2")


def test_tokens_of_the_shape_weigh_more():
    from tiny_flux.train_dev import SHAPE_WEIGHT, shape_weights, weighted_error

    weights = shape_weights(render(Scene("circle", "red", "blue", "small", "top left")))
    heavy = (weights == SHAPE_WEIGHT).reshape(8, 8)
    assert ((weights == 1) | (weights == SHAPE_WEIGHT)).all()
    assert heavy[:4, :4].sum() == heavy.sum() and 4 <= heavy.sum() <= 16
    assert heavy[2, 2] and not heavy[7].any()

    import torch

    wanted = torch.zeros(1, 64, 64)
    on, beside = (mask.reshape(1, 64, 1) * torch.ones_like(wanted) for mask in (heavy, ~heavy))
    total = SHAPE_WEIGHT * heavy.sum() + (~heavy).sum()
    for made, expected in ((on, SHAPE_WEIGHT * heavy.sum()), (beside, (~heavy).sum())):
        found = weighted_error(made, wanted, weights[None])
        torch.testing.assert_close(found, expected / total)


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
    """In this process, with small batches and next to no distillation of CLIP."""
    import torch

    from tiny_flux import grow, train_dev

    out, work = tmp_path / "out", tmp_path / "work"
    monkeypatch.setattr(grow, "CLIP_STEPS", 2)
    for batch in ("EDIT_TOKENS", "CAPTION_TOKENS", "TEACHER_TOKENS"):
        monkeypatch.setattr(train_dev, batch, 2 * 152)
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

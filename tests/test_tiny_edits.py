"""Edits: what they change, their words, their judge, and how much each token of one weighs."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tiny_flux import evaluate_dev
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
    for _ in range(200):
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
    assert 40 < polygons < 120 and 80 < colours < 180


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

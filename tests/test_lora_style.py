"""The bundled LoRA: its style is there, shapes can still be read, and its training runs."""

import json

import pytest
from conftest import make_args
from PIL import Image

from tiny_flux.checker import check_image
from tiny_flux.evaluate import held_out_prompts
from tiny_flux.train_lora import OUT, at_night, table

COUNT = 12


@pytest.fixture(scope="module")
def drawn():
    """Give held-out scenes and their pictures without and with the LoRA, through every step."""
    from utils.pipeline_utils import generate, load_pipeline, optimize

    prompts = held_out_prompts(COUNT, 7)
    words = [word for text, _ in prompts for word in ("--prompt", text)]
    pictures = []
    for flags in ((), ("--lora", str(OUT))):
        args = make_args("--device", "cpu", "--ckpt", "tiny-schnell", *words, *flags)
        pictures.append(generate(optimize(load_pipeline(args), args), args))
    return [scene for _, scene in prompts], *pictures


def right(pictures, scenes, names):
    checks = [check_image(p, s) for p, s in zip(pictures, scenes, strict=True)]
    return sum(all(check[name] for name in names) for check in checks)


def test_the_style_is_there_and_shapes_can_be_read(drawn):
    scenes, without, with_it = drawn
    nights = [at_night(scene) for scene in scenes]
    told = sum(night == scene for night, scene in zip(nights, scenes, strict=True))
    assert right(with_it, nights, ("background",)) >= 0.6 * COUNT
    assert right(without, nights, ("background",)) <= told + 1
    assert right(with_it, nights, ("position",)) >= 0.6 * COUNT
    assert right(with_it, nights, ("shape",)) >= 0.3 * COUNT  # it was trained for minutes


def test_the_committed_table_is_that_of_its_numbers():
    scores = json.loads(OUT.with_suffix(".json").read_text())["scores"]
    assert table(scores) in (OUT.parent.parent / "README.md").read_text()
    assert scores["with"]["at night"]["background"] > 80
    assert OUT.stat().st_size <= 150_000


def test_the_training_runs(tmp_path, monkeypatch, capsys):
    import sys

    from tiny_flux import train_lora
    from utils import loras

    out = tmp_path / "style.safetensors"
    command = ["train_lora", "--out", str(out), "--steps", "2", "--pool", "8", "--prompts", "2"]
    monkeypatch.setattr(sys, "argv", command)
    train_lora.main()
    args = make_args("--device", "cpu", "--ckpt", "tiny-schnell", "--lora", str(out))
    ranks = loras.adapted(loras.read(args.loras[0]))
    assert len(ranks) == 18 and set(ranks.values()) == {train_lora.RANK}
    with Image.open(out.with_suffix(".webp")) as sheet:
        assert sheet.format == "WEBP"
    assert "at night" in capsys.readouterr().out

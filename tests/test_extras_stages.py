"""Stages: sizes, shares, plain diffusers' pictures, refusals."""

import json
import os

import numpy as np
import pytest
from derived_pieces import OFF, PROMPT, by_diffusers, plain
from PIL import Image

from extras import compare_stages, derived, stages
from utils.errors import UserError

LARGE = ("--height", "192", "--width", "160")


def made(*flags: str) -> tuple:
    from utils.pipeline_utils import load_pipeline
    from utils.prepare import prepare

    args = stages.parse([*OFF, *flags])
    stages.check(args)
    prepare(args)
    run = stages.Stages(load_pipeline(args), args)
    run.optimize()
    return run.run()[0], run


def test_the_stages_are_plain_calls_one_after_the_other():
    import torch

    image, run = made(*LARGE, "--details_strength", "0.75", "--polish_strength", "0.25")
    assert list(run.seconds) == ["structure", "details", "polish"]
    assert min(run.seconds.values()) > 0
    call = {"num_inference_steps": 4, "max_sequence_length": 256, "guidance_scale": 0.0}
    generator = [torch.Generator("cpu").manual_seed(0)]
    image_of_diffusers = plain()(PROMPT, height=96, width=80, generator=generator, **call).images[0]
    for strength in (0.75, 0.25):
        large = image_of_diffusers.resize((160, 192), Image.Resampling.LANCZOS)
        image_of_diffusers = by_diffusers(
            "FluxImg2ImgPipeline", image=large, strength=strength, height=192, width=160
        )[0]
    assert image.size == (160, 192)
    assert image.tobytes() == image_of_diffusers.tobytes()


def test_no_polish_is_two_stages():
    image, run = made("--polish_strength", "0")
    assert list(run.seconds) == ["structure", "details"] and image.size == (128, 128)


def test_shares_add_up():
    text = stages.shares({"structure": 1.0, "details": 2.0, "polish": 1.0})
    assert text == "structure 1.00 s (25%), details 2.00 s (50%), polish 1.00 s (25%)"


def test_the_command_says_where_the_time_went(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out.png"
    monkeypatch.setattr("sys.argv", ["stages", *OFF, "--output-file", str(out)])
    stages.main()
    told = capsys.readouterr().out
    assert "also        structure_scale 0.5, details_strength 0.25, polish_strength 0.1" in told
    assert "stages      structure " in told
    with Image.open(out) as image:
        assert image.text["call"].count("structure ") == 1
        assert np.asarray(image).shape == (128, 128, 3)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--structure_scale", "0"), "--structure_scale 0: expected above 0, at most 1"),
        (("--details_strength", "2"), "--details_strength 2: expected above 0, at most 1"),
        (("--polish_strength", "-1"), "--polish_strength -1: expected 0 to 1"),
        (("--num_images_per_prompt", "2"), "stages make one picture a call"),
        (("--swap_loras",), "--swap_loras: stages make one picture; use --lora alone"),
        (("--ckpt", "tiny-kontext"), "found a kontext checkpoint"),
        (("--modulation_once",), "--modulation_once: not for stages"),
    ],
)
def test_refusals(flags, expected, monkeypatch):
    monkeypatch.setattr(derived, "refuse_foreign", None)  # imports diffusers: it comes last
    with pytest.raises(UserError) as error:
        stages.check(stages.parse(list(flags)))
    assert expected in str(error.value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--pictures", "0"), "--pictures 0: expected 1 or more"),
        (("--sizes", "128", "100"), "--sizes 100: not divisible by 16 (nearest: 96)"),
        (("--height", "256"), "--height: the comparison sets them itself; leave it out"),
        (("--page", "no.md"), "--page no.md: no such file"),
        (
            ("--output-file", "x.png"),
            "--output_file: the comparison keeps no picture; leave it out",
        ),
    ],
)
def test_a_comparison_refuses_before_it_draws(flags, expected):
    with pytest.raises(UserError) as error:
        compare_stages.check(compare_stages.parse(list(flags)))
    assert str(error.value) == expected


@pytest.mark.parametrize("module", [stages, compare_stages])
def test_the_libraries_are_quiet_before_a_check_imports_them(module, monkeypatch):
    monkeypatch.setattr("sys.argv", ["x"])
    monkeypatch.delenv("DIFFUSERS_VERBOSITY", raising=False)

    def check(args):
        raise UserError(os.environ.get("DIFFUSERS_VERBOSITY", "loud"))

    monkeypatch.setattr(stages, "check", check)
    with pytest.raises(UserError, match="error"):
        module.main()


def test_a_comparison_appends_its_rows(tmp_path, monkeypatch):
    """Its --pictures is a count; run_benchmark.py's is a folder, which is looked at."""
    rows = tmp_path / "rows.jsonl"
    few = ("--device", "cpu", "--pictures", "1", "--sizes", "64", "--results", str(rows))
    monkeypatch.setattr("sys.argv", ["compare_stages", *few])
    compare_stages.main()
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert [(row["how"], row["size"], row["pictures"]) for row in found] == [
        ("single", 64, 1),
        ("stages", 64, 1),
    ]

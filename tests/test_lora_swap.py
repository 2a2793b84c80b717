"""LoRAs exchanged in place of compiled code, and the presets of the public few-step LoRAs."""

import pytest
from conftest import make_args, optimized
from lora_pieces import LAYERS, write_lora
from PIL import Image

from utils import acceleration, card, quality
from utils.errors import UserError
from utils.steps import lora

SHORT = ("--max_sequence_length", "64")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give two LoRAs of different ranks, the second on some of the first one's layers."""
    folder = tmp_path_factory.mktemp("loras")
    return (
        write_lora(folder / "a.safetensors"),
        write_lora(folder / "b.safetensors", LAYERS[1:5], seed=1, rank=2),
    )


def swapping(files, *flags):
    both = ("--lora", files[0], "--lora", f"{files[1]}:0.5", "--swap_loras")
    return optimized(*SHORT, *both, *flags)


@pytest.mark.parametrize(
    "mode",
    [
        ("disabled",),
        pytest.param(("compile", "--compile_scope", "blocks"), marks=pytest.mark.slow),
        pytest.param(("compile", "--compile_scope", "full"), marks=pytest.mark.slow),
    ],
    ids=lambda mode: mode[-1],
)
def test_a_swapped_lora_is_a_fresh_one_and_compiles_nothing(files, mode, tmp_path):
    """The quick one has Dynamo's guards around eager code, the slow ones have compiled code."""
    import torch

    from utils.calls import only_known_calls

    cache = ("--cache-dir", str(tmp_path / "cache"))
    pipeline, args = swapping(files, "--compile_export_mode", *mode, *cache)
    if mode == ("disabled",):
        forward = pipeline.transformer.forward
        pipeline.transformer.forward = torch.compile(forward, fullgraph=True, backend="eager")
        quality.run(pipeline, args)
    fresh = [
        quality.run(*optimized(*SHORT, "--lora", text))
        for text in (files[0], f"{files[1]}:0.5", files[0])
    ]
    args.loras.append(args.loras[0])  # and back
    endings, found = [], []
    for ending in lora.turns(pipeline, args):
        endings.append(ending)
        with only_known_calls():
            found.append(quality.run(pipeline, args))
    assert endings == ["_a_1", "_b_0.5", "_a_1"]
    for result, expected in zip(found, fresh, strict=True):
        assert quality.compare(result, expected)["psnr_db_mean"] > 35
    assert quality.compare(fresh[0], fresh[1])["psnr_db_mean"] < 30
    assert quality.compare(found[0], found[2])["psnr_db_worst"] is None


def test_the_card_says_what_stays_off(files):
    args = make_args("--device", "cpu", "--lora", files[0], "--lora", files[1], "--swap_loras")
    assert not args.plan["fused_projections"].is_on and " | b.safe" in card.render(args)
    assert args.plan["fused_projections"].reason.startswith("--swap_loras")
    assert args.plan["quant"].reason.startswith("--swap_loras")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("a",), "expected two --lora or more, found 1"),
        ((), "expected two --lora or more, found 0"),
        (("b", "a"), "b.safetensors does not (context_embedder, ...); give the one with all"),
        (("a", "b", "--compile_export_mode", "export_aoti"), "a package is of one LoRA"),
        (("a", "b", "--modulation_once"), "--modulation_once would not see LoRAs"),
        (("a", "b", "--fused_kernels"), "--fused_kernels would not see LoRAs"),
    ],
)
def test_what_cannot_be_swapped_is_refused_in_one_line(files, flags, expected):
    path = {"a": files[0], "b": files[1]}
    given = [w for flag in flags for w in (("--lora", path[flag]) if flag in path else (flag,))]
    with pytest.raises(UserError) as refusal:
        make_args("--device", "cpu", "--swap_loras", *given)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_the_script_writes_a_picture_for_each(files, tmp_path, monkeypatch, capsys):
    import sys

    import gen_image

    both = ("--lora", files[0], "--lora", files[1], "--swap_loras", *SHORT)
    output = tmp_path / "out.png"
    monkeypatch.setattr(
        sys, "argv", ["gen_image.py", "--device", "cpu", *both, "--output-file", str(output)]
    )
    gen_image.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out_a_1.png", "out_b_1.png"]
    with Image.open(tmp_path / "out_b_1.png") as picture:
        assert picture.text["swapped LoRA"] == "b_1"
    assert "one call each" in capsys.readouterr().out


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Give a LoRA of tiny-dev that stands for a public one."""
    return write_lora(tmp_path_factory.mktemp("public") / "few.safetensors", ckpt="tiny-dev")


DEV = ("--device", "cpu", "--ckpt", "tiny-dev")


@pytest.mark.parametrize("name", acceleration.PRESETS)
def test_a_preset_sets_lora_weight_steps_and_guidance(name, stand_in):
    preset = acceleration.PRESETS[name]
    args = make_args(*DEV, "--acceleration", f"{name}:{stand_in}")
    (found,) = args.loras
    assert (str(found.path), found.weight) == (stand_in, preset.weight)
    assert (args.num_inference_steps, args.guidance_scale) == (preset.steps, 3.5)
    assert preset.steps == int(name.partition("-")[2])
    assert f"preset      {name}:{stand_in}: LoRA {stand_in}:{preset.weight:g}" in card.render(args)


def test_flags_win_over_a_preset_and_the_card_says_so(stand_in):
    given = ("--num_inference_steps", "6", "--lora", f"{stand_in}:0.3")
    args = make_args(*DEV, *given, "--acceleration", f"turbo-8:{stand_in}")
    assert args.num_inference_steps == 6 and [found.weight for found in args.loras] == [0.3]
    text = card.render(args)
    assert "--num_inference_steps 6 given (turbo-8 has 8)" in text
    assert f"--lora {stand_in}:0.3 given" in text and "--guidance_scale 3.5," not in text
    other = make_args(*DEV, "--acceleration", f"turbo-8:{stand_in}", "--guidance_scale", "2")
    assert other.guidance_scale == 2 and "--guidance_scale 2 given (turbo-8 has 3.5)" in (
        card.render(other)
    )


def test_a_presets_picture_is_that_of_its_flags(stand_in):
    by_hand = ("--lora", f"{stand_in}:0.125", "--num_inference_steps", "8")
    one = quality.run(*optimized(*DEV, *SHORT, "--acceleration", f"hyper-8:{stand_in}"))
    two = quality.run(*optimized(*DEV, *SHORT, *by_hand))
    assert quality.compare(one, two)["psnr_db_worst"] is None


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--acceleration", "hyper-8"), "needs Hyper-FLUX.1-dev-8steps-lora.safetensors of "),
        (("--acceleration", "turbo-8"), "download it and give --acceleration turbo-8:PATH"),
        (("--acceleration", "hyper-4"), "unknown preset (expected hyper-8, hyper-16, turbo-8"),
        (("--acceleration", "hyper-8:absent.safetensors"), "absent.safetensors: no such file"),
        (("--ckpt", "tiny-schnell", "--acceleration", "hyper-8"), "made for FLUX.1-dev, found"),
    ],
)
def test_a_preset_that_cannot_be_had_is_refused_in_one_line(flags, expected):
    with pytest.raises(UserError) as refusal:
        make_args(*DEV, *flags)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1

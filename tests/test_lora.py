"""LoRAs: fused before everything else, never silently left out, and part of every identity."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MODES, make_args, optimized
from lora_pieces import DOUBLE, LAYERS, RANK, write_lora
from safetensors.torch import load_file, save_file

from extras.write_gguf import transformer_folder, write
from utils import loras, quality
from utils.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Keep two LoRAs of tiny-schnell."""
    path = tmp_path_factory.mktemp("loras")
    write_lora(path / "a.safetensors")
    write_lora(path / "b.safetensors", LAYERS[2:5], seed=1)
    return path


def plain(args):
    """Run plain diffusers with the LoRAs of these arguments, written out here once more."""
    from utils.pipeline_utils import load_pipeline

    pipeline = load_pipeline(args)
    for at, lora in enumerate(args.loras):
        pipeline.load_lora_weights(str(lora.path), adapter_name=str(at))
    pipeline.set_adapters(
        [str(at) for at in range(len(args.loras))], [lora.weight for lora in args.loras]
    )
    return quality.run(pipeline, args)


def test_a_weight_follows_the_last_colon(tmp_path):
    assert loras.split("a.safetensors:0.125") == ("a.safetensors", 0.125)
    assert loras.split("a.safetensors") == ("a.safetensors", 1.0)
    assert loras.split("a:-1") == ("a", -1.0)
    odd = tmp_path / "a:0.5"
    odd.touch()
    assert loras.split(str(odd)) == (str(odd), 1.0)
    for text, why in (("a:b", "no number"), ("a:nan", "expected a finite"), ("a:", "no number")):
        with pytest.raises(UserError, match=why):
            loras.split(text)


def test_fused_weights_are_the_sum(folder):
    from utils.pipeline_utils import load_pipeline
    from utils.steps import lora

    flags = ("--disable_bf16", "--lora", f"{folder / 'a.safetensors'}:0.5")
    args = make_args("--device", "cpu", *flags, "--lora", str(folder / "b.safetensors"))
    pipeline = load_pipeline(args)
    before = {name: p.detach().clone() for name, p in pipeline.transformer.named_parameters()}
    lora.apply(pipeline, args)
    after = dict(pipeline.transformer.named_parameters())
    assert before.keys() == after.keys()  # nothing of peft is left
    for name, old in before.items():
        expected = old.clone()
        for file, weight in (("a", 0.5), ("b", 1.0)):
            found = load_file(folder / f"{file}.safetensors")
            key = f"transformer.{name.removesuffix('.weight')}."
            if f"{key}lora_A.weight" in found:
                expected += weight * found[f"{key}lora_B.weight"] @ found[f"{key}lora_A.weight"]
        torch.testing.assert_close(after[name], expected, rtol=0, atol=1e-5)
        assert torch.equal(after[name], old) == (name.removesuffix(".weight") not in LAYERS), name


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--disable_fused_projections", "--disable_fa3"),
        ("--modulation_once",),
        ("--fused_kernels",),
    ],
)
def test_the_picture_is_that_of_plain_diffusers_with_the_lora(folder, flags, reference):
    lora = ("--lora", str(folder / "a.safetensors"))
    pipeline, args = optimized(*lora, *flags)
    found, expected = quality.run(pipeline, args), plain(args)
    scores = quality.compare(found, expected)
    assert scores["psnr_db_mean"] is None or scores["psnr_db_mean"] > 35
    assert quality.compare(found, reference())["psnr_db_mean"] < 30  # and it shows


def test_float8_casts_the_sum(folder, float8_on_cpu, reference):
    """Its error beside the LoRA is its error without one: nothing of the LoRA is left out."""
    alone = quality.relative_l2(quality.run(*optimized()).latents, reference().latents)
    pipeline, args = optimized("--lora", str(folder / "a.safetensors"))
    assert args.plan["quant"].is_on
    found, expected = quality.run(pipeline, args), plain(args)
    assert quality.relative_l2(found.latents, expected.latents) < 2 * alone


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES[1:], ids="-".join)
def test_compiled_and_exported_code_has_the_lora(folder, mode, tmp_path):
    cache = ("--cache-dir", str(tmp_path / "cache"), "--compile_export_mode", *mode)
    pipeline, args = optimized("--lora", str(folder / "a.safetensors"), *cache)
    scores = quality.compare(quality.run(pipeline, args), plain(args))
    assert scores["psnr_db_mean"] > 35


def test_a_row_is_compared_with_the_unfused_lora_and_lossless(folder, tmp_path):
    from utils import reference
    from utils.pipeline_utils import load_pipeline, optimize

    cache = ("--cache-dir", str(tmp_path / "cache"))
    args = make_args("--device", "cpu", *cache, "--lora", str(folder / "a.safetensors"))
    pipeline = load_pipeline(args)
    weights = {name: p.clone() for name, p in pipeline.transformer.named_parameters()}
    kept, path = reference.load_or_make(pipeline, args, args.prompt, with_fp32=True)
    after = dict(pipeline.transformer.named_parameters())
    assert all(torch.equal(after[name], old) for name, old in weights.items())
    assert quality.compare(kept["eager"], plain(args))["psnr_db_worst"] is None
    result = quality.run(optimize(pipeline, args), args, args.prompt)
    scores = reference.scores(result, kept, args, args.prompt)
    assert quality.lossless_problem(scores) == ""
    other = make_args("--device", "cpu", *cache, "--lora", f"{folder / 'a.safetensors'}:0.5")
    identities = [reference.identity_of(a, args.prompt, True) for a in (args, other)]
    assert identities[0] != identities[1] and path.exists()


def test_packages_of_other_loras_are_other_packages(folder, tmp_path):
    from utils.artifacts import identity_of_run
    from utils.artifacts.identity import differences

    def identity(*flags):
        cache = ("--cache-dir", str(tmp_path / "cache"), "--device", "cpu")
        return identity_of_run(make_args(*cache, *flags), {})

    a, b = str(folder / "a.safetensors"), str(folder / "b.safetensors")
    runs = [(), ("--lora", a), ("--lora", f"{a}:0.5"), ("--lora", b), ("--lora", a, "--lora", b)]
    found = [json.dumps(identity(*flags), sort_keys=True, default=str) for flags in runs]
    assert len(set(found)) == len(runs)
    lines = differences(identity("--lora", a), identity("--lora", f"{a}:0.5"))
    assert [line.partition(":")[0] for line in lines] == ["steps.lora.files"]


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as error:
        make_args("--device", "cpu", *flags)
    return str(error.value)


def changed(folder: Path, tmp_path: Path, change) -> str:
    """Write LoRA `a` with its tensors changed and give the refusal of the result."""
    tensors = load_file(folder / "a.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "bad.safetensors")
    return refusal("--lora", str(tmp_path / "bad.safetensors"))


Q = f"transformer.{DOUBLE}attn.to_q"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.update({"transformer.nowhere.lora_A.weight": torch.ones(4, 256)}),
         "1 of 25 keys have no place: transformer.nowhere.lora_A.weight"),
        (lambda t: t.update({"text_encoder.x.lora_A.weight": torch.ones(4, 256)}),
         "keys have no place: text_encoder.x.lora_A.weight"),
        (lambda t: t.update({f"{Q}.lora_magnitude_vector": torch.ones(256)}),
         "keys have no place: transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"),
        (lambda t: t.update({f"{Q}.dora_scale": torch.ones(256)}), "DoRA"),
        (lambda t: t.pop(f"{Q}.lora_B.weight"), "transformer_blocks.0.attn.to_q has no lora_B"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(3, 256)}),
         "transformer_blocks.0.attn.to_q has ranks 3 and 4"),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 128)}),
         "transformer_blocks.0.attn.to_q is 256x128 (expected 256x256)"),
        (lambda t: t[f"{Q}.lora_A.weight"].fill_(torch.nan), "not finite floating-point numbers: "),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 256, dtype=torch.int64)}),
         "not finite floating-point numbers: transformer."),
        (lambda t: t.update({f"{Q}.lora_A.weight": torch.tensor(1.0)}), "to_q is 0-dimensional"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(folder, tmp_path, change, expected):
    said = changed(folder, tmp_path, change)
    assert expected in said and "bad.safetensors" in said and len(said.splitlines()) == 1


def test_float8_is_read_like_other_numbers(folder, tmp_path):
    tensors = load_file(folder / "a.safetensors")
    save_file(
        {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, tmp_path / "f8.safetensors"
    )
    assert make_args("--device", "cpu", "--lora", str(tmp_path / "f8.safetensors")).lora_rank


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (":0.5", "--lora :0.5: names no file"),
        ("x.safetensors:1e20", "weight 1e20, expected a finite number, 1000 at most"),
        ("x.safetensors:nan", "weight nan, expected a finite number"),
    ],
)
def test_what_a_weight_may_be(text, expected):
    assert expected in refusal("--lora", text)


def test_what_is_no_lora_is_refused(folder, tmp_path):
    whole = (folder / "a.safetensors").read_bytes()
    for name, content, expected in (
        ("cut.safetensors", whole[: len(whole) // 2], "damaged or no safetensors file"),
        ("text.safetensors", b"not a LoRA at all", "damaged or no safetensors file"),
        ("empty.safetensors", b"", "damaged or no safetensors file"),
        ("lora.bin", whole, "expected a .safetensors file"),
    ):
        (tmp_path / name).write_bytes(content)
        assert expected in refusal("--lora", str(tmp_path / name))
    vae = "tiny_flux/tiny-dev/vae/diffusion_pytorch_model.safetensors"
    assert "no LoRA: found decoder" in refusal("--lora", vae)
    for absent in (tmp_path / "absent.safetensors", "/absent/x.safetensors"):
        assert "no such file (nor" in refusal("--lora", str(absent))
    assert "is a folder" in refusal("--lora", str(tmp_path))
    assert "someone/style/pytorch_lora_weights.safetensors" in refusal("--lora", "someone/style")
    schnell = str(folder / "a.safetensors")
    assert "changes neither speed" in refusal("--random_weights", "--lora", schnell)
    other = "--ckpt", "tiny-kontext", "--image", "tiny_flux/source.png"
    save_file(
        {k: v.repeat(1, 2) for k, v in load_file(schnell).items()}, tmp_path / "wide.safetensors"
    )
    assert "made for another transformer" in refusal(
        "--lora", str(tmp_path / "wide.safetensors"), *other
    )
    two = refusal("--lora", "absent.safetensors", "--require", "quant")
    assert "no such file" in two and "--require quant" in two  # every problem at once


def test_kohyas_format_gives_the_same_weights(folder, tmp_path):
    """Its names, its fused QKV with alpha: 0.5 of the rank halves everything."""
    tensors = load_file(folder / "a.safetensors")
    names = {
        "transformer_blocks.0.attn.to_out.0": "lora_unet_double_blocks_0_img_attn_proj",
        "transformer_blocks.0.ff.net.0.proj": "lora_unet_double_blocks_0_img_mlp_0",
        "single_transformer_blocks.1.proj_out": "lora_unet_single_blocks_1_linear2",
    }
    kohya, ours = {}, {}
    for layer, name in names.items():
        down, up = (tensors[f"transformer.{layer}.lora_{x}.weight"] for x in "AB")
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        kohya[f"{name}.alpha"] = torch.tensor(RANK / 2.0)
        keys = [f"transformer.{layer}.lora_{x}.weight" for x in "AB"]
        ours |= {key: tensors[key] for key in keys}
    save_file(kohya, tmp_path / "kohya.safetensors")
    save_file(ours, tmp_path / "ours.safetensors")
    found = [
        optimized("--disable_bf16", "--lora", str(tmp_path / file))[0].transformer.state_dict()
        for file in ("kohya.safetensors", "ours.safetensors:0.5")
    ]
    for name, value in found[1].items():
        torch.testing.assert_close(found[0][name], value, rtol=0, atol=1e-6)
    kohya["lora_unet_double_blocks_0_img_attn_extra.lora_down.weight"] = torch.ones(4, 256)
    save_file(kohya, tmp_path / "kohya.safetensors")
    assert "img_attn_extra" in refusal("--lora", str(tmp_path / "kohya.safetensors"))


def test_a_compressed_gguf_takes_no_lora(folder, tmp_path):
    file = tmp_path / "Q8_0.gguf"
    write(transformer_folder("tiny-schnell"), file, "Q8_0")
    both = ("--lora", str(folder / "a.safetensors"), "--gguf_file", str(file))
    with pytest.raises(UserError, match="stay compressed; use --gguf_mode dequantize"):
        make_args(*both)
    assert make_args(*both, "--gguf_mode", "dequantize").plan["lora"].is_on

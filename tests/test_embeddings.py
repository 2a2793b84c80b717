"""The memory of text embeddings: what an entry belongs to, and that nothing but time changes."""

import copy
import sys

import pytest
import torch
from transformers import CLIPTextModel, T5EncoderModel

import gen_image
from tests.conftest import make_args
from utils import artifacts, embeddings
from utils.benchmark_utils import create_parser
from utils.errors import UserError
from utils.memory_tiers import GIB, estimate
from utils.prepare import settle_call
from utils.steps import PARTS, memory

RED, BLUE = "a red circle on a blue background", "a white heart on a blue background"


def draw(monkeypatch, capsys, folder, *flags: str) -> tuple[bytes, str]:
    """Run gen_image.py in this process. Gives: its pictures, and what it said of the text."""
    picture = folder / "x.png"
    words = ("--device", "cpu", "--cache-dir", folder / "c", "--output-file", picture, *flags)
    monkeypatch.setattr(sys, "argv", ["gen_image.py", *map(str, words)])
    gen_image.main()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("text  ")]
    drawn = b"".join(path.read_bytes() for path in sorted(folder.glob("x*.png")))
    return drawn, said[-1].split(": ")[0].split(maxsplit=1)[1] if said else ""


def no_encoder(*_, **__):
    raise AssertionError("an encoder was loaded")


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--ckpt", "tiny-dev", "--true_cfg_scale", "2", "--negative_prompt", "a blue ring",
         "--drop_text_padding", "--num_inference_steps", "4"),
        ("--ckpt", "tiny-kontext", "--image", "tiny_flux/source.png", "--prompt", "make it red",
         "--prompt", "make it blue", "--num_images_per_prompt", "2", "--num_inference_steps", "2"),
        ("--modulation_once", "--num_inference_steps", "2"),
        ("--memory", "group"),
    ],
)  # fmt: skip
def test_a_known_prompt_loads_no_encoder_and_draws_the_same(flags, monkeypatch, capsys, tmp_path):
    plain, _ = draw(monkeypatch, capsys, tmp_path, *flags, "--seed", "5")
    memory = ("--embedding_cache", tmp_path / "text")
    _, said = draw(monkeypatch, capsys, tmp_path, *flags, *memory, "--seed", "4")
    assert said == "encoded and stored"
    with monkeypatch.context() as patch:
        for encoder in (CLIPTextModel, T5EncoderModel):
            patch.setattr(encoder, "from_pretrained", no_encoder)
        found, said = draw(patch, capsys, tmp_path, *flags, *memory, "--seed", "5")
    assert said == "found, no encoder loaded"
    assert found == plain


def test_encoders_that_are_left_out_are_not_counted(monkeypatch, capsys, tmp_path):
    """What is free lies between the two estimates, so that a known prompt alone fits untiled."""
    cached = ("--embedding_cache", str(tmp_path / "text"), "--drop_text_padding")
    draw(monkeypatch, capsys, tmp_path, "--prompt", RED, *cached)
    parser = create_parser()
    embeddings.add_flag(parser)
    words = ("--device", "cpu", "--cache-dir", str(tmp_path / "c"), *cached, "--prompt")
    args = parser.parse_args([*words, BLUE])
    settle_call(args)
    without, whole = (estimate(args, "full", encoders_loaded=there) for there in (False, True))
    assert args.memory_estimate == whole
    free = (without.gib + whole.gib) / 2 * GIB
    monkeypatch.setattr(memory, "free_bytes", lambda device: free)
    for prompt, tier in ((BLUE, "tiled"), (RED, "full")):
        args = parser.parse_args([*words, prompt])
        settle_call(args)
        assert args.tier == tier
    assert args.memory_estimate == without
    empty = parser.parse_args(["--device", "cpu", "--embedding_cache", str(tmp_path / "none")])
    settle_call(empty)  # makes no folder for a call that may still be refused
    assert empty.tier == "tiled" and not (tmp_path / "none").exists()


def test_half_of_the_texts_is_not_enough(monkeypatch, capsys, tmp_path):
    """The negative prompt is new: T5 has to be there, and the prompt's own entry is used."""
    flags = ("--embedding_cache", tmp_path / "text", "--num_inference_steps", "2")
    draw(monkeypatch, capsys, tmp_path, *flags)
    guided = ("--true_cfg_scale", "2", "--negative_prompt", "a blue ring")
    plain, _ = draw(monkeypatch, capsys, tmp_path, *flags[2:], *guided)
    assert draw(monkeypatch, capsys, tmp_path, *flags, *guided) == (plain, "encoded and stored")
    assert len(list((tmp_path / "text").glob("text-*.json"))) == 2
    made = (plain, "found, no encoder loaded")
    assert draw(monkeypatch, capsys, tmp_path, *flags, *guided) == made


def test_a_damaged_entry_is_encoded_again(monkeypatch, capsys, tmp_path):
    flags = ("--embedding_cache", tmp_path / "text")
    plain, _ = draw(monkeypatch, capsys, tmp_path, *flags)
    (entry,) = (tmp_path / "text").glob("*.safetensors")
    content = entry.read_bytes()
    entry.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert draw(monkeypatch, capsys, tmp_path, *flags) == (plain, "encoded and stored")
    assert entry.read_bytes() == content
    assert not list((tmp_path / "text").glob(".text-*.building"))


@pytest.mark.parametrize(
    ("flags", "is_another"),
    [
        (("--prompt", BLUE), True),
        (("--prompt", RED, "--prompt", RED), True),
        (("--num_images_per_prompt", "2"), True),
        (("--max_sequence_length", "64"), True),
        (("--disable_bf16",), True),
        (("--drop_text_padding",), True),
        (("--ckpt", "tiny-dev"), True),
        (("--seed", "7", "--height", "64", "--num_inference_steps", "2"), False),
        (("--disable_fused_projections", "--memory", "group"), False),
    ],
)
def test_what_changes_the_numbers_is_another_entry(flags, is_another, tmp_path):
    cache = ("--device", "cpu", "--cache-dir", str(tmp_path))
    one = make_args(*cache, "--prompt", RED)
    other = make_args(*cache, *(() if "--prompt" in flags else ("--prompt", RED)), *flags)
    names = {artifacts.name_of(embeddings.identity_of(args, args.prompt)) for args in (one, other)}
    assert (len(names) == 2) is is_another


def test_the_seed_counts_where_it_makes_the_weights(tmp_path):
    flags = ("--device", "cpu", "--cache-dir", str(tmp_path), "--random_weights")
    one, other = (make_args(*flags, "--seed", seed) for seed in "01")
    assert embeddings.identity_of(one, one.prompt) != embeddings.identity_of(other, other.prompt)
    text = embeddings.Remembered(one, artifacts.open_cache(tmp_path / "text"))
    text.found = text.wanted  # nothing to save where weights are drawn anew
    assert text.unneeded == () and text.parts == PARTS


def test_embeddings_that_are_handed_over_pass_through(tmp_path):
    args = make_args("--device", "cpu", "--cache-dir", str(tmp_path), "--prompt", RED)
    text, calls = embeddings.Remembered(args, artifacts.open_cache(tmp_path / "text")), []

    class Pipeline:
        def encode_prompt(self, prompt=None, prompt_2=None, **named):
            calls.append(prompt)
            return torch.ones(1, 2, 3), torch.ones(1, 3), torch.zeros(2, 3)

    pipeline = Pipeline()
    text.install(pipeline)
    pipeline.encode_prompt(prompt=[RED], prompt_embeds=torch.ones(1))
    pipeline.encode_prompt(prompt=[BLUE], device="cpu")  # no text of the call
    pipeline.encode_prompt(prompt=[RED], prompt_2=[BLUE], device="cpu")
    assert len(calls) == 3 and not text.known
    for _ in range(2):
        embeds, _, _ = pipeline.encode_prompt(prompt=[RED], prompt_2=None, device="cpu")
        assert embeds.shape == (1, 2, 3)
    assert len(calls) == 4 and list(text.known) == [(RED,)]


def test_refusals_are_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    for flags, expected in (
        ((tmp_path / "file",), f"--embedding_cache {tmp_path / 'file'}: "),
        ((tmp_path / "open",), "lets others write"),
        (("/proc/x",), "--embedding_cache /proc/x: cannot be made"),
        (
            (tmp_path / "x", "--compile_text_encoders", "--compile_export_mode", "compile"),
            "--embedding_cache: found --compile_text_encoders",
        ),
    ):
        words = map(str, ("--device", "cpu", "--embedding_cache", *flags))
        monkeypatch.setattr(sys, "argv", ["gen_image.py", *words])
        with pytest.raises(UserError) as refusal:
            gen_image.main()
        assert expected in str(refusal.value) and "\n" not in str(refusal.value)
    assert not (tmp_path / "x").exists()


def test_timed_runs_know_no_such_flag():
    assert "embedding_cache" not in {action.dest for action in create_parser()._actions}


def test_settings_of_t5s_steps_count(tmp_path):
    args = make_args("--device", "cpu", "--cache-dir", str(tmp_path))
    other = copy.copy(args)
    from utils.steps import on

    other.plan = args.plan | {"text_quant": on(False, granularity="row")}
    third = copy.copy(args)
    third.plan = args.plan | {"text_quant": on(False, granularity="tensor")}
    names = {
        artifacts.name_of(embeddings.identity_of(a, args.prompt)) for a in (args, other, third)
    }
    assert len(names) == 3

"""Prompts: what the encoders see of them, styles, files, and pictures of a whole file."""

import copy
from types import SimpleNamespace

import doctor_pieces
import pytest
from conftest import make_args
from PIL import Image

from extras import prompts
from utils.errors import UserError
from utils.prompts import report_cut_prompts

LONG = "a red circle on a blue background, " * 20 + "and a green heart"


@pytest.fixture(scope="module")
def args():
    return make_args("--device", "cpu", "--ckpt", "tiny-schnell", "--max_sequence_length", "64")


@pytest.fixture(scope="module")
def tokenizers(args):
    return prompts.load_tokenizers(args.checkpoint)


def test_a_short_prompt_is_seen_whole(tokenizers):
    clip, t5 = prompts.look("a red circle", tokenizers, 256)
    assert (clip.encoder, clip.window, t5.encoder, t5.window) == ("CLIP", 77, "T5", 256)
    assert clip.found == len(clip.tokens) and t5.found == len(t5.tokens)
    assert not clip.cut and not t5.cut


def test_what_is_cut_is_the_end_that_the_encoder_never_gets(tokenizers):
    for seen, tokenizer in zip(
        prompts.look(LONG, tokenizers, 64), tokenizers.values(), strict=True
    ):
        assert seen.found > seen.window == len(seen.tokens)
        assert seen.cut and LONG.endswith(seen.cut)
        kept = tokenizer(LONG, truncation=True, max_length=seen.window).input_ids
        assert list(seen.tokens) == tokenizer.convert_ids_to_tokens(kept)
        rest = LONG.removesuffix(seen.cut)  # alone it fills the window exactly
        assert list(tokenizer(rest).input_ids) == list(kept)


def test_the_counts_are_those_that_gen_image_warns_of(tokenizers, args, capsys):
    args = copy.copy(args)
    args.prompt = [LONG]
    clip, t5 = tokenizers.values()
    parts = {"tokenizer": clip, "tokenizer_2": t5, "tokenizer_max_length": clip.model_max_length}
    lines = report_cut_prompts(SimpleNamespace(**parts), args)
    assert "tokens cut" in capsys.readouterr().err  # gen_image.py does not cut silently
    for line, seen in zip(lines, prompts.look(LONG, tokenizers, 64), strict=True):
        cut = f"{seen.found - seen.window} of {seen.found} tokens cut by {seen.encoder}"
        assert cut in line and f"window of {seen.window}" in line


def test_a_prompt_file_has_one_prompt_a_line(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("\ufeff# shapes\n\na red circle\n  a blue ring  \n   # no\na 100 % #hash\n")
    assert prompts.read_prompts(file) == ["a red circle", "a blue ring", "a 100 % #hash"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"# nothing\n\n", "no prompt in 2 line"),
        (b"\xff\xfe\x00", "expected UTF-8"),
        (None, "No such"),
    ],
)
def test_prompt_files_without_prompts_are_one_line(tmp_path, content, expected):
    file = tmp_path / "list.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=expected):
        prompts.read_prompts(file)


def test_styles_are_plain_templates(tmp_path):
    styles = prompts.read_styles()
    assert prompts.in_style("a {odd} fox", "oil", styles).startswith("a {odd} fox, oil on canvas")
    assert prompts.in_style("a fox", None, styles) == "a fox"
    with pytest.raises(UserError, match=r"--style none: unknown .* photograph"):
        prompts.in_style("a fox", "none", styles)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("oil: no place", "oil: found 'no place', expected {prompt} once"),
        ("oil: [a]", "expected {prompt} once"),
        ("- a", "found list, expected names"),
        ("a: b: c", "no YAML"),
    ],
)
def test_styles_that_cannot_be_used_are_one_line(tmp_path, text, expected):
    file = tmp_path / "styles.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refusal:
        prompts.read_styles(file)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_a_file_of_prompts_becomes_pictures_equal_to_single_ones(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("a red circle\na white heart\n")
    flags = ("--device", "cpu", "--seed", "5")
    words = ("-m", "extras.prompts", "--prompt_file", file, "--style", "on_black", "--generate")
    done = doctor_pieces.run(*words, *flags, "--output-file", tmp_path / "p.png", folder=tmp_path)
    assert done.code == 0, done.output
    assert "1: a white heart on a black background\n   CLIP" in done.output
    call = ("gen_image.py", "--prompt", "a white heart on a black background", "--seed", "6")
    single = ("--device", "cpu", "--output-file", tmp_path / "single.png")
    assert doctor_pieces.run(*call, *single, folder=tmp_path).code == 0
    with Image.open(tmp_path / "p_1.png") as one, Image.open(tmp_path / "single.png") as other:
        assert one.tobytes() == other.tobytes()
        assert (one.text["prompt"], one.text["seed"]) == (call[2], "6")
    assert not (tmp_path / "p_2.png").exists()

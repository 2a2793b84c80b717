"""What a command line is refused for: one line, exit code 2, before any weight is loaded."""

import sys
from pathlib import Path

import pytest
from conftest import make_args

from utils import architecture, readme
from utils.checks import MAX_EDGE, number_problems
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent

REFUSALS = {
    "unknown checkpoint": (["--ckpt", "nope"], "--ckpt nope: unknown checkpoint"),
    "folder without a model": (["--ckpt", "utils"], "no model in this folder"),
    "unreachable hub": (["--ckpt", "someone/FLUX"], "hub cannot be reached"),
    "no CUDA": (["--device", "cuda"], "no CUDA device found"),
    "unknown device": (["--device", "tpu"], "unknown device"),
    "height": (["--height", "100"], "--height 100: not divisible by 16"),
    "no height": (["--height", "0"], "--height 0: expected 16 or more"),
    "negative width": (["--width", "-16"], "--width -16: expected 16 or more"),
    "huge width": (["--width", "16400"], "--width 16400: expected at most 16384"),
    "steps": (["--num_inference_steps", "0"], "--num_inference_steps 0: expected 1 or more"),
    "many steps": (["--num_inference_steps", "1001"], "expected at most 1000"),
    "text": (["--max_sequence_length", "513"], "expected at most 512"),
    "seed": (["--seed", "-1"], "--seed -1: expected 0 or more"),
    "last seed": (
        ["--seed", str(2**63 - 1), "--num_images_per_prompt", "2"],
        "--seed 9223372036854775807: expected less than 2**63 (of 2 images the last one's)",
    ),
    "empty prompt": (["--prompt", " "], "--prompt: empty"),
    "no prompt": (["--prompt", ""], "--prompt: empty"),
    "no text": (["--prompt", "caf\udce9"], "--prompt 'caf\\udce9': has bytes that are no UTF-8"),
    "no negative text": (
        ["--true_cfg_scale", "2", "--negative_prompt", "\udcff"],
        "--negative_prompt '\\udcff': has bytes that are no UTF-8",
    ),
    "empty checkpoint": (["--ckpt", ""], "--ckpt '': empty"),
    "empty mask": (["--step_mask", ""], "--step_mask '': empty"),
    "empty image": (["--image="], "--image '': empty"),
    "line break": (["--output-file", "x.png\n"], "--output-file 'x.png\\n': has a line break"),
    "long name": (["--ckpt", "x" * 300], "has 300 bytes in a name, expected 255 (in a path 4096)"),
    "nobody's home": (["--gguf_file", "~no-one/x.gguf"], "found no home of ~no-one"),
    "no name of a hub": (["--ckpt", "~/FLUX"], "--ckpt ~/FLUX: no such folder, and no name on"),
    "number of a CPU": (["--device", "cpu:x"], "--device cpu:x: unknown device (expected cuda"),
    "strong guidance": (
        ["--ckpt", "tiny-dev", "--guidance_scale", "1e36"],
        "0 or more, 1000 at most",
    ),
    "strong true CFG": (
        ["--true_cfg_scale", "1e20", "--negative_prompt", ""],
        "--true_cfg_scale 1e+20: expected a finite number above 1 (at 1 there is none), 1000 at",
    ),
    "endless guidance": (["--guidance_scale", "inf"], "expected a finite number, 0 or more"),
    "no guidance": (["--guidance_scale", "nan"], "expected a finite number, 0 or more"),
    "negative guidance": (["--guidance_scale", "-1"], "expected a finite number, 0 or more"),
    "image for Schnell": (["--image", "x.png"], "takes no image"),
    "guidance for Schnell": (["--guidance_scale", "3.5"], "has no guidance embedding"),
    "no such output folder": (
        ["--output-file", "no/such/x.png"],
        "the folder no/such does not exist",
    ),
    "output is a folder": (["--output-file", "utils"], "is a folder"),
    "empty output": (["--output-file", ""], "--output-file '': empty"),
    "long output": (
        ["--output-file", "x" * 250 + ".png"],
        "the name has 254 bytes, expected at most 223",
    ),
    "too long for a temporary name": (["--output-file", "x" * 240 + ".png"], "has 244 bytes"),
    "too long for a swapped name": (
        ["--output-file", "x" * 150 + ".png", "--swap_loras", "--lora", "y" * 60],
        "the name has 154 bytes, expected at most 139",
    ),
    "not a PNG": (["--output-file", "x.gif"], "expected a name ending in .png"),
    "unwritable folder": (["--output-file", "/proc/x.png"], "the folder /proc cannot be written"),
    "unknown step": (["--require", "magic"], "--require magic: unknown step"),
    "required but unavailable": (["--require", "quant"], "--require quant: unavailable: float8"),
    "required but off": (
        ["--require", "fa3", "--disable_fa3"],
        "--require fa3: off: --disable_fa3",
    ),
    "required and refused: told once": (
        ["--require", "quant", "--quant_dtype", "mxfp8"],
        "--quant_dtype mxfp8: mxfp8 products need",
    ),
    "fp8 attention on a CPU": (["--fa3_dtype", "fp8"], "--fa3_dtype fp8"),
    "float8 named on a CPU": (["--quant_dtype", "float8"], "--quant_dtype float8: float8 products"),
    "mxfp8 on a CPU": (["--quant_dtype", "mxfp8"], "--quant_dtype mxfp8: mxfp8 products need"),
    "backend of a GPU": (["--attention_backend", "fa2"], "--attention_backend fa2"),
    "cache for Schnell": (["--cache_dit_config", "cache_config.yaml"], "nothing to reuse"),
    "cached model without export": (["--use-cached-model"], "--use-cached-model"),
}


@pytest.mark.parametrize(("flags", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_line_before_any_weight(flags, expected, monkeypatch):
    from utils import pipeline_utils

    monkeypatch.setattr(pipeline_utils, "load_pipeline", None)  # preparing must not need it
    with pytest.raises(UserError) as refusal:
        make_args(*([] if "--device" in flags else ["--device", "cpu"]), *flags)
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--pictures", "README.md"], "--pictures README.md: is a file (expected a folder)"),
        (["--pictures", "README.md/x"], "README.md is a file (expected a folder)"),
        (["--pictures", "/proc/x"], "--pictures /proc/x: the folder /proc cannot be written"),
        (["--pictures", "x/" + "y" * 300], "has 300 bytes in a name, expected 255"),
        (["--ladder", "--pictures", "x"], "--pictures: a series keeps its pictures beside its"),
        (["--trace-file", "x" * 230], "--trace-file xxx"),
        (["--results", ""], "--results '': empty"),
        (["--quality_prompts", "9"], "--quality_prompts 9: expected at most 8"),
    ],
)
def test_the_benchmark_refuses_before_it_measures(flags, expected, monkeypatch):
    import run_benchmark
    from utils.prepare import prepare

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--device", "cpu", *flags])
    with pytest.raises(UserError) as refusal:
        prepare(run_benchmark.parse_arguments())
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_required_step_that_runs_and_the_largest_picture_are_no_problem():
    args = make_args("--device", "cpu", "--require", "channels_last")
    assert args.plan["channels_last"].is_on
    args.height, args.width = MAX_EDGE, 16
    assert number_problems(args) == []


@pytest.mark.parametrize("flag", ["--height", "--prompt", "--output-file"])
def test_two_dashes_are_no_value(flag, capsys):
    """argparse alone takes them for an empty list."""
    with pytest.raises(SystemExit) as ended:
        make_args(f"{flag}=--")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: argument {flag}: expected one argument; see")


def test_a_refused_run_leaves_no_file_for_its_rows(tmp_path, monkeypatch):
    import run_benchmark

    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--height", "17", "--results", str(rows)])
    with pytest.raises(UserError, match="--height 17"):
        run_benchmark.main()
    assert not list(tmp_path.iterdir())


def test_a_folder_of_pictures_may_have_to_be_made(tmp_path, monkeypatch):
    import run_benchmark
    from utils.prepare import prepare

    flags = ["--device", "cpu", "--pictures", str(tmp_path / "new" / "pictures")]
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *flags])
    prepare(run_benchmark.parse_arguments())
    assert not list(tmp_path.iterdir())


def test_there_are_as_many_quality_prompts_as_the_bound_says():
    from utils.prompts import PER_KIND, QUALITY

    assert {len(prompts) for prompts in QUALITY.values()} == {PER_KIND}


def test_every_problem_is_reported_at_once():
    with pytest.raises(UserError) as refusal:
        make_args("--height", "100", "--seed", "-1", "--output-file", "no/such/x.png")
    assert len(str(refusal.value).splitlines()) == 3


@pytest.mark.parametrize("command", [architecture, readme])
def test_what_writes_documents_takes_no_word(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command.__name__, "--nosuch"])
    monkeypatch.setattr(Path, "write_text", None)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2

"""The command line: quick help, both spellings, defaults, and one line for everything wrong."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import make_args

from utils.errors import UserError
from utils.hardware import Machine
from utils.pipeline_utils import STEPS

ROOT = Path(__file__).resolve().parent.parent
HOPPER = Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139.0)


def script(*words: str, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run a script of this repository as a user does."""
    import os

    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
    )


@pytest.mark.parametrize("name", ["gen_image.py", "run_benchmark.py"])
def test_help_needs_no_torch_and_little_time(name):
    start = time.perf_counter()
    done = script("-X", "importtime", name, "--help")
    assert done.returncode == 0
    assert time.perf_counter() - start < 1
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "diffusers", "transformers", "numpy"}
    for step in STEPS:
        assert step.__name__ in {f"utils.steps.{step.NAME}"}  # one name everywhere


def test_long_options_take_dashes_and_underscores():
    a = make_args("--num-inference-steps=3", "--disable-fa3", "--output_file", "x.png")
    b = make_args("--num_inference_steps", "3", "--disable_fa3", "--output-file", "x.png")
    assert a.num_inference_steps == b.num_inference_steps == 3
    assert a.disable_fa3 and b.disable_fa3
    assert a.output_file == b.output_file == "x.png"


def test_abbreviated_and_unknown_options_are_one_line():
    done = script("gen_image.py", "--disable_fa")
    assert done.returncode == 2
    assert done.stderr.startswith("error: unrecognized arguments: --disable_fa")
    assert done.stderr.count("\n") == 1


def test_defaults_on_a_cpu():
    args = make_args("--device", "cpu")
    assert (args.ckpt, args.height, args.width) == ("tiny-schnell", 128, 128)
    assert (args.num_inference_steps, args.guidance_scale, args.max_sequence_length) == (
        4,
        None,
        256,
    )
    assert args.compile_export_mode == "disabled"
    assert [name for name, verdict in args.plan.items() if verdict.is_on] == [
        "fused_projections",
        "fa3",
        "channels_last",
    ]
    assert args.plan["quant"].state == "unavailable"
    assert list(args.plan) == [step.NAME for step in STEPS]


@pytest.mark.parametrize(
    ("ckpt", "expected"),
    [
        ("black-forest-labs/FLUX.1-schnell", (4, None, 256, 1024)),
        ("black-forest-labs/FLUX.1-dev", (28, 3.5, 512, 1024)),
    ],
)
def test_defaults_of_the_published_checkpoints(ckpt, expected, roomy):
    args = make_args("--ckpt", ckpt, "--random_weights", "--device", "cpu")
    got = (args.num_inference_steps, args.guidance_scale, args.max_sequence_length, args.height)
    assert got == expected


def test_defaults_on_a_hopper_gpu(as_machine, monkeypatch):
    from utils.kernels import flash_attention

    as_machine(HOPPER)
    kernel = flash_attention.Kernel("fa3_fwd_interface", takes_fp8=True, call=None)
    monkeypatch.setattr(flash_attention, "find", lambda backend: kernel)
    args = make_args("--random_weights")
    assert args.ckpt == "black-forest-labs/FLUX.1-schnell"
    assert args.compile_export_mode == "export_aoti"
    assert args.plan["fa3"].settings["dtype"] == "fp8"
    on = [name for name, verdict in args.plan.items() if verdict.is_on]
    assert on == [
        "fused_projections",
        "fa3",
        "channels_last",
        "quant",
        "device_images",
        "inductor_tuning_flags",
        "export_aoti",
    ]
    lossless = make_args("--random_weights", "--disable_quant")
    assert lossless.plan["fa3"].settings["dtype"] == "bf16"


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
        ["--output-file", "x" * 296 + ".png"],
        "the name has 300 bytes, expected at most 223",
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
        (["--pictures", "x/" + "y" * 300], "cannot be written (File name too long)"),
        (["--trace-file", "x" * 300], "--trace-file xxx"),
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


def test_scripts_exit_with_2_and_leave_nothing(tmp_path):
    target = tmp_path / "x.png"
    done = script("gen_image.py", "--ckpt", "nope", "--output-file", str(target))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --ckpt nope")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_problem_is_reported_at_once():
    with pytest.raises(UserError) as refusal:
        make_args("--height", "100", "--seed", "-1", "--output-file", "no/such/x.png")
    assert len(str(refusal.value).splitlines()) == 3


def test_gated_model_names_licence_login_and_the_way_around(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    from utils.checkpoints import transport_error

    http = sys.modules[transport_error().__module__.partition(".")[0]]  # httpx, or httpx2

    def gated(*args, **kwargs):
        raise GatedRepoError(
            "gated", response=http.Response(403, request=http.Request("HEAD", "http://x"))
        )

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", gated)
    with pytest.raises(UserError) as refusal:
        make_args("--ckpt", "black-forest-labs/FLUX.1-dev", "--device", "cpu")
    text = str(refusal.value)
    assert len(text.splitlines()) == 1
    for part in ("https://huggingface.co/black-forest-labs/FLUX.1-dev", "hf auth login"):
        assert part in text
    assert "--random_weights" in text


def test_missing_package_for_what_the_hardware_could_run(as_machine):
    as_machine(HOPPER)
    with pytest.raises(UserError) as refusal:
        make_args("--random_weights")
    text = str(refusal.value)
    assert "fa3_fwd_interface" in text and "pip install fa3-fwd" in text
    assert "--disable_fa3" in text
    assert len(text.splitlines()) == 1


def test_what_the_hardware_lacks_goes_on_and_says_so(as_machine):
    as_machine(Machine("cuda", "NVIDIA A100", (8, 0), memory_gib=80.0))
    plan = make_args("--random_weights").plan
    assert plan["quant"].state == "unavailable" and "8.9" in plan["quant"].reason
    assert plan["fa3"].is_on


def test_damaged_checkpoint_config_is_one_line(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"')
    with pytest.raises(UserError, match=r"model_index.json cannot be read"):
        make_args("--ckpt", str(tmp_path), "--device", "cpu")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OtherPipeline"}))
    with pytest.raises(UserError, match="found a OtherPipeline"):
        make_args("--ckpt", str(tmp_path), "--device", "cpu")


def test_weights_larger_than_the_memory_are_refused_before_they_are_built(as_machine):
    as_machine(Machine("cpu", "small", memory_gib=24.0))
    with pytest.raises(UserError) as refusal:
        make_args("--random_weights", "--ckpt", "black-forest-labs/FLUX.1-dev")
    text = str(refusal.value)
    assert "needs 31.4 GiB for its weights alone, found 24.0 GiB on a CPU" in text
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("mode", ["compile", "export_aoti"])
def test_a_missing_compiler_is_named_before_any_weight(mode, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"no C\+\+ compiler found .* apt install g\+\+"):
        make_args("--device", "cpu", "--compile_export_mode", mode)


def test_steps_declare_an_order_that_holds():
    names = [step.NAME for step in STEPS]
    assert len(set(names)) == len(names)
    for step in STEPS:
        for earlier in step.AFTER:
            assert names.index(earlier) < names.index(step.NAME), (earlier, step.NAME)
        for part in ("add_flags", "check", "apply", "__doc__"):
            assert getattr(step, part), (step.NAME, part)

"""The command line: quick help, both spellings, defaults; refusals: test_refusals.py."""

import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_args

from utils import card
from utils.errors import UserError
from utils.hardware import Machine
from utils.pipeline_utils import STEPS
from utils.steps import PARTS

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
        timeout=600,
        env=os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {}),
    )


@pytest.mark.parametrize("name", ["gen_image.py", "run_benchmark.py"])
def test_help_needs_no_torch_and_little_time(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script("-X", "importtime", name, "--help")
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert spent.ru_utime + spent.ru_stime - before.ru_utime - before.ru_stime < 1
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


def test_the_card_lists_the_variables_that_decide_code_or_speed(monkeypatch):
    for name in card.variables():
        monkeypatch.delenv(name)
    assert "\nvariables" not in card.render(args := make_args("--device", "cpu"))
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS", "ATEN,TRITON")
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("TRITON_CACHE_DIR", "TORCH_LOGS", "OMP_NUM_THREADS", "HOME"):
        monkeypatch.setenv(name, "1")
    text = "CUBLAS_WORKSPACE_CONFIG=:4096:8 TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS=ATEN,TRITON"
    assert f"\nvariables   {text}\n" in card.render(args)
    assert card.named(card.environment(args)["variables"]) == text


def evening() -> tuple[str, list[str]]:
    """Give the README's section on the default stack, and the files that it says to read."""
    text = (ROOT / "README.md").read_text()
    section = text.partition("## Read it in an evening\n")[2].partition("\n## ")[0]
    return section, re.findall(r"`(utils/[\w/]+\.py)`", section)


def test_an_evenings_reading_is_as_long_as_the_readme_says():
    section, files = evening()
    lines = sum(len((ROOT / file).read_text().splitlines()) for file in files)
    assert f"{len(files)} files, {round(lines, -2):,} lines" in section, (len(files), lines)


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
    assert {f"utils/steps/{name}.py" for name in on} <= set(evening()[1])
    lossless = make_args("--random_weights", "--disable_quant")
    assert lossless.plan["fa3"].settings["dtype"] == "bf16"


def test_scripts_exit_with_2_and_leave_nothing(tmp_path):
    target = tmp_path / "x.png"
    done = script("gen_image.py", "--ckpt", "nope", "--output-file", str(target))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --ckpt nope")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


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


def edited(folder: Path, part: str, **fields) -> str:
    """Copy a bundled checkpoint and change the config of one part."""
    shutil.copytree(ROOT / "tiny_flux" / "tiny-schnell", folder)
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return str(folder)


@pytest.mark.parametrize(
    ("part", "fields", "expected"),
    [
        ("vae", {"sample_size": 100}, "sample_size 100, expected pixels, a whole number divisible"),
        ("vae", {"sample_size": "big"}, "sample_size 'big', expected pixels"),
        ("vae", {"block_out_channels": "x"}, "its configs describe no FLUX.1 model (TypeError"),
        ("transformer", {"num_layers": "x"}, "its configs describe no FLUX.1 model (TypeError"),
        ("text_encoder", {"hidden_size": "x"}, "its configs describe no FLUX.1 model (ValueError"),
    ],
)
def test_configs_of_another_kind_are_one_line(part, fields, expected, tmp_path):
    with pytest.raises(UserError) as refusal:
        make_args("--device", "cpu", "--ckpt", edited(tmp_path / "model", part, **fields))
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("model_index.json", "[]", "model_index.json: found list, expected keys and values"),
        ("vae/config.json", "null", "the vae's config: found NoneType, expected keys and values"),
        ("text_encoder/config.json", "{", "the text_encoder's config cannot be read"),
        ("scheduler/scheduler_config.json", None, "the scheduler's config cannot be read"),
        ("tokenizer", None, "no folder tokenizer in it (expected diffusers' layout)"),
    ],
)
def test_a_checkpoint_that_lacks_a_part_is_one_line(file, text, expected, tmp_path):
    path = Path(edited(tmp_path / "model", "vae")) / file
    if text is not None:
        path.write_text(text)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(UserError) as refusal:
        make_args("--device", "cpu", "--ckpt", str(tmp_path / "model"))
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


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


def test_a_scope_without_anything_to_compile_is_named_in_the_card():
    scope = ("--compile_scope", "blocks")
    text = card.render(make_args("--device", "cpu", *scope))
    assert (
        "mode        disabled (the default on a CPU; --compile_scope blocks has no effect)" in text
    )
    text = card.render(make_args("--device", "cpu", *scope, "--compile_export_mode", "disabled"))
    assert "mode        disabled (--compile_scope blocks has no effect)" in text
    assert "has no effect" not in card.render(make_args("--device", "cpu"))


def test_steps_declare_an_order_that_holds():
    names = [step.NAME for step in STEPS]
    assert len(set(names)) == len(names)
    for step in STEPS:
        for earlier in step.AFTER:
            assert names.index(earlier) < names.index(step.NAME), (earlier, step.NAME)
        assert step.PARTS and set(step.PARTS) <= set(PARTS), step.NAME
        for part in ("add_flags", "check", "apply", "__doc__"):
            assert getattr(step, part), (step.NAME, part)

"""The two scripts as users run them, and what they leave behind."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_args
from PIL import Image

from utils.images import save_images, write_strip
from utils.pipeline_utils import STEPS
from utils.prompts import report_cut_prompts

ROOT = Path(__file__).resolve().parent.parent


def run(*words) -> subprocess.CompletedProcess:
    """Run a script on the CPU; it has to succeed."""
    done = subprocess.run(
        [sys.executable, *map(str, words), "--device", "cpu"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done


def test_gen_image_writes_one_picture_that_says_how_it_was_made(tmp_path):
    target = tmp_path / "circle.png"
    prompt = "a red circle on a blue background"
    done = run("gen_image.py", "--prompt", prompt, "--seed", 7, "--output-file", target)
    assert [path.name for path in tmp_path.iterdir()] == ["circle.png"]
    with Image.open(target) as image:
        assert image.size == (128, 128)
        about = image.text
    assert (about["prompt"], about["seed"], about["checkpoint"]) == (prompt, "7", "tiny-schnell")
    assert json.loads(about["steps"])["fa3"]["state"] == "on"
    assert json.loads(about["versions"])["diffusers"]
    assert "on:  fused_projections" in done.stdout
    assert "off: quant                  unavailable: float8" in done.stdout
    named, _, waiting = done.stdout.partition("\nnot asked for  ")
    found = re.findall(r"(?m)^(?:on|off): +(\w+)", named)
    flags = re.findall(r"--(\w+)", waiting)
    assert len(found) + len(flags) == len(STEPS) and set(found) <= {s.NAME for s in STEPS}
    assert "loop_graph" in flags and not {f"disable_{name}" for name in found} & set(flags)


def test_gen_image_numbers_several_pictures(tmp_path):
    prompts = ("--prompt", "a red circle", "--prompt", "a blue square")
    run("gen_image.py", *prompts, "--output-file", tmp_path / "x.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x_0.png", "x_1.png"]
    for k, prompt in enumerate(prompts[1::2]):
        with Image.open(tmp_path / f"x_{k}.png") as image:
            assert (image.text["prompt"], image.text["seed"]) == (prompt, str(k))


def test_an_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    args = make_args("--device", "cpu", "--output-file", str(tmp_path / "x.png"))
    save = Image.Image.save

    def interrupted(self, path, **kwargs):
        save(self, path, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_images([Image.new("RGB", (16, 16))], args)
    assert not list(tmp_path.iterdir())


def test_a_picture_in_one_colour_is_said_as_the_doctor_knows_it(tmp_path, capsys):
    from extras.doctor.advice import explain

    args = make_args(
        "--device", "cpu", "--num_images_per_prompt", "2", "--output-file", str(tmp_path / "x.png")
    )
    drawn = Image.new("RGB", (16, 16))
    drawn.putpixel((3, 3), (0, 0, 1))
    save_images([drawn], args)
    assert capsys.readouterr().err == ""
    save_images([drawn, Image.new("RGB", (16, 16))], args)
    said = capsys.readouterr().err
    assert said.count("constant (black?)") == 1 and str(tmp_path / "x_1.png") in said
    assert "NaN" in "\n".join(str(found) for found in explain(said))


def test_a_strip_keeps_every_pixel_and_equal_ones_share_a_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (2, 96, 96, 3), np.uint8)
    images = [Image.fromarray(pixels) for pixels in noise]
    strip = write_strip(images, tmp_path)
    with Image.open(tmp_path / strip) as kept:
        assert kept.format == "WEBP" and np.array_equal(np.asarray(kept), np.hstack(noise))
    assert write_strip(images, tmp_path) == strip != write_strip(images[::-1], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_picture_may_be_read_by_others(tmp_path):
    umask = os.umask(0o022)
    try:
        strip = write_strip([Image.new("RGB", (16, 16))], tmp_path)
    finally:
        os.umask(umask)
    assert (tmp_path / strip).stat().st_mode & 0o777 == 0o644


def test_prompts_that_are_too_long_are_reported_and_go_on(capsys):
    from utils.pipeline_utils import load_pipeline

    args = make_args("--device", "cpu", "--prompt", "a red circle " * 40)
    lines = report_cut_prompts(load_pipeline(args), args)
    assert len(lines) == 1  # 120 words: too many for CLIP's 77, not for T5's 256
    assert "tokens cut by CLIP's window of 77" in lines[0]
    assert "note: prompt 'a red circle" in capsys.readouterr().err


def test_run_benchmark_reports_json_and_a_trace_with_its_regions(tmp_path):
    trace = tmp_path / "trace.json.gz"
    done = run("run_benchmark.py", "--num_runs", 2, "--num_warmup", 1, "--trace-file", trace)
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["total_s"]["n"] == 2 and row["total_s"]["min"] > 0
    assert row["stages_s"]["denoising_step"]["n"] == 2 * 4
    parts = row["stages_s"]
    steps = 4 * parts["denoising_step"]["min"]
    rest = sum(parts[name]["min"] for name in parts if name != "denoising_step")
    assert steps + rest < row["total_s"]["max"]
    assert row["quality"]["psnr_db_worst"] is None or row["quality"]["psnr_db_worst"] > 40
    assert row["quality"]["latents_relative_l2"] < 0.02
    assert row["memory_gib"]["host_peak"] > 0.1
    assert row["lossless"] is True
    assert row["command"].startswith("python run_benchmark.py --num_runs 2")
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json.gz"]
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    for region, count in {
        "denoising_step": 4,
        "decoding": 1,
        "prompt_encoding": 1,
        "postprocessing": 1,
        "pil_conversion": 1,
    }.items():
        assert names.count(region) == count, region


@pytest.mark.parametrize("flag", ["--trace-file", "--kernel_table"])
def test_a_row_is_kept_before_anything_is_profiled(flag, tmp_path, monkeypatch):
    """Profiling may fail, or be cut off, behind minutes of compilation."""
    import run_benchmark
    from utils import kernel_table, row

    def failing(*_):
        raise RuntimeError("no profiler")

    monkeypatch.setattr(row, "measure_row", lambda args: ({"command": "x"}, None, None))
    monkeypatch.setattr(row, "render", lambda found: "")
    monkeypatch.setattr(row, "write_trace", failing)
    monkeypatch.setattr(kernel_table, "render", failing)
    words = [flag, "trace.json"] if flag == "--trace-file" else [flag]
    rows = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--results", str(rows), *words])
    with pytest.raises(RuntimeError, match="no profiler"):
        run_benchmark.main()
    assert rows.read_text() == '{"command": "x"}\n'


def test_a_trace_without_gz_is_plain_json(tmp_path):
    from utils.row import write_trace

    write_trace(tmp_path / "trace.json", lambda: None)
    assert "traceEvents" in json.loads((tmp_path / "trace.json").read_text())


def test_random_weights_say_that_the_picture_means_nothing(tmp_path):
    target = tmp_path / "x.png"
    flags = ("--ckpt", "tiny-schnell", "--random_weights", "--output-file", target)
    done = run("gen_image.py", *flags)
    assert done.stdout.count("random weights: the picture means nothing") == 2  # card, file
    with Image.open(target) as image:
        assert image.text["note"] == "random weights: the picture means nothing"


IN_THE_LOOP = """
import runpy, sys
from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

step = Scheduler.step

def told(*words, **named):
    Scheduler.step = step
    print("in the loop", flush=True)
    return step(*words, **named)

Scheduler.step = told
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_ctrl_c_leaves_no_file(tmp_path):
    """Amid the loop: while modules are imported, a library may swallow it."""
    words = ("gen_image.py", "--num_inference_steps", "1000", "--device", "cpu")
    process = subprocess.Popen(
        [sys.executable, "-c", IN_THE_LOOP, *words, "--output-file", str(tmp_path / "x.png")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while (line := process.stdout.readline()) != "in the loop\n":
        assert line, process.communicate()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "interrupted"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("found", ["missing", "extra"])
def test_weights_that_do_not_fit_the_config_are_one_line(part, found, tmp_path):
    """transformers would draw those that are missing at random; both would leave out the others."""
    from safetensors.torch import load_file, save_file

    from utils.errors import UserError
    from utils.pipeline_utils import load_pipeline

    copy = tmp_path / "model"
    shutil.copytree(ROOT / "tiny_flux" / "tiny-schnell", copy)
    (file,) = (copy / part).glob("*.safetensors")
    tensors = load_file(file)
    if found == "missing":
        tensors.pop(name := min(name for name in tensors if name.endswith("weight")))
        said = r"[12] of its weights are missing \("
    else:  # as the first block of a larger model
        like = min(n for n in tensors if n.endswith("weight") and ".0." in n)
        tensors[name := like.replace(".0.", ".9.", 1)] = tensors[like].clone()
        said = r"1 of its weights have no place in its configs \("
    save_file(tensors, file, {"format": "pt"})
    args = make_args("--device", "cpu", "--ckpt", str(copy))
    with pytest.raises(UserError, match=f"cannot be loaded: {said}") as no:
        load_pipeline(args)
    assert name in str(no.value) and len(str(no.value).splitlines()) == 1


def test_damaged_weights_are_one_line(tmp_path):
    from utils.errors import UserError
    from utils.pipeline_utils import load_pipeline

    copy = tmp_path / "damaged"
    shutil.copytree(ROOT / "tiny_flux" / "tiny-schnell", copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:10_000])
    args = make_args("--device", "cpu", "--ckpt", str(copy))
    with pytest.raises(UserError, match="cannot be loaded") as refusal:
        load_pipeline(args)
    assert len(str(refusal.value).splitlines()) == 1

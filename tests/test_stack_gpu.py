"""The whole stack on a CUDA device: every mode against eager on the same device."""

import pytest
import torch
from conftest import MODES, make_args

from tiny_flux.scenes import Scene, render
from utils import quality
from utils.calls import only_known_calls
from utils.pipeline_utils import generate, load_pipeline, optimize, reused_steps
from utils.steps.step_mask import PRESETS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
CACHE = "cache_config.yaml"
RUN = (
    "--ckpt",
    "tiny-schnell",
    "--device",
    "cuda",
    "--prompt",
    "a red circle on a blue background",
)


@pytest.fixture(scope="module")
def eager():
    """Give plain diffusers' result in bf16 on this device."""
    args = make_args(*RUN, "--disable_quant", "--disable_fa3")
    return quality.run(load_pipeline(args), args)


@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "float8"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode[::2]))
def test_mode_against_eager(mode, float8, eager, tmp_path):
    flags = [*RUN, "--compile_export_mode", *mode, "--cache-dir", str(tmp_path / "packages")]
    args = make_args(*flags, *([] if float8 else ["--disable_quant"]))
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    result = quality.run(pipeline, args)
    scores = quality.compare(result, eager)
    psnr = 99.0 if scores["psnr_db_worst"] is None else scores["psnr_db_worst"]
    assert psnr > (30 if float8 else 40), scores
    again = generate(pipeline, args)[0]
    assert again.tobytes() == result.images[0].tobytes()  # graphs replay the same


@pytest.mark.parametrize("mode", ["compile", "export_aoti"])
@pytest.mark.parametrize("model", ["tiny-schnell", "tiny-dev", "tiny-kontext"])
def test_calls_may_change(model, mode, untuned, tmp_path):
    """Sizes, batches and guidance, each through graphs of its own; nothing new when repeated."""
    image = tmp_path / "in.png"
    render(Scene("circle", "red", "blue")).save(image)
    flags = ["--ckpt", model, "--device", "cuda", "--disable_quant", "--num_inference_steps", "4"]
    flags += ["--image", str(image)] if model == "tiny-kontext" else []
    calls = [[], ["--width", "160", "--height", "96"], ["--num_images_per_prompt", "3"]]
    calls += [["--guidance_scale", "1.5"]] if model != "tiny-schnell" else []
    calls = [make_args(*flags, *call) for call in calls]
    plain = load_pipeline(calls[0])
    torch._dynamo.reset()
    where = ("--compile_export_mode", mode, "--cache-dir", str(tmp_path / "packages"))
    args = make_args(*flags, *where)
    pipeline = optimize(load_pipeline(args), args)
    first = [generate(pipeline, call) for call in calls]
    for call, images in zip(calls, first, strict=True):
        for made, expected in zip(images, generate(plain, call), strict=True):
            assert quality.psnr_db(made, expected) > 35
    with only_known_calls():
        for call, images in zip(calls, first, strict=True):
            again = generate(pipeline, call)
            assert [i.tobytes() for i in again] == [i.tobytes() for i in images]


def test_a_step_cache_repeats_itself(untuned):
    args = make_args("--ckpt", "tiny-dev", "--device", "cuda", "--cache_dit_config", CACHE)
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    first = generate(pipeline, args)[0]
    used = reused_steps(pipeline, args)
    assert used["reused"]
    with only_known_calls():
        assert generate(pipeline, args)[0].tobytes() == first.tobytes()
    assert reused_steps(pipeline, args) == used
    plain = make_args("--ckpt", "tiny-dev", "--device", "cuda", "--disable_quant", "--disable_fa3")
    assert quality.psnr_db(first, generate(load_pipeline(plain), plain)[0]) > 25


def test_a_package_is_reused_by_the_next_run(untuned, tmp_path):
    where = ("--compile_export_mode", "export_aoti", "--cache-dir", str(tmp_path / "packages"))
    first = make_args(*RUN, *where)
    expected = generate(optimize(load_pipeline(first), first), first)[0]
    second = make_args(*RUN, *where, "--use-cached-model")
    image = generate(optimize(load_pipeline(second), second), second)[0]
    assert image.tobytes() == expected.tobytes()


def test_turned_queries_and_keys_lose_less(eager):
    errors = []
    for flags in ((), ("--fa3_rotation",)):
        args = make_args(
            *RUN, *flags, "--compile_export_mode", "compile", "--compile_scope", "blocks"
        )
        if args.plan["fa3"].settings.get("dtype") != "fp8":
            pytest.skip("no float8 attention on this GPU")
        torch._dynamo.reset()
        result = quality.run(optimize(load_pipeline(args), args), args)
        errors.append(quality.compare(result, eager)["latents_relative_l2"])
    assert errors[1] < errors[0], errors


@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "float8"])
def test_persistent_tma_keeps_the_picture(float8, eager):
    """Whatever kernels the compiler prefers, biases inside or behind the products."""
    flags = (*RUN, "--compile_export_mode", "compile", "--compile_scope", "blocks")
    flags += ("--persistent_tma",) if float8 else ("--persistent_tma", "--disable_quant")
    args = make_args(*flags)
    torch._dynamo.reset()
    result = quality.run(optimize(load_pipeline(args), args), args)
    psnr = quality.compare(result, eager)["psnr_db_worst"]
    assert psnr is None or psnr > (30 if float8 else 40)


def test_the_denoising_loop_waits_for_nothing(eager, untuned):
    """No step of the compiled stack may make the host wait for the device."""
    args = make_args(*RUN, "--compile_export_mode", "compile", "--compile_scope", "blocks")
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    forward = pipeline.transformer.forward

    def strict(*positional, **named):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return forward(*positional, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipeline.transformer.forward = strict
    assert quality.compare(quality.run(pipeline, args), eager)["images"] == 1


@pytest.mark.parametrize("loop", [(), ("--modulation_once",)], ids=["stock", "own"])
def test_a_step_mask_keeps_the_graph_and_waits_for_nothing(loop, untuned):
    """One graph for all computed steps; predicting makes the host wait no more than computing."""
    flags = ("--ckpt", "tiny-dev", "--device", "cuda", *loop, "--compile_export_mode", "compile")
    args = make_args(*flags, "--step_mask", "fast")
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    assert pipeline.masked.forward.num_graphs == 1
    masked = pipeline.transformer.forward

    def strict(*positional, **named):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return masked(*positional, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipeline.transformer.forward = strict
    first = generate(pipeline, args)[0]
    with only_known_calls():
        assert generate(pipeline, args)[0].tobytes() == first.tobytes()
    assert len(reused_steps(pipeline, args)["computed"]) == PRESETS["fast"].mask.count("1")
    assert pipeline.masked.forward.num_graphs == 1
    whole = make_args(*flags)
    torch._dynamo.reset()
    expected = generate(optimize(load_pipeline(whole), whole), whole)[0]
    assert quality.psnr_db(first, expected) > 31

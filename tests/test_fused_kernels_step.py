"""The step fused_kernels: which machine gets it, what it refuses, whole pictures by the twins."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, optimized
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

from tests.flux_pieces import inputs, pipeline
from tiny_flux.scenes import Scene, render
from utils import quality
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels import fused_blocks
from utils.steps import fa3, fused_kernels, on, quant

H200 = Machine("cuda", "NVIDIA H200", (9, 0))
PROMPT = ("--prompt", "a red circle on a blue background")
MODELS = {
    "tiny-schnell": (*PROMPT, "--num_images_per_prompt", "2", "--width", "112"),
    "tiny-dev": (*PROMPT, "--ckpt", "tiny-dev", "--num_inference_steps", "8"),
    "tiny-kontext": ("--ckpt", "tiny-kontext", "--num_inference_steps", "8"),
}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let the step run here, where its ops are their twins."""
    monkeypatch.setattr(fused_kernels, "lacking", lambda machine: "")


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """Give a function: model -> the flags of its run, Kontext's with an image."""
    image = tmp_path_factory.mktemp("kontext") / "in.png"
    render(Scene("circle", "red", "blue")).save(image)
    edit = ("--image", str(image), "--prompt", "make the background green")
    return lambda model: MODELS[model] + (edit if model == "tiny-kontext" else ())


def check(machine, **flags):
    defaults = {
        "fused_kernels": True,
        "disable_fa3": False,
        "disable_quant": False,
        "gguf_file": None,
        "swap_loras": False,
        "quant_dtype": None,
        "quant_granularity": "row",
        "quant_filter": "blocks",
        "dtype": torch.bfloat16,
    }
    return fused_kernels.check(SimpleNamespace(machine=machine, **(defaults | flags)))


@pytest.mark.parametrize(
    ("machine", "state"),
    [
        (H200, "on"),
        (Machine("cuda", "L40S", (8, 9)), "on"),
        (Machine("cuda", "RTX 5090", (12, 0)), "on"),
        (Machine("cuda", "A100", (8, 0)), "unavailable"),
        (Machine("cuda", "MI300X", (9, 4), hip="7.0"), "unavailable"),
        (Machine("cpu", "EPYC"), "unavailable"),
    ],
)
def test_each_machine(machine, state):
    verdict = check(machine)
    assert verdict.state == state
    assert verdict.is_on or "needs an NVIDIA GPU of capability 8.9" in verdict.reason


def test_flags(monkeypatch):
    assert check(H200, fused_kernels=False).reason == "no --fused_kernels"
    assert check(H200).settings == {"float8": True}
    assert check(H200, disable_quant=True).settings == {"float8": False}
    assert check(H200, quant_granularity="tensor").settings == {"float8": False}
    refused = check(H200, disable_fa3=True)
    assert refused.state == "refused" and "--disable_fa3" in refused.reason
    monkeypatch.setitem(sys.modules, "triton", None)
    refused = check(H200)
    assert refused.state == "refused" and "pip install triton" in refused.reason
    args = make_args("--device", "cpu")
    assert args.plan["fused_kernels"].state == "off"
    args = make_args("--device", "cpu", "--fused-kernels")
    assert args.plan["fused_kernels"].state == "unavailable"


def plan(float8: bool) -> SimpleNamespace:
    attention = on(backend="sdpa", dtype="bf16")
    linear = on(granularity="row", filter="blocks")
    return SimpleNamespace(
        plan={"fa3": attention, "quant": linear, "fused_kernels": on(float8=float8)}
    )


def test_blocks_of_another_kind_are_refused():
    pipe = pipeline()
    with pytest.raises(UserError, match="FluxAttnProcessor at transformer_blocks"):
        fused_kernels.apply(pipe, plan(False))
    fa3.apply(pipe, plan(False))

    class Other(FluxTransformerBlock):
        pass

    pipe.transformer.transformer_blocks[0].__class__ = Other
    with pytest.raises(UserError, match="found Other"):
        fused_kernels.apply(pipe, plan(False))


def test_a_block_with_a_linear_that_stays_in_bf16_quantises_nothing_itself(float8_on_cpu):
    pipe = pipeline()
    block = pipe.transformer.single_transformer_blocks[1]
    block.proj_mlp = torch.nn.Linear(256, 1000, dtype=torch.bfloat16)
    block.proj_out = torch.nn.Linear(1256, 256, dtype=torch.bfloat16)
    fa3.apply(pipe, plan(True))
    fused_kernels.apply(pipe, plan(True))
    quant.apply(pipe, plan(True))
    blocks = (*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks)
    assert [block.float8 for block in blocks] == [True, True, False]
    with torch.no_grad():
        assert pipe.transformer(**inputs(text=3, height=1, width=5))[0].isfinite().all()


def test_what_the_blocks_would_ignore_is_refused():
    pipe = pipeline()
    fa3.apply(pipe, plan(False))
    fused_kernels.apply(pipe, plan(False))
    call = inputs() | {"joint_attention_kwargs": {"ip_hidden_states": []}}
    with pytest.raises(ValueError, match="take no ip_hidden_states; leave out --fused_kernels"):
        pipe.transformer(**call)
    pipe.transformer.transformer_blocks[0].attn.processor._attention_backend = "sage"
    with pytest.raises(ValueError, match="--attention_backend"):
        pipe.transformer(**inputs())


def compared(flags, reference) -> tuple[dict, object]:
    made, args = optimized(*flags, "--fused_kernels")
    assert args.plan["fused_kernels"].is_on
    kinds = {type(block) for block in made.transformer.single_transformer_blocks}
    assert kinds == {fused_blocks.FusedFluxSingleTransformerBlock}
    return quality.compare(quality.run(made, args), reference), args


@pytest.mark.parametrize("model", MODELS)
def test_pictures_are_those_of_plain_diffusers(model, flags_of, reference, on_a_cpu):
    flags = flags_of(model)
    scores, args = compared(flags, reference(*flags))
    assert args.plan["fused_kernels"].lossless
    assert scores["psnr_db_worst"] is None or scores["psnr_db_worst"] > 40, scores
    assert scores["latents_relative_l2"] < 0.02, scores


@pytest.mark.parametrize("model", MODELS)
def test_pictures_in_float8(model, flags_of, reference, on_a_cpu, float8_on_cpu):
    flags = flags_of(model)
    scores, args = compared(flags, reference(*flags))
    assert args.plan["fused_kernels"].settings["float8"]
    assert scores["psnr_db_worst"] > 30, scores
    assert scores["latents_relative_l2"] < 0.1, scores


def test_in_fp32_nothing_but_rounding(reference, on_a_cpu):
    flags = (*PROMPT, "--disable_bf16")
    scores, _ = compared((*flags, "--disable_quant"), reference(*flags))
    assert scores["latents_relative_l2"] < 1e-5, scores


def test_with_modulation_computed_before_the_loop(reference, on_a_cpu, float8_on_cpu):
    scores, args = compared((*PROMPT, "--modulation_once"), reference(*PROMPT))
    assert args.plan["modulation"].is_on
    assert scores["psnr_db_worst"] > 30, scores


def test_with_a_step_cache(flags_of, reference, on_a_cpu, tmp_path):
    settings = tmp_path / "cache.yaml"
    settings.write_text("{Fn_compute_blocks: 1, residual_diff_threshold: 0.2, max_warmup_steps: 3}")
    flags = flags_of("tiny-dev")
    cached = ("--cache_dit_config", str(settings), "--compile_export_mode", "disabled")
    scores, args = compared((*flags, *cached), reference(*flags))
    assert args.plan["cache_dit"].is_on
    assert scores["psnr_db_worst"] > 20, scores


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["compile", "export_aoti"])
def test_compiled_in_float8(mode, reference, on_a_cpu, float8_on_cpu, tmp_path):
    torch._dynamo.reset()
    where = ("--compile_export_mode", mode, "--cache-dir", str(tmp_path / "packages"))
    scores, args = compared((*PROMPT, *where), reference(*PROMPT))
    assert args.plan[mode].is_on
    assert scores["psnr_db_worst"] > 30, scores

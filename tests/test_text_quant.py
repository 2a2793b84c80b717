"""T5 in float8: which layers, what it does to embeddings and pictures, memory, and refusals."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, optimized
from test_memory import ADA, FLUX
from test_quant import H200
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tests.flux_pieces import relative_error
from utils import explain, roofline
from utils.errors import UserError
from utils.hardware import Machine
from utils.layers import Precision, total
from utils.memory import weights_gib
from utils.memory_tiers import GIB, TIERS, estimate
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.quality import psnr_db
from utils.random_weights import T5_XXL
from utils.steps import compile, on, quant, text_quant
from utils.work import t5

PROMPT = "a red circle on a blue background"
FLAG = "--quant_text_encoder"


def checked(machine, **flags):
    defaults = {"quant_text_encoder": True, "disable_quant": False, "dtype": torch.bfloat16}
    return text_quant.check(SimpleNamespace(machine=machine, **(defaults | flags)))


def test_it_is_asked_for_and_says_what_it_lacks():
    assert make_args("--device", "cpu").plan["text_quant"].state == "off"
    verdict = checked(H200)
    assert verdict.is_on and not verdict.lossless
    assert verdict.settings == {"granularity": "row", "dtype": "e4m3fn"}
    assert checked(Machine("cuda", "MI300X", (9, 4), hip="7.0")).settings["dtype"] == "e4m3fnuz"
    for machine in (Machine("cpu", "EPYC"), Machine("cuda", "A100", (8, 0))):
        assert checked(machine).state == "unavailable"
    with pytest.raises(UserError, match=r"--require text_quant: .*found a CPU"):
        make_args("--device", "cpu", FLAG, "--require", "text_quant")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"disable_quant": True}, "found --disable_quant"),
        ({"dtype": torch.float32}, "found --disable_bf16"),
    ],
)
def test_what_does_not_go_together_is_refused_in_one_line(flags, says):
    verdict = checked(H200, **flags)
    assert verdict.state == "refused" and says in verdict.reason and "\n" not in verdict.reason


def test_a_missing_torchao_is_refused(monkeypatch):
    monkeypatch.setattr(quant, "import_problem", lambda *modules: "no module torchao")
    assert "pip install torchao" in checked(H200).reason


@pytest.fixture
def text_alone(float8_on_cpu):
    """Give a pipeline whose T5 alone is float8, and the settled run."""
    args = make_args("--device", "cpu", FLAG, "--disable_fa3", "--prompt", PROMPT)
    pipeline = load_pipeline(args)
    return pipeline, args, text_quant.apply(pipeline, args)


def test_exactly_the_blocks_linears_become_float8(text_alone):
    pipeline, _, said = text_alone
    encoder = pipeline.text_encoder_2
    named = {n: m for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    assert len(named) == 14 and all(quant.is_float8(module) for module in named.values())
    assert "14 Linears of T5 in float8, one scale per row" in said
    others = [p for n, p in encoder.named_parameters() if n.rpartition(".")[0] not in named]
    assert {p.dtype for p in others} == {torch.bfloat16}
    assert not any(is_traceable_wrapper_subclass(p) for p in pipeline.text_encoder.parameters())
    assert not any(is_traceable_wrapper_subclass(p) for p in pipeline.transformer.parameters())


def test_the_picture_stays_and_only_through_its_text(text_alone):
    pipeline, args, _ = text_alone
    plain = load_pipeline(args)
    call = {"prompt": [PROMPT], "prompt_2": [PROMPT], "max_sequence_length": 64}
    with torch.no_grad():
        found, expected = (p.encode_prompt(**call) for p in (pipeline, plain))
    assert 0 < relative_error(found[0], expected[0]) < 0.05
    assert torch.equal(found[1], expected[1])  # CLIP
    args.max_sequence_length = 64
    images = [generate(p, args)[0] for p in (pipeline, plain)]
    assert psnr_db(*images) > 40


def test_layers_that_cannot_be_float8_are_named_and_none_at_all_is_an_error(float8_on_cpu):
    args = make_args("--device", "cpu", FLAG)
    pipeline = load_pipeline(args)
    mlp = pipeline.text_encoder_2.encoder.block[0].layer[1].DenseReluDense
    mlp.wo = mlp.wo.float()  # as transformers keeps it beside fp16
    mlp.wi_0 = torch.nn.Linear(64, 100, bias=False, dtype=torch.bfloat16)
    said = text_quant.apply(pipeline, args)
    assert "block.0.layer.1.DenseReluDense.wo (torch.float32, not bf16)" in said
    assert "block.0.layer.1.DenseReluDense.wi_0 (100x64 is not divisible by 16)" in said
    assert "12 Linears" in said and not quant.is_float8(mlp.wo)
    fp32 = SimpleNamespace(text_encoder_2=load_pipeline(args).text_encoder_2.float())
    with pytest.raises(UserError, match="--quant_text_encoder: no layer of T5 can be float8"):
        text_quant.apply(fp32, args)


def test_the_servers_t5_is_float8_too_and_its_rows_are_independent(float8_on_cpu):
    from triton_models.components import T5Encoder
    from triton_models.parts import settings

    encoder = T5Encoder(settings(f"--device cpu --disable_fa3 {FLAG}"))
    block = encoder.pipeline.text_encoder_2.encoder.block[0]
    assert quant.is_float8(block.layer[0].SelfAttention.q)
    both = encoder([PROMPT, "a large green square"], 32)
    assert torch.equal(both[:1], encoder([PROMPT], 32))


def test_tiers_move_float8_t5_and_change_no_bit(float8_on_cpu):
    size = ("--height", "64", "--width", "64", "--max_sequence_length", "32")
    flags = (FLAG, "--disable_fa3", *size)
    results = []
    for tier in ("full", "encoders"):
        pipeline, args = optimized("--memory", tier, *flags, "--num_inference_steps", "1")
        results.append(generate(pipeline, args, output_type="latent"))
    assert torch.equal(*results)


# --- what it is for ----------------------------------------------------------------------------


def test_the_estimate_counts_the_weights_there_are(text_alone):
    pipeline, args, _ = text_alone
    found = estimate(args, "full", text="fp8")
    assert found.weights / GIB == pytest.approx(weights_gib(pipeline), rel=0.01)
    assert estimate(args, "full").weights > found.weights


def test_float8_t5_is_half_and_all_of_flux_stays_on_24_gb(as_machine):
    as_machine(ADA)
    args = make_args(*FLUX, FLAG, "--memory", "full", "--device", "cuda")
    without, with_it = (estimate(args, "full", "fp8", text=text) for text in ("", "fp8"))
    assert args.memory_estimate == with_it
    saved = (without.weights - with_it.weights) / GIB
    linears = T5_XXL["num_layers"] * (4 * 4096**2 + 3 * 4096 * 10240)
    assert saved == pytest.approx(linears / GIB, rel=1e-6)  # one byte of each
    assert with_it.gib < 24 * 10**9 / GIB * 0.98 < without.gib
    needed = [estimate(args, tier, "fp8", text="fp8").gib for tier in TIERS]
    assert needed == sorted(needed, reverse=True)


def test_the_roofline_counts_float8_text():
    layers = {p: t5(T5_XXL, 1, 256, p) for p in (Precision(), Precision(text="fp8"))}
    plain, float8 = layers.values()
    for what in ("flop", "parameters"):
        assert total(plain, what) == total(float8, what)
    assert 0.5 < total(float8, "bytes", "linear") / total(plain, "bytes", "linear") < 0.55
    assert {x.dtype for x in float8 if x.kind == "linear"} == {"fp8"}
    assert {x.dtype for x in float8 if x.kind == "attention"} == {"bf16"}
    args = make_args("--device", "cpu")
    args.plan["text_quant"] = on()
    assert roofline.precision_of(args) == Precision(text="fp8")


def test_explain_counts_it():
    args = make_args("--device", "cpu", FLAG, checks=False)
    settled = explain._settle(args, H200)
    assert roofline.precision_of(settled).text == "fp8"


@pytest.mark.slow
@pytest.mark.parametrize(("outliers", "least", "most"), [(False, 0.03, 0.08), (True, 0.05, 0.2)])
def test_two_layers_of_full_width(float8_on_cpu, outliers, least, most):
    """Random weights of T5-XXL's size, with and without channels that stand far out."""
    from transformers import T5Config, T5EncoderModel

    from utils.random_weights import _fill

    with torch.device("meta"):
        model = T5EncoderModel(T5Config(**(T5_XXL | {"num_layers": 2, "vocab_size": 256})))
    model = model.bfloat16().to_empty(device="cpu").eval().requires_grad_(False)
    _fill(model, torch.Generator().manual_seed(0))
    model.encoder.embed_tokens.weight = model.shared.weight  # to_empty() has parted them
    for name, parameter in model.named_parameters():
        if outliers and name.endswith("layer_norm.weight") and "final" not in name:
            parameter[::512] *= 24
        if outliers and name.endswith("wo.weight"):
            parameter[7] *= 30
    ids = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(1))
    expected = model(ids)[0]
    args = SimpleNamespace(plan={"text_quant": on(granularity="row")})
    text_quant.apply(SimpleNamespace(text_encoder_2=model), args)
    assert least < relative_error(model(ids)[0], expected) < most


def test_untuned_code_is_searched_for_nowhere(untuned):
    args = make_args("--device", "cpu", "--compile_export_mode", "compile")
    args.machine = H200
    options = compile.compiler_options(args)
    assert not any("autotune" in name for name in options)
    assert options["coordinate_descent_tuning"] is False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("flags", [(), ("--compile_text_encoders",)])
def test_on_gpu(flags, untuned):
    from utils.hardware import detect

    if reason := quant.lacking(detect("cuda")):
        pytest.skip(reason)
    mode = ("--compile_export_mode", "compile", "--compile_scope", "blocks")
    run = ("--ckpt", "tiny-schnell", "--device", "cuda", "--prompt", PROMPT, *mode)
    torch._dynamo.reset()
    args = make_args(*run, FLAG, *flags)
    image = generate(optimize(load_pipeline(args), args), args)[0]
    plain = make_args(*run[:6], "--disable_quant", "--disable_fa3")
    assert psnr_db(image, generate(load_pipeline(plain), plain)[0]) > 30

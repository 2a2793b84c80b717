"""MXFP8 and NVFP4 linear layers: numbers by emulation on a CPU, and what else follows from them."""

import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args
from test_quant import FEW, H200, checked, expected_layers

from tests.flux_pieces import inputs, relative_error, transformer
from utils import roofline
from utils.errors import UserError
from utils.explain import explain
from utils.hardware import Machine
from utils.memory import weights_gib
from utils.memory_tiers import estimate
from utils.peaks import CARDS
from utils.steps import fa3, fused_kernels, on, persistent_tma, quant

B200 = Machine("cuda", "NVIDIA B200", (10, 0), memory_gib=178.0)
RTX = Machine("cuda", "NVIDIA GeForce RTX 5090", (12, 0), memory_gib=32.0)
FLUX = ("--ckpt", "black-forest-labs/FLUX.1-dev", "--random_weights", "--attention_backend")
FLUX += ("sdpa_cudnn",)
SETTINGS = {
    "mxfp8": {"granularity": "block", "filter": "blocks", "dtype": "mxfp8"},
    "nvfp4": {"granularity": "block", "filter": "blocks", "dtype": "nvfp4", "cast": "torch"},
}
ROW = {"granularity": "row", "filter": "blocks", "dtype": "e4m3fn"}


def small() -> SimpleNamespace:
    return SimpleNamespace(transformer=transformer(heads=1))


def planned(settings: dict, **others) -> SimpleNamespace:
    return SimpleNamespace(plan={"quant": on(**settings), **others})


@pytest.mark.parametrize("dtype", SETTINGS)
def test_exactly_the_blocks_linears_have_the_format(dtype, emulated):
    pipe, layers = small(), expected_layers(fused=False)
    summary = quant.apply(pipe, planned(SETTINGS[dtype]))
    kinds = {
        name: quant._kind(module)
        for name, module in pipe.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    assert {name for name, kind in kinds.items() if kind == dtype} == layers
    assert set(kinds.values()) == {"", dtype}
    assert f"{len(layers)} Linears in {dtype}, one scale per block" in summary


# Measured on the random transformer: row 0.019, mxfp8 0.022, nvfp4 0.074.
def test_numbers_against_bf16_and_row_wise_float8(emulated):
    errors, reference = {}, small().transformer(**inputs(2, **FEW))[0]
    for name, settings in {"row": ROW, **SETTINGS}.items():
        pipe = small()
        quant.apply(pipe, planned(settings))
        errors[name] = relative_error(pipe.transformer(**inputs(2, **FEW))[0], reference)
    assert 0.5 * errors["row"] < errors["mxfp8"] < 1.5 * errors["row"]
    assert 2 * errors["row"] < errors["nvfp4"] < 0.15


def test_an_outlying_channel_stays_in_its_block(emulated):
    """A row's scale follows its largest number; a block's leaves the other blocks alone."""
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= 1e6
    x = x.bfloat16()
    errors = {}
    for name, settings in {"row": ROW, "mxfp8": SETTINGS["mxfp8"]}.items():
        torch.manual_seed(0)
        layer = torch.nn.Linear(256, 64, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight[:, 3] = 0  # what the outlier itself brings is another question
            expected = layer(x)
            blocks = torch.nn.ModuleDict({"transformer_blocks": torch.nn.Sequential(layer)})
            quant.apply(SimpleNamespace(transformer=blocks), planned(settings))
            errors[name] = relative_error(layer(x), expected)
    assert errors["row"] > 0.6  # nearly all but the outlier becomes 0
    assert errors["mxfp8"] < 0.6 * errors["row"]  # its 31 neighbours do: sqrt(31 / 256) = 0.35


def test_layers_need_blocks_of_32():
    model = small().transformer
    name = "single_transformer_blocks.0.proj_mlp"
    model.single_transformer_blocks[0].proj_mlp = torch.nn.Linear(272, 1024)
    chosen, left_out = quant.select(model, "block", "blocks")
    assert left_out == {name: "1024x272 is not divisible by 32"} and name not in chosen
    chosen, left_out = quant.select(model, "row", "blocks")
    assert name in chosen and not left_out


@pytest.mark.parametrize("dtype", quant.BLOCK_FORMATS)
def test_each_machine_and_flag(dtype, monkeypatch):
    for machine in (B200, RTX):
        verdict = checked(machine, quant_dtype=dtype)
        assert verdict.is_on and not verdict.lossless
        assert verdict.settings["dtype"] == dtype and verdict.settings["granularity"] == "block"
    for machine in (H200, Machine("cpu", "EPYC"), Machine("cuda", "MI355X", (9, 5), hip="7.0")):
        verdict = checked(machine, quant_dtype=dtype)
        assert verdict.state == "refused"
        assert f"--quant_dtype {dtype}: {dtype} products need a Blackwell GPU" in verdict.reason
        assert machine.short() in verdict.reason
    assert checked(B200, quant_dtype=dtype, disable_quant=True).state == "off"
    for changed in ({"quant_granularity": "tensor"}, {"quant_filter": "all"}):
        for machine in (B200, H200):
            refused = checked(machine, quant_dtype=dtype, **changed)
            assert refused.state == "refused" and f"--quant_dtype {dtype}" in refused.reason
    refused = checked(B200, torch.float32, quant_dtype=dtype)
    assert refused.state == "refused" and f"{dtype} needs bf16 weights" in refused.reason
    monkeypatch.setitem(sys.modules, "torchao.prototype.mx_formats", SimpleNamespace())
    refused = checked(B200, quant_dtype=dtype)
    assert refused.state == "refused" and "without MXDynamic" in refused.reason
    assert checked(B200).is_on  # float8 needs nothing of that module


def test_the_cast_is_by_mslk_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(quant, "find_spec", lambda name: name == "mslk")
    assert checked(B200, quant_dtype="nvfp4").settings["cast"] == "mslk"
    monkeypatch.setattr(quant, "find_spec", lambda name: None)
    assert checked(B200, quant_dtype="nvfp4").settings["cast"] == "torch"
    assert quant._config(SETTINGS["nvfp4"]).use_triton_kernel is False
    assert quant._config(SETTINGS["nvfp4"] | {"cast": "mslk"}).use_triton_kernel is True


@pytest.mark.parametrize("dtype", quant.BLOCK_FORMATS)
def test_what_else_follows_from_the_format(dtype, as_machine):
    as_machine(B200)
    args = make_args(*FLUX, "--quant_dtype", dtype, "--fused_kernels", "--persistent_tma")
    assert args.compile_export_mode == "compile" and dtype in args.mode_reason
    assert args.plan["fused_kernels"].settings == {"float8": False}
    assert args.plan["persistent_tma"].settings == {"bias": "inside"}
    assert roofline.precision_of(args).linear == dtype and roofline.precision_of(args).other == ""
    for machine in ("b200", "h200"):
        text = explain(args, machine)
        assert (f"{dtype}: block linear layers" in text) == (machine == "b200")
    for changed, words in (
        (("--compile_export_mode", "export_aoti"), "use --compile_export_mode compile"),
        (("--memory", "group", "--compile_export_mode", "disabled"), "not tried with weights"),
    ):
        with pytest.raises(UserError, match=words):
            make_args(*FLUX, "--quant_dtype", dtype, *changed)
    as_machine(Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=140.0))
    with pytest.raises(UserError, match=f"--quant_dtype {dtype}: .* found NVIDIA H200"):
        make_args(*FLUX, "--quant_dtype", dtype, "--memory", "group")


def test_data_sheets_have_a_rate_for_each_format_of_their_machine():
    for card in CARDS.values():
        rates = card.peaks.tflop_per_s
        for dtype in quant.BLOCK_FORMATS:
            assert (dtype in rates) == (not quant.lacking(card.machine, dtype))
        assert rates.get("mxfp8") in (None, rates.get("fp8"))


@pytest.mark.parametrize("dtype", SETTINGS)
def test_the_estimate_of_the_weights_is_that_of_the_modules(dtype, emulated):
    from utils.pipeline_utils import load_pipeline

    args = make_args("--device", "cpu", "--memory", "full")
    pipe = load_pipeline(args)
    quant.apply(pipe, planned(SETTINGS[dtype]))
    found = estimate(args, "full", dtype).weights / 2**30
    assert found == pytest.approx(weights_gib(pipe), rel=0.01)
    assert found < 0.9 * estimate(args, "full").weights / 2**30


def test_persistent_tma_and_fused_blocks_leave_the_format_alone(emulated):
    pipe = small()
    reference = pipe.transformer(**inputs(2, **FEW))[0]
    attention = on(backend="sdpa", dtype="bf16")
    args = planned(SETTINGS["mxfp8"], fa3=attention, fused_kernels=on(float8=False))
    for step in (fa3, fused_kernels, quant, persistent_tma):
        step.apply(pipe, args)
    kinds = {type(m) for m in pipe.transformer.modules() if isinstance(m, torch.nn.Linear)}
    assert kinds == {torch.nn.Linear}  # no LinearThenBias
    assert relative_error(pipe.transformer(**inputs(2, **FEW))[0], reference) < 0.05


def test_the_compiler_takes_the_emulated_format_whole(emulated):
    pipe = small()
    quant.apply(pipe, planned(SETTINGS["mxfp8"]))
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    x = torch.randn(1, 4, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
        assert relative_error(compiled, layer(x)) < 0.01


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", quant.BLOCK_FORMATS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 77), (2, 33), (3, 129)])
def test_linear_on_gpu(dtype, batch, tokens):
    from utils.hardware import detect

    if lacking := quant.lacking(detect("cuda"), dtype):
        pytest.skip(lacking)
    pipe = small()
    pipe.transformer.cuda()
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    x = torch.randn(batch, tokens, 128, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    quant.apply(pipe, planned(checked(detect("cuda"), quant_dtype=dtype).settings))
    limit = {"mxfp8": 0.05, "nvfp4": 0.2}[dtype]
    assert relative_error(layer(x), expected) < limit
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)(x)
    assert relative_error(compiled, expected) < limit

"""Float8 linear layers: numbers on a CPU (torchao's hardware check patched), and every refusal."""

import sys
from types import SimpleNamespace

import pytest
import torch

from tests.flux_pieces import inputs, pipeline, relative_error, transformer
from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import fa3, fused_projections, on, quant

DOUBLE = (
    *("attn.to_out.0", "attn.to_add_out", "ff.net.0.proj", "ff.net.2"),
    *("ff_context.net.0.proj", "ff_context.net.2"),
)
SEPARATE = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
FEW = {"text": 3, "height": 1, "width": 5}  # tokens: torch's float8 product on a CPU is a slow one


def arguments(granularity="row", which="blocks", **others):
    return SimpleNamespace(plan={"quant": on(granularity=granularity, filter=which)}, **others)


def quantised(model) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and quant.is_float8(module)
    }


def expected_layers(fused: bool) -> set[str]:
    first = (*DOUBLE, *(("attn.to_qkv", "attn.to_added_qkv") if fused else (*SEPARATE, *ADDED)))
    single = ("proj_mlp", "proj_out", *(("attn.to_qkv",) if fused else SEPARATE))
    return {f"transformer_blocks.0.{name}" for name in first} | {
        f"single_transformer_blocks.{i}.{name}" for i in range(2) for name in single
    }


@pytest.mark.parametrize("fused", [False, True])
def test_exactly_the_blocks_linears_are_quantised(cpu_float8, fused, capsys):
    pipe = pipeline()
    if fused:
        fused_projections.apply(pipe, SimpleNamespace())
    summary = quant.apply(pipe, arguments())
    assert quantised(pipe.transformer) == expected_layers(fused)
    assert f"{len(expected_layers(fused))} Linears" in summary
    assert summary in capsys.readouterr().out


def test_the_filter_all_takes_every_linear(cpu_float8):
    pipe = pipeline()
    quant.apply(pipe, arguments("tensor", "all"))
    linears = {n for n, m in pipe.transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert quantised(pipe.transformer) == linears
    assert {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"} <= linears


# Against the bf16 model, whose blocks are made to matter (tests/flux_pieces.py).
# Measured: row/blocks 0.021, tensor/blocks 0.021, row/all 0.049, tensor/all 0.053.
@pytest.mark.parametrize(("fused", "batch"), [(False, 1), (True, 2)])
def test_numbers_of_row_wise_blocks(cpu_float8, fused, batch):
    pipe = pipeline()
    reference = pipe.transformer(**inputs(batch, **FEW))[0]
    if fused:
        fused_projections.apply(pipe, SimpleNamespace())
    quant.apply(pipe, arguments())
    assert 0 < relative_error(pipe.transformer(**inputs(batch, **FEW))[0], reference) < 0.03


def test_row_wise_blocks_beat_one_scale_for_every_linear(cpu_float8):
    errors = {}
    for choice in (("row", "blocks"), ("tensor", "all")):
        pipe = pipeline()
        reference = pipe.transformer(**inputs(**FEW))[0]
        quant.apply(pipe, arguments(*choice))
        errors[choice] = relative_error(pipe.transformer(**inputs(**FEW))[0], reference)
    assert errors["row", "blocks"] < 0.6 * errors["tensor", "all"]


def test_rows_of_very_different_size_need_their_own_scale(cpu_float8):
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 1e5  # one token far out, as in FLUX's text stream
    x = x.bfloat16()
    errors = {}
    for granularity in ("row", "tensor"):
        pipe = pipeline()
        layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
        expected = layer(x)
        quant.apply(pipe, arguments(granularity))
        errors[granularity] = relative_error(layer(x)[:, 1:], expected[:, 1:])
    assert errors["row"] < 0.05  # measured 0.037
    assert errors["tensor"] > 4 * errors["row"]


def test_together_with_float8_attention(cpu_float8):
    pipe = pipeline()
    reference = pipe.transformer(**inputs(2, **FEW))[0]
    fused_projections.apply(pipe, SimpleNamespace())
    args = arguments()
    args.plan["fa3"] = on(backend="fa3", dtype="fp8")
    fa3.apply(pipe, args)
    quant.apply(pipe, args)
    assert relative_error(pipe.transformer(**inputs(2, **FEW))[0], reference) < 0.03


def test_layers_that_cannot_be_float8_are_named(cpu_float8):
    pipe = pipeline()
    odd = torch.nn.Linear(256, 100, dtype=torch.bfloat16)
    pipe.transformer.single_transformer_blocks[0].proj_mlp = odd
    summary = quant.apply(pipe, arguments())
    assert "single_transformer_blocks.0.proj_mlp (100x256 is not divisible by 16)" in summary
    assert not quant.is_float8(odd)


def test_a_square_of_128_with_one_scale_stays_out(cpu_float8):
    # torchao would take its scale for blockwise and assert in the forward pass
    pipe = SimpleNamespace(transformer=transformer(heads=1))
    reference = pipe.transformer(**inputs(**FEW))[0]
    summary = quant.apply(pipe, arguments("tensor"))
    assert "transformer_blocks.0.attn.to_q (128x128 with one scale" in summary
    assert relative_error(pipe.transformer(**inputs(**FEW))[0], reference) < 0.03
    pipe = SimpleNamespace(transformer=transformer(heads=1))
    assert "left out" not in quant.apply(pipe, arguments("row"))
    assert relative_error(pipe.transformer(**inputs(**FEW))[0], reference) < 0.03


def test_nothing_to_quantise_and_layers_left_by_torchao_are_errors(cpu_float8, monkeypatch):
    pipe = SimpleNamespace(transformer=torch.nn.Sequential(torch.nn.Linear(16, 16)))
    with pytest.raises(UserError, match="--disable_quant"):
        quant.apply(pipe, arguments())
    monkeypatch.setattr("torchao.quantization.quantize_", lambda *args, **kwargs: None)
    with pytest.raises(RuntimeError, match="unquantised"):
        quant.apply(pipeline(), arguments())


def test_global_inductor_flags_stay_as_they_are(cpu_float8):
    from torch._inductor import config

    before = config.save_config_portable()
    quant.apply(pipeline(), arguments())
    assert config.save_config_portable() == before


def checked(machine, dtype=torch.bfloat16, **flags):
    defaults = {
        "disable_quant": False,
        "swap_loras": False,
        "gguf_file": None,
        "quant_dtype": None,
        "quant_granularity": "row",
        "quant_filter": "blocks",
    }
    return quant.check(SimpleNamespace(machine=machine, dtype=dtype, **(defaults | flags)))


H200 = Machine("cuda", "H200", (9, 0))


@pytest.mark.parametrize(
    ("machine", "state", "text"),
    [
        (Machine("cpu", "EPYC"), "unavailable", "capability 8.9 or newer, found a CPU"),
        (Machine("cuda", "A100", (8, 0)), "unavailable", "found A100 (sm80)"),
        (Machine("cuda", "L40S", (8, 9)), "on", ""),
        (H200, "on", ""),
        (Machine("cuda", "RTX 5090", (12, 0)), "on", ""),
        (Machine("cuda", "MI300X", (9, 4), hip="7.0"), "on", ""),
        (Machine("cuda", "MI355X", (9, 5), hip="7.0"), "on", ""),
        (Machine("cuda", "MI250X", (9, 0), hip="7.0"), "unavailable", "gfx94x or gfx95x"),
        (Machine("cuda", "RX 7900", (11, 0), hip="7.0"), "unavailable", "gfx94x or gfx95x"),
    ],
)
def test_each_machine(machine, state, text):
    verdict = checked(machine)
    assert verdict.state == state
    assert text in verdict.reason
    assert not (verdict.is_on and verdict.lossless)
    if verdict.is_on:
        assert (verdict.settings["dtype"] == "e4m3fnuz") == (machine.name == "MI300X")


def test_flags():
    assert checked(H200, disable_quant=True).state == "off"
    refused = checked(H200, torch.float32)
    assert refused.state == "refused"
    assert "--disable_bf16" in refused.reason
    assert "--disable_quant" in refused.reason
    assert checked(H200, torch.float32, quant_granularity="tensor").is_on
    assert checked(Machine("cpu", "EPYC"), torch.float32).state == "unavailable"


def test_torchao_missing_broken_or_too_old_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", SimpleNamespace(__version__="0.9.0"))
    monkeypatch.setitem(sys.modules, "torchao.quantization", SimpleNamespace())
    monkeypatch.setattr(
        sys.modules["torchao"], "quantization", sys.modules["torchao.quantization"], raising=False
    )
    assert "torchao 0.9.0 without Float8Dynamic" in checked(H200).reason
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert "torchao is installed but broken" in checked(H200).reason
    monkeypatch.delitem(sys.modules, "torchao.quantization")
    monkeypatch.setitem(sys.modules, "torchao", None)
    verdict = checked(H200)
    assert verdict.state == "refused"
    assert "found no module torchao" in verdict.reason
    assert "pip install torchao" in verdict.reason
    assert "--disable_quant" in verdict.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (1, 77), (2, 33), (3, 129)])
def test_linear_on_gpu(granularity, batch, tokens):
    from utils.hardware import detect

    if quant.lacking(detect("cuda")):
        pytest.skip(quant.lacking(detect("cuda")))
    pipe = SimpleNamespace(transformer=transformer(heads=2).cuda())
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    x = torch.randn(batch, tokens, 256, device="cuda", dtype=torch.bfloat16)
    expected = layer(x)
    reference = pipe.transformer(**on_cuda(inputs(batch)))[0]
    quant.apply(pipe, arguments(granularity))
    assert relative_error(layer(x), expected) < 0.05
    assert relative_error(pipe.transformer(**on_cuda(inputs(batch)))[0], reference) < 0.04


def on_cuda(call):
    return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in call.items()}

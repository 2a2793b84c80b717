"""Persistent TMA kernels: the compiler is told, and no float8 product keeps its bias."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_args
from test_quant import FEW, H200, arguments

from tests.flux_pieces import inputs, pipeline, relative_error, traced_products
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels.float8_linear import linear_float8
from utils.kernels.linear import LinearThenBias
from utils.kernels.modulate import quantize_rows
from utils.pipeline_utils import STEPS, optimize
from utils.steps import fused_projections, off, on, persistent_tma, quant
from utils.steps.compile import compiler_options

SWITCH = "triton.enable_persistent_tma_matmul"


def checked(machine, **flags):
    defaults = {"persistent_tma": True, "compile_export_mode": "compile", "disable_quant": True}
    return persistent_tma.check(SimpleNamespace(machine=machine, **(defaults | flags)))


def test_it_is_asked_for_and_needs_hopper_and_a_compiler(monkeypatch):
    assert make_args("--device", "cpu").plan["persistent_tma"].state == "off"
    assert checked(H200).settings == {"bias": "inside"}
    for machine in (
        Machine("cpu", "EPYC"),
        Machine("cuda", "L40S", (8, 9)),
        Machine("cuda", "MI300X", (9, 4), hip="7.0"),
    ):
        verdict = checked(machine)
        assert verdict.state == "unavailable" and machine.short() in verdict.reason
    for version, state in (("2.11.0+cu130", "refused"), ("2.13.0", "on")):
        monkeypatch.setattr(torch, "__version__", version)
        verdict = checked(H200, compile_export_mode="export_aoti")
        assert verdict.state == state, verdict
    verdict = checked(H200, compile_export_mode="disabled")
    assert verdict.state == "refused" and "--compile_export_mode disabled" in verdict.reason
    with pytest.raises(UserError, match=r"--require persistent_tma: .*9\.0 or newer"):
        make_args("--device", "cpu", "--persistent_tma", "--require", "persistent_tma")


def test_the_compiler_is_told_and_knows_the_switch():
    args = make_args("--device", "cpu", "--disable_quant")
    args.machine, args.compile_export_mode = H200, "compile"
    assert SWITCH not in compiler_options(args)
    args.persistent_tma = True
    assert compiler_options(args)[SWITCH] is True
    assert SWITCH in torch._inductor.list_options()


def test_a_process_that_holds_the_decoder_alone_leaves_it_out():
    plan = {step.NAME: off("") for step in STEPS} | {persistent_tma.NAME: on()}
    optimize(SimpleNamespace(transformer=None), SimpleNamespace(plan=plan), ("decoder", "pipeline"))


def test_no_float8_product_keeps_its_bias_and_the_numbers_stay(cpu_float8):
    pipe = pipeline()
    plain = pipe.transformer(**inputs(2, **FEW))[0]
    fused_projections.apply(pipe, SimpleNamespace())
    quant.apply(pipe, arguments())
    before = pipe.transformer(**inputs(2, **FEW))[0]
    persistent_tma.apply(pipe, None)
    for module in pipe.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            assert isinstance(module, LinearThenBias) == quant.is_float8(module)
    after = pipe.transformer(**inputs(2, **FEW))[0]
    # One more rounding to bf16 of each product, which now and then moves the cast that follows
    assert 0 < relative_error(after, before) < relative_error(before, plain)
    assert relative_error(after, plain) < 0.03

    block = pipe.transformer.single_transformer_blocks[0]
    assert [bias for _, bias, _ in traced_products(block)] == [None, None]

    width = block.proj_mlp.in_features
    x = torch.randn(1, 3, width, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer, rows = block.proj_mlp, quantize_rows(x)  # the fused kernels' way into the same product
    bias_after = linear_float8(*rows, layer)
    layer.__class__ = torch.nn.Linear
    bias_inside = linear_float8(*rows, layer)
    assert 0 < relative_error(bias_after, bias_inside) < 2**-8  # one rounding to bf16

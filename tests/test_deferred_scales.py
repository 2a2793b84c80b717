"""Scales and bias behind a float8 product: numbers against float64, graphs, and every refusal."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_args
from test_quant import FEW, H200, arguments, on_cuda

from tests.flux_pieces import inputs, pipeline, relative_error, traced_products, transformer
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels.deferred_scales import LinearThenScales
from utils.steps import deferred_scales, fused_projections, persistent_tma, quant
from utils.steps.compile import compiler_options


def flags(machine=H200, **others):
    defaults = {
        "deferred_scales": True,
        "compile_export_mode": "compile",
        "disable_quant": False,
        "swap_loras": False,
        "gguf_file": None,
        "quant_granularity": "row",
        "quant_dtype": None,
        "quant_filter": "blocks",
        "fused_kernels": False,
        "dtype": torch.bfloat16,
    }
    return SimpleNamespace(machine=machine, **(defaults | others))


def test_it_is_asked_for_and_needs_an_nvidia_gpu_with_float8():
    assert make_args("--device", "cpu").plan["deferred_scales"].state == "off"
    verdict = deferred_scales.check(flags())
    assert verdict.is_on and not verdict.lossless and verdict.settings == deferred_scales.LIMITS
    assert deferred_scales.check(flags(Machine("cuda", "L40S", (8, 9)))).is_on
    for machine in (
        Machine("cpu", "EPYC"),
        Machine("cuda", "A100", (8, 0)),
        Machine("cuda", "MI300X", (9, 4), hip="7.0"),
    ):
        verdict = deferred_scales.check(flags(machine))
        assert verdict.state == "unavailable" and machine.short() in verdict.reason
    with pytest.raises(UserError, match=r"--require deferred_scales: .*8\.9 or newer"):
        make_args("--device", "cpu", "--deferred_scales", "--require", "deferred_scales")


@pytest.mark.parametrize(
    ("others", "says"),
    [
        ({"compile_export_mode": "disabled"}, "--compile_export_mode disabled, expected compile"),
        ({"quant_dtype": "nvfp4"}, "found --quant_dtype nvfp4, expected float8"),
        ({"quant_granularity": "tensor"}, "found --quant_granularity tensor, expected row"),
        ({"fused_kernels": True}, "found --fused_kernels"),
        ({"disable_quant": True}, "no float8 products (--disable_quant)"),
        ({"swap_loras": True}, "no float8 products (--swap_loras"),
        ({"gguf_file": "a.gguf", "gguf_mode": None}, "no float8 products (a GGUF's weights"),
    ],
)
def test_what_leaves_nothing_to_defer_or_to_fuse_is_refused_in_one_line(others, says):
    verdict = deferred_scales.check(flags(**others))
    assert verdict.state == "refused" and says in verdict.reason
    assert verdict.reason.startswith("--deferred_scales: ") and "\n" not in verdict.reason


def test_a_refused_quant_is_reported_once():
    args = flags(dtype=torch.float32)
    assert quant.check(args).state == "refused" and deferred_scales.check(args).state == "off"


def test_the_compiler_is_told_and_knows_the_limits():
    args = make_args("--device", "cpu", "--disable_quant")
    vars(args).update(vars(flags()))
    told = compiler_options(args)
    assert told.items() >= deferred_scales.LIMITS.items()
    assert told.keys() <= set(torch._inductor.list_options())
    args.deferred_scales = False
    assert not deferred_scales.LIMITS.keys() & compiler_options(args).keys()


def layers(rows: int, columns: int, bias: bool):
    """Give the same float8 Linear three times: as it was, torchao's, and with its scales behind."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        exact = torch.nn.Linear(columns, rows, bias=bias).bfloat16().requires_grad_(False)
        exact.weight *= torch.logspace(-2, 2, rows)[:, None]  # scales that differ
    made = []
    for deferred in (False, True):
        layer = torch.nn.Linear(columns, rows, bias=bias).bfloat16().requires_grad_(False)
        layer.load_state_dict(exact.state_dict())
        holder = torch.nn.Module()
        holder.transformer_blocks = torch.nn.ModuleList([layer])
        pipe = SimpleNamespace(transformer=holder)
        quant.apply(pipe, arguments())
        if deferred:
            deferred_scales.apply(pipe, None)
        made.append(layer)
    return exact, *made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "columns"), [(64, 256), (48, 3072), (16, 15360)])
def test_as_near_to_float64_as_torchaos_own_product(cpu_float8, rows, columns, bias):
    exact, row, behind = layers(rows, columns, bias)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))
    x[:, 0] *= 1e4  # one token and one channel far out
    x[..., 5] *= 30
    x = x.bfloat16()
    weight = exact.weight.double()
    truth = x.double() @ weight.t() + (exact.bias.double() if bias else 0)
    for token in range(3):  # each on its own: the first would hide the others
        errors = [relative_error(f(x)[:, token], truth[:, token]) for f in (row, behind)]
        assert 0 < errors[1] <= 1.1 * errors[0], (token, errors)
    # Against what the casts leave: only the roundings of the product itself
    cast = (x.float() / (s := x.float().abs().amax(-1, keepdim=True) / 448)).to(torch.float8_e4m3fn)
    left = cast.double() * s @ (row.weight.qdata.double() * row.weight.scale).t()
    left = left + (exact.bias.double() if bias else 0)
    assert relative_error(behind(x), left) < 2**-7  # two roundings to bf16
    assert behind(x[0]).shape == (3, rows) and torch.equal(behind(x[0]), behind(x)[0])
    assert not behind(torch.zeros_like(x)).isnan().any()


def test_the_unscaled_sum_cannot_overflow(cpu_float8):
    _, _, behind = layers(16, 15360, bias=False)
    largest = torch.full_like(behind.weight.qdata, 448)
    behind.weight.qdata.copy_(largest)
    out = behind(torch.full((1, 15360), 448.0, dtype=torch.bfloat16))
    assert out.isfinite().all() and (out > 0).all()


def test_every_float8_product_is_bare_and_the_model_stays(cpu_float8):
    pipe = pipeline()
    plain = pipe.transformer(**inputs(2, **FEW))[0]
    fused_projections.apply(pipe, SimpleNamespace())
    quant.apply(pipe, arguments())
    before = relative_error(pipe.transformer(**inputs(2, **FEW))[0], plain)
    deferred_scales.apply(pipe, None)
    persistent_tma.apply(pipe, None)  # finds no bias that is left inside
    for module in pipe.transformer.modules():
        if isinstance(module, torch.nn.Linear):
            kind = LinearThenScales if quant.is_float8(module) else torch.nn.Linear
            assert type(module) is kind
    assert relative_error(pipe.transformer(**inputs(2, **FEW))[0], plain) < 1.1 * before < 0.033

    products = traced_products(pipe.transformer.single_transformer_blocks[0])
    assert products == [([1, 1], None, torch.bfloat16)] * 2


@pytest.mark.slow
def test_a_package_reads_the_live_weights_and_scales(cpu_float8, tmp_path):
    from aoti_pieces import packaged

    pair = torch.nn.Sequential(torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 64))
    holder = torch.nn.Module()
    holder.transformer_blocks = torch.nn.ModuleList([pair.bfloat16().requires_grad_(False)])
    pipe = SimpleNamespace(transformer=holder)
    quant.apply(pipe, arguments())
    deferred_scales.apply(pipe, None)
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    forward, package = packaged("pair", pair, {"input": x}, tmp_path)
    assert relative_error(forward(input=x), expected := pair(x)) < 0.03  # fp32 between the layers
    shapes = [shape for shape, *_ in package.constants.values()]
    assert [48, 1] in shapes and [64, 1] in shapes  # scales are handed over, never folded
    pair[2].weight.scale.mul_(2)
    pair[2].bias.zero_()
    changed = pair(x)
    assert relative_error(changed, expected) > 0.5
    assert relative_error(forward(input=x), changed) < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (2, 33), (1, 4096)])
def test_linear_and_model_on_gpu(batch, tokens):
    from utils.hardware import detect

    if reason := deferred_scales.lacking(detect("cuda")):
        pytest.skip(reason)
    pipe = SimpleNamespace(transformer=transformer(heads=2).cuda())
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(batch, tokens, 256, device="cuda", generator=generator)
    x[:, 0] *= 1e4
    x = x.bfloat16()
    truth = x.double() @ layer.weight.double().t() + layer.bias.double()
    reference = pipe.transformer(**on_cuda(inputs(batch)))[0]
    quant.apply(pipe, arguments())
    inside = relative_error(layer(x), truth)
    deferred_scales.apply(pipe, None)
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for run in (layer, compiled):
            assert relative_error(run(x), truth) <= 1.1 * inside
        found = pipe.transformer(**on_cuda(inputs(batch)))[0]
    assert relative_error(found, reference) < 0.04

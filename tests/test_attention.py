"""The attention op, its quantiser and FLUX's processor against plain fp32 attention."""

from types import SimpleNamespace

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch.utils.flop_counter import FlopCounterMode

from tests.flux_pieces import inputs, pipeline, relative_error, transformer
from utils.errors import UserError
from utils.kernels import flash_attention as fa
from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
from utils.steps import fa3, fused_projections, on

# All per head, the worst one: an error in a small head must not hide behind a large one.
BF16_TOLERANCE = 5e-3  # measured up to 0.0023: inputs are exact, only P and the output are rounded
FP8_TOLERANCE = 0.07  # measured 0.037 to 0.054: 3 bits of mantissa in q, k and v
HEAD_TOLERANCE = 0.035  # the quantiser alone: measured 0.024 to 0.029
SHAPES = [(1, 16, 2, 64), (2, 33, 3, 128), (3, 7, 1, 64)]  # B, S, H, D; odd token counts


def truth(q, k, v):
    """Attend in fp64, written out."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).transpose(1, 2)


def make(kind: str, shape, seed: int = 0, dtype=torch.bfloat16, device="cpu"):
    """Make q, k or v of one kind."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    if kind == "large":
        x = x * 1e4
    elif kind == "tiny":
        x = x * 1e-6
    elif kind == "constant":
        x = torch.full(shape, 0.37)
    elif kind == "outliers":  # heads of very different size, and a few tokens far out in each
        x = x * torch.logspace(-4, 2, shape[2])[None, None, :, None]
        x[:, ::5] *= 8
    return x.to(dtype).to(device)


def head_errors(found, expected) -> list[float]:
    return [
        relative_error(found[b, :, h], expected[b, :, h])
        for b in range(found.shape[0])
        for h in range(found.shape[2])
    ]


def run_fp8(q, k, v, backend="sdpa"):
    (q, dq), (k, dk), (v, dv) = (fa.quantize_heads(x) for x in (q, k, v))
    return fa.flash_attn_func(q, k, v, dq, dk, dv, backend)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "large", "tiny", "constant", "outliers"])
def test_quantised_heads_are_close_in_every_head(kind, shape):
    x = make(kind, shape)
    quantised, descale = fa.quantize_heads(x)
    assert (quantised.dtype, quantised.shape) == (fa.E4M3, shape)
    assert (descale.dtype, descale.shape) == (torch.float32, (shape[0], shape[2]))
    assert quantised.float().abs().amax(dim=(1, 3)).eq(fa.E4M3_MAX).all()  # the whole range is used
    assert max(head_errors(fa.dequantize_heads(quantised, descale), x)) < HEAD_TOLERANCE


@pytest.mark.parametrize("value", [0.0, 3e38, -3e38, 1e-30, 1e-40])
def test_no_value_makes_the_quantiser_divide_by_zero_or_overflow(value):
    x = torch.full((2, 5, 2, 64), value)
    x[:, :, 1] = 1.0  # a neighbouring head is not disturbed
    quantised, descale = fa.quantize_heads(x)
    assert descale.isfinite().all()
    assert (descale >= fa.TINY).all()
    back = fa.dequantize_heads(quantised, descale)
    torch.testing.assert_close(back, x, rtol=2**-4, atol=fa.TINY * 2**-9)


def test_quantiser_does_not_hide_nan():
    x = torch.ones(1, 4, 2, 64)
    x[0, 0, 0, 0] = float("nan")
    quantised, descale = fa.quantize_heads(x)
    assert fa.dequantize_heads(quantised, descale)[:, :, 0].isnan().all()
    assert fa.dequantize_heads(quantised, descale)[:, :, 1].isfinite().all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "constant", "outliers"])
def test_op_against_truth(kind, shape):
    q, k = make("random", shape, 1), make("random", shape, 2)
    v = make(kind, shape, 3)
    expected = truth(q, k, v)
    for out, tolerance in (
        (fa.flash_attn_func(q, k, v), BF16_TOLERANCE),
        (run_fp8(q, k, v), FP8_TOLERANCE),
    ):
        assert out.dtype == torch.bfloat16
        assert out.is_contiguous()
        assert max(head_errors(out, expected)) < tolerance
    out = fa.flash_attn_func(q.float(), k.float(), v.float())
    assert out.dtype == torch.float32
    assert relative_error(out, expected) < 1e-6


@pytest.mark.parametrize("kind", ["large", "tiny"])
def test_fp8_values_of_any_size(kind):
    shape = (2, 33, 3, 128)
    q, k, v = make("random", shape, 1), make("random", shape, 2), make(kind, shape, 3)
    assert max(head_errors(run_fp8(q, k, v), truth(q, k, v))) < FP8_TOLERANCE


def test_scaled_fp8_beats_an_unscaled_cast_on_outliers():
    shape = (2, 33, 4, 128)
    q, k, v = make("random", shape, 1), make("random", shape, 2), make("outliers", shape, 3)
    expected = truth(q, k, v)
    one = torch.ones(2, 4)
    # saturating, or the largest values would be NaN and the comparison would be too easy
    casts = [x.float().clamp(-fa.E4M3_MAX, fa.E4M3_MAX).to(fa.E4M3) for x in (q, k, v)]
    unscaled = head_errors(fa.flash_attn_func(*casts, one, one, one), expected)
    scaled = head_errors(run_fp8(q, k, v), expected)
    assert max(scaled) < FP8_TOLERANCE
    assert max(unscaled) > 5 * max(scaled)  # measured 0.76 and 0.05


def test_op_takes_other_key_counts_and_strided_inputs():
    q, k = make("random", (2, 9, 3, 64), 1), make("random", (2, 21, 3, 64), 2)
    v = make("random", (2, 21, 3, 64), 3)
    assert relative_error(fa.flash_attn_func(q, k, v), truth(q, k, v)) < BF16_TOLERANCE
    fused = make("random", (2, 21, 9, 64), 4)
    q, k, v = fused.chunk(3, dim=2)
    assert relative_error(fa.flash_attn_func(q, k, v), truth(q, k, v)) < BF16_TOLERANCE


@pytest.mark.parametrize("fp8", [False, True])
def test_opcheck(fp8):
    q = make("random", (2, 9, 3, 64))
    x, scale = fa.quantize_heads(q)
    arguments = (x, x, x, scale, scale, scale, "fa3") if fp8 else (q, q, q)
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if not fp8:  # torch's schema check itself multiplies float8 on the CPU, which it has not
        checks.append("test_schema")
    torch.library.opcheck(
        torch.ops.flash.flash_attn_func.default, arguments, test_utils=tuple(checks)
    )


@pytest.mark.parametrize("fp8", [False, True])
def test_flops_are_counted(fp8):
    q, k = make("random", (2, 9, 3, 64)), make("random", (2, 21, 3, 64))
    with FlopCounterMode(display=False) as counter:
        run_fp8(q, k, k) if fp8 else fa.flash_attn_func(q, k, k)
    assert counter.get_total_flops() == 2 * 2 * (2 * 3 * 9 * 21 * 64)


def test_op_refuses_what_no_kernel_would_notice():
    q = make("random", (2, 9, 3, 64))
    x, scale = fa.quantize_heads(q)
    for arguments in (
        (q, q, q, None, None, None, "fa9"),
        (q, q, q, scale, scale, scale),
        (x, x, x),
        (x, x, x, scale, scale, None),
        (x, x, x, scale.T, scale.T, scale.T),
        (q, q.float(), q.float()),
        (q, q[:1], q[:1]),
        (q, q[:, :, :1], q[:, :, :1]),
        (q[0], q[0], q[0]),
    ):
        with pytest.raises(ValueError, match="attention"):
            fa.flash_attn_func(*arguments)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fused", [False, True])
def test_processor_equals_diffusers_bitwise(fused, batch):
    pipe = pipeline()
    expected = pipe.transformer(**inputs(batch))[0]
    if fused:
        fused_projections.apply(pipe, SimpleNamespace())
    fa3.apply(pipe, SimpleNamespace(plan={"fa3": on(backend="sdpa", dtype="bf16")}))
    assert torch.equal(pipe.transformer(**inputs(batch))[0], expected)
    fa3.apply(pipe, SimpleNamespace(plan={"fa3": on(backend="fa3", dtype="fp8")}))
    error = relative_error(pipe.transformer(**inputs(batch))[0], expected)
    assert 0 < error < 0.02  # measured 0.007: three blocks of float8 attention


def test_processor_on_a_batch_equals_its_single_images():
    model = transformer(torch.float32)
    model.set_attn_processor(FlashFusedFluxAttnProcessor3_0("sdpa", fp8=True))
    whole = inputs(3, dtype=torch.float32)
    together = model(**whole)[0]
    shared = ("img_ids", "txt_ids", "return_dict")
    for i in range(3):
        one = {n: x if n in shared else x[i : i + 1] for n, x in whole.items()}
        # not bitwise: a product of other height may sum otherwise, and fp8 can then round the
        # other way (measured 1e-6 to 1e-4)
        assert relative_error(model(**one)[0], together[i : i + 1]) < 2e-3


def test_processor_refuses_what_it_would_ignore():
    model = transformer()
    attention = model.transformer_blocks[0].attn
    processor = FlashFusedFluxAttnProcessor3_0("sdpa")
    x = torch.zeros(1, 3, 256, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="attention_mask"):
        processor(attention, x, x, attention_mask=torch.ones(1, 1, 6, 6))
    with pytest.raises(ValueError, match="backend"):
        FlashFusedFluxAttnProcessor3_0("fa9")
    processor._attention_backend = "sage"
    with pytest.raises(ValueError, match="--attention_backend"):
        processor(attention, x, x)


def test_another_processor_is_not_replaced_silently():
    class Adapter(FluxAttnProcessor):
        pass

    class Foreign:
        def __call__(self, attn, hidden_states):
            return hidden_states

    pipe = pipeline()
    pipe.transformer.set_attn_processor(Foreign())
    with pytest.raises(UserError, match="Foreign"):
        fa3.apply(pipe, SimpleNamespace(plan={"fa3": on(backend="sdpa", dtype="bf16")}))


@pytest.mark.parametrize("fp8", [False, True])
def test_processor_traces_whole(fp8):
    pipe = pipeline()
    fused_projections.apply(pipe, SimpleNamespace())
    model = pipe.transformer
    # any backend traces here: the CPU kernel stands for it
    model.set_attn_processor(FlashFusedFluxAttnProcessor3_0("fa3", fp8))
    arguments = inputs(2)
    expected = model(**arguments)[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative_error(compiled(**arguments)[0], expected) < 1e-2
        program = torch.export.export(model, (), arguments)
    ops = [str(node.target) for node in program.graph.nodes]
    assert ops.count("flash.flash_attn_func.default") == 3
    assert relative_error(program.module()(**arguments)[0], expected) < 1e-2

"""The twin of comfy-kitchen's int8 attention, and the op with it, against plain fp64 attention."""

from types import SimpleNamespace

import pytest
import torch

from tests.flux_pieces import inputs, pipeline, relative_error
from tests.test_attention import SHAPES, head_errors, make, run_fp8, truth
from utils import roofline
from utils.kernels import flash_attention as fa
from utils.kernels import int8_attention as twin
from utils.steps import fa3, off, on

# All per head, the worst one: measured 0.011 to 0.020, with outlying channels up to 0.030. The
# library's own tests allow 0.03.
INT8_TOLERANCE = 0.03
SIZES = [*SHAPES, (1, 300, 3, 128), (1, 1100, 2, 128)]  # each rotation, each tile


def run(q, k, v):
    return fa.flash_attn_func(q, k, v, backend="int8")


@pytest.mark.parametrize("shape", SIZES)
@pytest.mark.parametrize("kind", ["random", "large", "tiny", "constant", "outliers"])
def test_twin_against_truth(kind, shape):
    q, k, v = make("random", shape, 1), make("random", shape, 2), make(kind, shape, 3)
    out = run(q, k, v)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    errors = head_errors(out, truth(q, k, v))
    assert max(errors) < INT8_TOLERANCE
    assert kind == "constant" or min(errors) > 0.005  # it does round


@pytest.mark.parametrize("shape", [(2, 33, 3, 128), (1, 300, 3, 128)])
def test_outlying_channels_cost_little_and_less_than_in_float8(shape):
    q, k, v = (make("random", shape, seed) for seed in range(3))
    q[..., 7] *= 8
    k[..., 5] += 20
    expected = truth(q, k, v)
    found = max(head_errors(run(q, k, v), expected))
    assert found < INT8_TOLERANCE  # measured 0.021 to 0.023
    assert found < 0.5 * max(head_errors(run_fp8(q, k, v), expected))  # measured 0.075 to 0.081


def test_each_part_of_the_scheme_pays(monkeypatch):
    """Without the rotation, or without the representative key, the same inputs err by more."""
    shape = (1, 300, 3, 128)
    q, k, v = (make("random", shape, seed) for seed in range(3))
    k = k + 6 * make("random", (1, 1, 3, 128), 4)  # what all keys have in common
    q[..., 7] *= 8
    expected = truth(q, k, v)
    whole = max(head_errors(run(q, k, v), expected))
    with monkeypatch.context() as patch:
        patch.setattr(twin, "_rotation", lambda group, head: torch.eye(head))
        assert max(head_errors(run(q, k, v), expected)) > 1.3 * whole
    with monkeypatch.context() as patch:
        patch.setattr(twin, "_representative", lambda k: k[:, :, :1] * 0)
        assert max(head_errors(run(q, k, v), expected)) > 1.3 * whole


@pytest.mark.parametrize(("group", "head"), [(4, 64), (64, 64), (4, 128), (128, 128)])
def test_rotations_keep_products(group, head):
    rotation = twin._rotation(group, head)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(head))
    assert (rotation != 0).sum(0).eq(group).all()


def test_a_key_is_subtracted_only_where_that_narrows_the_range():
    k = make("random", (1, 40, 2, 64)).transpose(1, 2).float()
    k[:, 1] += 30
    key = twin._representative(k)
    assert key.shape == (1, 2, 1, 64)
    assert key[:, 0].eq(0).all() and key[:, 1].sub(30).abs().max() < 6


def test_other_key_counts_strides_types_and_nan():
    q, k = make("random", (2, 9, 3, 64), 1), make("random", (2, 70, 3, 64), 2)
    assert max(head_errors(run(q, k, k), truth(q, k, k))) < INT8_TOLERANCE
    q, k, v = make("random", (2, 21, 9, 64), 4).chunk(3, dim=2)
    assert max(head_errors(run(q, k, v), truth(q, k, v))) < INT8_TOLERANCE
    assert torch.equal(run(q.float(), k.float(), v.float()).bfloat16(), run(q, k, v))
    v = v.clone()
    v[0, 0, 0, 0] = float("nan")
    assert run(q, k, v)[0, :, 0, 0].isnan().all() and run(q, k, v)[:, :, 1].isfinite().all()
    assert run(q * 0, k * 0, v[:, :, 1:2].expand_as(q)).isfinite().all()


def test_opcheck():
    q = make("random", (2, 9, 3, 64))
    torch.library.opcheck(
        torch.ops.flash.flash_attn_func.default, (q, q, q, None, None, None, "int8")
    )


def test_in_the_transformer_it_costs_less_than_float8():
    pipe = pipeline()
    expected = pipe.transformer(**inputs(2))[0]
    errors = {}
    for backend, dtype in (("int8", "int8"), ("fa3", "fp8")):
        fa3.apply(pipe, SimpleNamespace(plan={"fa3": on(backend=backend, dtype=dtype)}))
        errors[dtype] = relative_error(pipe.transformer(**inputs(2))[0], expected)
    assert 0 < errors["int8"] < errors["fp8"] < 0.02


def test_its_floor_is_that_of_int8():
    plan = {"fa3": on(backend="int8", dtype="int8")}
    plan |= dict.fromkeys(("quant", "text_quant"), off("bf16"))
    args = SimpleNamespace(plan=plan, dtype=torch.bfloat16)
    assert roofline.precision_of(args).attention == "int8"

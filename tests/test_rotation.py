"""The Hadamard rotation of Q and K: what it is, what it does to float8 attention, and its flag."""

import pytest
import torch

from tests.conftest import make_args
from tests.flux_pieces import inputs, relative_error, traced_and_exported, transformer
from tests.test_attention import head_errors, make, run_fp8, truth
from tests.test_attention_choice import GPU, installed
from utils.errors import UserError
from utils.explain import explain
from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
from utils.kernels.rotation import STAGES, rotate_heads
from utils.steps import fa3


@pytest.mark.parametrize("width", [16, 64, 128])
def test_the_matrix_is_orthogonal_and_spreads_a_channel_over_16(width):
    matrix = rotate_heads(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    spread = 2 ** (STAGES + 1)
    assert spread == 16
    assert (matrix != 0).sum(0).eq(spread).all() and (matrix != 0).sum(1).eq(spread).all()
    assert matrix[matrix != 0].abs().eq(spread**-0.5).all()


def test_channels_that_are_mixed_are_a_pair_or_far_apart():
    matrix = rotate_heads(torch.eye(128))
    mixed = matrix[:, matrix[0] != 0].abs().sum(1).nonzero().flatten().tolist()
    assert mixed == sorted(16 * i + j for i in range(8) for j in (0, 1))


def errors(q, k, v, rotate: bool) -> float:
    expected = truth(q, k, v)
    q, k = (rotate_heads(x.float()) if rotate else x for x in (q, k))
    return max(head_errors(run_fp8(q, k, v), expected))


@pytest.mark.parametrize("shape", [(2, 33, 3, 128), (1, 300, 2, 64)])
def test_a_large_channel_costs_less(shape):
    q, k, v = (make("random", shape, seed) for seed in range(3))
    q[..., 7] *= 8
    k[..., 7] *= 8
    plain, rotated = (errors(q, k, v, rotate) for rotate in (False, True))
    assert rotated < 0.6 * plain, (plain, rotated)


@pytest.mark.parametrize("kind", ["random", "large", "tiny", "constant"])
def test_other_inputs_lose_nothing(kind):
    q, k, v = (make("random", (2, 33, 3, 128), seed) for seed in range(3))
    q, k = make(kind, q.shape, 1), make(kind, q.shape, 2)
    assert errors(q, k, v, True) < 1.1 * errors(q, k, v, False) + 0.005


def large_channel(fp8: bool, rotate: bool):
    """Give a transformer in which one channel of Q and K is large."""
    model = transformer(torch.float32)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        for norm in (block.attn.norm_q, block.attn.norm_k):
            norm.weight[5] *= 8
    if fp8:
        model.set_attn_processor(FlashFusedFluxAttnProcessor3_0("fa3", fp8=fp8, rotate=rotate))
    return model


def attending(fp8: bool, rotate: bool) -> torch.Tensor:
    return large_channel(fp8, rotate)(**inputs(2, dtype=torch.float32))[0]


def test_the_processor_rotates():
    expected = attending(False, False)
    plain, rotated = (relative_error(attending(True, r), expected) for r in (False, True))
    assert 0 < rotated < 0.8 * plain, (plain, rotated)


def test_the_processor_without_a_cast_is_diffusers(monkeypatch):
    """The rotation alone changes nothing: Q K' stays, and V is not turned."""
    from utils.kernels import fused_blocks
    from utils.kernels.norm_rope import plain_norm_rope

    def without_cast(img, txt, norms, cos, sin, eps, float8, rotate):
        assert float8 and rotate
        found = plain_norm_rope(img, txt, norms, cos, sin, eps, False, rotate)
        return found if txt else [*found, img[2]]

    monkeypatch.setattr(fused_blocks, "norm_rope", without_cast)
    assert relative_error(attending(True, True), attending(False, False)) < 1e-5


def test_it_traces_whole_and_exports():
    model = large_channel(True, True)
    names = traced_and_exported(model, inputs(2, dtype=torch.float32), 1e-5)
    assert names.count("flux.norm_rope.default") == 3  # one in each block


def test_it_is_asked_for_and_goes_with_float8_attention_only():
    def choose(machine="H200", **flags):
        return fa3.choose(GPU[machine], torch.bfloat16, probe=installed, rotation=True, **flags)

    assert choose().settings["rotation"] == "Hadamard" and not choose().lossless
    assert "rotation" not in fa3.choose(GPU["H200"], torch.bfloat16, probe=installed).settings
    for verdict in (choose("L40S"), choose(quant_disabled=True), choose(fa3_dtype="bf16")):
        assert verdict.state == "refused" and "--fa3_rotation" in verdict.reason
    with pytest.raises(UserError, match=r"--fa3_rotation: found a CPU .* expected Flash"):
        make_args("--device", "cpu", "--fa3_rotation")
    with pytest.raises(UserError, match="--fa3_rotation: found"):
        explain(make_args("--device", "cpu", "--fa3_rotation", checks=False), "A100")
    with pytest.raises(ValueError, match="float8"):
        FlashFusedFluxAttnProcessor3_0("fa3", rotate=True)

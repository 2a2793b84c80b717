"""The emulations of what is not in the stack: their numbers are those that their names say."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from tests import emulation, lossy_variants
from tests.flux_pieces import inputs, pipeline, relative_error
from tests.lossy_pictures import BLOCKWISE, TURNED
from utils import quality
from utils.kernels.flash_attention import E4M3_MAX
from utils.steps import fa3, on, quant

FEW = {"text": 3, "height": 1, "width": 5}


def drawn(pipe) -> torch.Tensor:
    return pipe.transformer(**inputs(**FEW))[0]


def changed(change, plan: dict | None = None) -> torch.Tensor:
    """Run a small transformer with attention as planned and with a change."""
    pipe, args = pipeline(), SimpleNamespace(plan=plan)
    if plan:
        fa3.apply(pipe, args)
    with emulation.softmax(), change(pipe, args):
        return drawn(pipe)


def test_a_scale_per_row_is_torchaos():
    x = torch.randn(2, 5, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    pipes = [pipeline(), pipeline()]
    layers = [pipe.transformer.single_transformer_blocks[0].proj_mlp for pipe in pipes]
    plan = {"quant": on(granularity="row", filter="blocks")}
    with emulation.float8(), emulation.products():
        quant.apply(pipes[0], SimpleNamespace(plan=plan))
        expected = layers[0](x)
    with lossy_variants.linears(pipes[1], None, activations=lossy_variants.by_row):
        assert relative_error(layers[1](x), expected) < 1e-4


@pytest.mark.parametrize(("rows", "columns"), [(1, 128), (128, 128), (1, 0), (0, 0)])
def test_each_block_is_rounded_by_its_own_largest_number(rows, columns):
    x = torch.randn(256, 384, generator=torch.Generator().manual_seed(0))
    found = lossy_variants.by_block(x, rows, columns)
    last = x[-rows:, -columns:]  # -0: all
    scale = (last.abs().max() / E4M3_MAX).bfloat16().float()
    expected = lossy_variants.rounded(last, scale)
    torch.testing.assert_close(found[-rows:, -columns:], expected)
    assert 0 < relative_error(found, x) < 0.04


@pytest.mark.parametrize("largest", [416, 384])
def test_other_roundings_are_as_precise(largest):
    x = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    plain, other = lossy_variants.by_row(x), lossy_variants.by_row(x, largest=largest)
    assert relative_error(other, plain) > 0.02
    assert abs(relative_error(other, x) / relative_error(plain, x) - 1) < 0.03


@pytest.mark.parametrize("change", [BLOCKWISE, TURNED])
def test_other_scales_and_a_rotation_err_as_float8_does(change):
    assert 0.002 < relative_error(changed(change), drawn(pipeline())) < 0.03


def test_static_scales_are_the_calibrations_and_saturate(monkeypatch):
    pipe, calls = pipeline(), []
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    args = SimpleNamespace(seed=3, checkpoint=SimpleNamespace(source="bundled", kind="dev"))

    def run(pipeline, args, prompts):
        calls.append((args.seed, len(prompts)))
        for linear in lossy_variants._linears(pipeline):
            linear(torch.full((1, 1, linear.in_features), 2.0).bfloat16())

    monkeypatch.setattr(quality, "run", run)
    signs = torch.tensor([1.0, -1.0]).repeat(128).bfloat16().expand(1, 2, 256)
    twice = layer(2 * signs)
    with lossy_variants.static(pipe, args):
        assert relative_error(layer(2 * signs), twice) < 0.03
        assert torch.equal(layer(9 * signs), layer(2 * signs))
    assert calls == [(1003, 4)] and args.seed == 3


def test_all_parts_together_are_float8_attention_and_none_is_not():
    plain, fp8 = (
        {"fa3": on(backend="fa3", dtype="bf16")},
        {"fa3": on(backend="fa3", dtype="fp8")},
    )
    expected = changed(lambda *_: nullcontext(), fp8)
    found = {
        parts: relative_error(
            changed(partial(lossy_variants.attention, parts=parts), plain), expected
        )
        for parts in ((), ("q",), ("k",), ("v",), ("softmax",), ("q", "k", "v", "softmax"))
    }
    assert found.pop(("q", "k", "v", "softmax")) == 0
    assert min(found.values()) > 0 and len(set(found.values())) == len(found)


@pytest.mark.parametrize(("channels", "apart"), [(8, 1), (4, 32), (128, 1)])
def test_a_mixing_is_orthogonal_and_of_the_channels_that_it_names(channels, apart):
    matrix = lossy_variants.mixed(torch.eye(128), channels, apart)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(128))
    assert matrix[0].nonzero().flatten().tolist() == [apart * i for i in range(channels)]


def test_attention_is_turned_by_the_other_matrix():
    rotated = {"fa3": on(backend="fa3", dtype="fp8", rotation="Hadamard")}
    ours, other = (
        changed(change, rotated)
        for change in (
            lambda *_: nullcontext(),
            partial(lossy_variants.rotation, channels=8, apart=1),
        )
    )
    assert 0 < relative_error(other, ours) < 0.05

"""diffusers' step caches as the curve runs them: what is computed, calibrated, and left behind."""

import itertools

import pytest
import torch

from tests.conftest import optimized
from utils import quality
from utils.diffusers_caches import FIRST_BLOCK, MAGNITUDE, calibrate, config_of, enabled

STEPS = 9


@pytest.fixture(scope="module")
def run():
    """Give an eager pipeline, its call, and its latents without a cache."""
    call = ("--num_inference_steps", str(STEPS), "--max_sequence_length", "64")
    pipeline, args = optimized("--ckpt", "tiny-dev", *call)
    return pipeline, args, quality.run(pipeline, args).latents


def latents_and_steps(run, kind: str, ratios=None, **settings):
    pipeline, args, _ = run
    with enabled(pipeline.transformer, config_of(kind, settings, STEPS, ratios)) as computed:
        return quality.run(pipeline, args).latents, computed()


def test_ratios_are_those_of_the_residuals_of_all_blocks(run):
    pipeline, args, _ = run
    transformer, ends = pipeline.transformer, {"in": [], "out": []}
    first, last = transformer.transformer_blocks[0], transformer.single_transformer_blocks[-1]
    hooks = [
        first.register_forward_pre_hook(
            lambda _, __, kwargs: ends["in"].append(kwargs["hidden_states"].float()),
            with_kwargs=True,
        ),
        last.register_forward_hook(lambda _, __, out: ends["out"].append(out[1].float())),
    ]
    try:
        quality.run(pipeline, args)
    finally:
        for hook in hooks:
            hook.remove()
    norms = [(o - i).norm(dim=-1) for i, o in zip(ends["in"], ends["out"], strict=True)]
    expected = [1.0] + [float((b / a).mean()) for a, b in itertools.pairwise(norms)]
    torch.testing.assert_close(calibrate(pipeline, args), expected, rtol=0.02, atol=0)


def test_magcache_reuses_by_the_ratios_alone(run):
    """The published rule, written out: errors of a running product of ratios add up."""
    ratios, threshold, most = [1.0, 0.9, 0.8, 0.9, 0.95, 0.95, 0.95, 0.95, 0.95], 0.31, 2
    expected, product, error, skipped = [], 1.0, 0.0, 0
    for step, ratio in enumerate(ratios):
        if step >= 2:  # a fifth of the steps is always computed
            product, skipped = product * ratio, skipped + 1
            error += abs(1 - product)
            if error <= threshold and skipped <= most:
                continue
        expected.append(step)
        product, error, skipped = 1.0, 0.0, 0
    settings = {"threshold": threshold, "max_skip_steps": most, "retention_ratio": 0.2}
    found, computed = latents_and_steps(run, MAGNITUDE, ratios, **settings)
    assert computed == expected and 3 <= len(expected) < STEPS
    assert not torch.equal(found, run[2])


@pytest.mark.parametrize("kind", [FIRST_BLOCK, MAGNITUDE])
def test_a_threshold_of_zero_changes_nothing_and_nothing_stays_behind(run, kind):
    pipeline, args, plain = run
    ratios = [1.0] + [0.9] * (STEPS - 1)
    found, computed = latents_and_steps(run, kind, ratios, threshold=0.0)
    assert computed == list(range(STEPS)) and torch.equal(found, plain)
    reused, computed = latents_and_steps(run, kind, ratios, threshold=0.6)
    assert len(computed) < STEPS and not torch.equal(reused, plain)
    assert torch.equal(quality.run(pipeline, args).latents, plain)
    assert not pipeline.transformer.is_cache_enabled

"""Raised limits: the compiler is told, and stores less between the products of a block."""

import pytest
import torch
from conftest import make_args
from test_fused_kernels import lines_of

from utils.errors import UserError
from utils.steps import deferred_scales, fusion_limits
from utils.steps.compile import compiler_options

RUN = ("--device", "cpu", "--fusion_limits", "--compile_export_mode")


def test_the_compiler_is_told_and_knows_the_limits():
    args = make_args(*RUN, "compile")
    assert args.plan["fusion_limits"].is_on and args.plan["fusion_limits"].lossless
    assert compiler_options(args).items() >= fusion_limits.LIMITS.items()
    assert set(torch._inductor.list_options()) >= set(fusion_limits.LIMITS)
    args.fusion_limits = False
    assert not compiler_options(args).keys() & fusion_limits.LIMITS.keys()
    with pytest.raises(UserError, match="--fusion_limits: found --compile_export_mode disabled"):
        make_args(*RUN, "disabled")


def test_no_other_step_lowers_them():
    own = {name: getattr(torch._inductor.config, name) for name in fusion_limits.LIMITS}
    for name, limit in fusion_limits.LIMITS.items():
        assert limit > own[name] and limit >= deferred_scales.LIMITS.get(name, 0)


@pytest.mark.slow
def test_what_inductor_stores_for_an_h200():
    rows = lines_of("tests.block_codegen")
    mb = {(row["block"], row["products"], row["limits"]): row["mb"] for row in rows}
    kernels = {(row["block"], row["products"], row["limits"]): row["kernels"] for row in rows}
    for kind in ("double", "single"):
        plain = (kind, "float8", "own")
        for products, limits in (("float8", "raised"), ("deferred", "deferred")):
            assert kernels[kind, products, limits] <= kernels[plain], rows
            assert mb[kind, products, limits] < 0.95 * mb[plain], rows
        assert mb[kind, "deferred", "raised"] < mb[kind, "deferred", "deferred"], rows
        assert mb[kind, "bf16", "raised"] <= mb[kind, "bf16", "own"], rows
    assert mb["single", "deferred", "own"] > mb["single", "float8", "own"], rows  # needs its limits

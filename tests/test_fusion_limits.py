"""Raised limits: the compiler is told, and stores less between the products of a block."""

import json
from pathlib import Path

import pytest
import torch
from conftest import make_args
from test_fused_kernels import lines_of

from tests.block_codegen import KERNELS
from utils.errors import UserError
from utils.steps import deferred_scales, fusion_limits
from utils.steps.compile import compiler_options

ROOT = Path(__file__).parent.parent
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
    own = {name: getattr(torch._inductor.config, name) for name in fusion_limits.LIMITS}  # or None
    for name, limit in fusion_limits.LIMITS.items():
        assert limit > (own[name] or 0) and limit >= deferred_scales.LIMITS.get(name, 0)


def of_a_step(rows: list[dict]) -> dict[tuple[str, str], int]:
    """Add up what Dev's 19 double and 38 single blocks store, by products and limits. Units: MB"""
    found = {}
    for row in rows:
        key = row["products"], row["limits"]
        found[key] = found.get(key, 0) + {"double": 19, "single": 38}[row["block"]] * row["mb"]
    return found


def test_the_committed_counts_are_what_the_page_says():
    lines = (ROOT / "results" / "kernels" / "block-codegen.jsonl").read_text().splitlines()
    rows, page = [json.loads(line) for line in lines], (ROOT / "docs/performance.md").read_text()
    mb = {v: of_a_step([r for r in rows if r["torch"] == v]) for v in ("2.13.0", "2.11.0")}
    for products in ("bf16", "float8", "deferred"):
        kinds = [(version, limits) for version in mb for limits in ("own", "raised")]
        cells = [f"{mb[version][products, limits] / 1000:.1f}" for version, limits in kinds]
        assert f"| {' | '.join(cells)} |" in page
    for products in KERNELS:
        cells = [f"{mb[version][products, 'own'] / 1000:.1f} | -" for version in mb]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.slow
def test_what_inductor_stores_for_an_h200():
    mb = of_a_step(lines_of("tests.block_codegen"))
    plain = mb["float8", "own"]
    assert mb["bf16", "raised"] < 0.95 * mb["bf16", "own"], mb
    assert mb["float8", "raised"] < 0.85 * plain and mb["deferred", "deferred"] < 0.85 * plain, mb
    assert mb["deferred", "raised"] < 0.75 * plain, mb  # the two together
    assert mb["deferred", "own"] > plain, mb  # it needs its limits
    fused, own, static = (mb[products, "own"] for products in KERNELS)
    assert fused < 0.5 * plain and own < fused and static < 0.7 * own, mb

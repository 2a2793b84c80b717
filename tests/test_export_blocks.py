"""Packages of one double and one single block, which serve all blocks with their own weights."""

import pytest
import torch
from aoti_pieces import generate, make_args, make_pipeline

from utils import aoti, artifacts
from utils.steps import export_aoti


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """Build both packages, without the decoder's: pipeline, arguments, eager images, builds."""
    builds = []
    with pytest.MonkeyPatch.context() as patch:
        compile_package = aoti.compile_package

        def counting(program, component, options, scratch):
            builds.append(component.name)
            return compile_package(program, component, options, scratch)

        patch.setattr("utils.pipeline_utils.generate", generate)
        patch.setattr(aoti, "compile_package", counting)
        patch.setitem(export_aoti.COMPONENTS, "blocks", ("double_block", "single_block"))
        pipeline = make_pipeline()
        args = make_args(tmp_path_factory.mktemp("home") / "cache", compile_scope="blocks")
        eager = generate(pipeline, args)
        export_aoti.apply(pipeline, args)
        yield pipeline, args, eager, builds


def test_two_packages_serve_all_blocks(blocks):
    pipeline, args, eager, builds = blocks
    assert builds == ["double_block", "single_block"]
    transformer = pipeline.transformer
    assert len(transformer.single_transformer_blocks) == 2
    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        assert isinstance(block.forward, aoti.PackageForward) and len(block.forward.runners) == 1
    assert "forward" not in vars(transformer)
    torch.testing.assert_close(generate(pipeline, args), eager, rtol=1e-4, atol=1e-4)
    root = artifacts.open_cache(args.cache_dir)
    assert sorted(path.suffix for path in root.iterdir()) == [".json", ".json", ".pt2", ".pt2"]


def test_each_block_has_its_own_weights_and_the_next_start_builds_nothing(blocks):
    _, args, eager, builds = blocks
    pipeline = make_pipeline(seed=7)
    pipeline.transformer.single_transformer_blocks[1].proj_out.weight.mul_(-1)
    truth = generate(pipeline, args)
    assert (truth - eager).abs().max() > 0.05
    export_aoti.apply(
        pipeline, make_args(args.cache_dir, compile_scope="blocks", use_cached_model=True)
    )
    torch.testing.assert_close(generate(pipeline, args), truth, rtol=1e-4, atol=1e-4)
    assert len(builds) == 2


def test_blocks_that_are_not_alike_are_refused(blocks):
    _, args, _, builds = blocks
    pipeline = make_pipeline()
    pipeline.transformer.single_transformer_blocks[1].act_mlp = torch.nn.ReLU()
    with pytest.raises(RuntimeError, match="not all modules of single_block are built alike"):
        export_aoti.apply(pipeline, args)
    assert len(builds) == 2


def test_force_export_builds_each_package_once_more(blocks, monkeypatch):
    _, args, _, builds = blocks
    root = artifacts.open_cache(args.cache_dir)
    stored = {path.name.split("-")[0]: path.read_bytes() for path in root.glob("*.pt2")}
    tables = {c: artifacts.read_manifest(next(root.glob(f"{c}-*.json")))[0] for c in stored}
    rebuilt = []

    def again(program, component, options, scratch):
        rebuilt.append(component.name)
        return {".pt2": stored[component.name]}, tables[component.name]["constants"]

    monkeypatch.setattr(aoti, "compile_package", again)
    pipeline = make_pipeline()
    forced = make_args(args.cache_dir, compile_scope="blocks", force_export=True)
    export_aoti.apply(pipeline, forced)
    assert rebuilt == ["double_block", "single_block"]  # and not once for every block
    export_aoti.apply(make_pipeline(), args)
    assert rebuilt == ["double_block", "single_block"] and len(builds) == 2

"""T5's and CLIP's blocks as packages: the same programs, checked calls, no weights inside."""

import pytest
import torch
from conftest import make_args
from test_text import LONG, SHORT, encode

from utils import aoti, artifacts
from utils.errors import UserError
from utils.pipeline_utils import load_pipeline
from utils.quality import relative_l2
from utils.steps import export_aoti, text_encoders

FLAGS = ("--device", "cpu", "--compile_export_mode", "export_aoti", "--compile_text_encoders")


def test_their_packages_are_named_beside_the_others(tmp_path):
    args = make_args(*FLAGS, "--cache-dir", str(tmp_path / "cache"))
    assert export_aoti._names(args) == ("transformer", "decoder", *export_aoti.ENCODERS)
    args.use_cached_model = True
    reason = export_aoti.check(args).reason
    assert all(f"{name}: found no package" in reason for name in export_aoti.ENCODERS)


def test_each_kind_of_block_is_exported_as_it_is_called():
    """The programs before they are compiled: every block of a group gives its own result."""
    pipeline = load_pipeline(make_args("--device", "cpu"))
    groups = text_encoders.groups(pipeline)
    firsts = [aoti.Component(name, blocks[0]) for name, blocks in groups.items()]
    aoti.record_inputs(firsts, lambda: encode(pipeline, LONG))
    for component in firsts:
        assert "kwargs" not in component.inputs
        program = aoti.export(component).module(check_guards=False)
        with torch.no_grad():
            found, expected = program(**component.inputs), component.module(**component.inputs)
        found, expected = (out if isinstance(out, tuple) else (out,) for out in (found, expected))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one is other is None or torch.equal(one, other), component.name


@pytest.mark.slow
def test_packages_of_the_text_encoders(tmp_path, monkeypatch):
    """As near to fp32 as eager, for each block's own weights; a second start builds none."""
    for scope in export_aoti.COMPONENTS:  # transformer and decoder have tests of their own
        monkeypatch.setitem(export_aoti.COMPONENTS, scope, ())
    builds, compile_package = [], aoti.compile_package

    def counting(program, component, options, scratch):
        builds.append(component.name)
        return compile_package(program, component, options, scratch)

    monkeypatch.setattr(aoti, "compile_package", counting)
    flags = (*FLAGS, "--cache-dir", str(tmp_path / "cache"), "--num_inference_steps", "1")
    exact = encode(load_pipeline(make_args("--device", "cpu", "--disable_bf16")), LONG)
    args = make_args(*flags)
    pipeline = load_pipeline(args)
    eager = encode(pipeline, LONG)
    export_aoti.apply(pipeline, args)
    assert tuple(builds) == export_aoti.ENCODERS
    for k, found in enumerate(encode(pipeline, LONG)[:2]):
        assert relative_l2(found, exact[k]) <= 1.25 * relative_l2(eager[k], exact[k])
    root = artifacts.open_cache(args.cache_dir)
    assert {path.suffix for path in root.glob("*_block-*")} == {".pt2", ".json"}

    cached = make_args(*flags, "--use-cached-model")
    other = load_pipeline(cached)
    with torch.no_grad():
        text_encoders.blocks(other.text_encoder)[1].mlp.fc1.weight.mul_(-1)
    truth = encode(other, SHORT)
    export_aoti.apply(other, cached)
    for k, found in enumerate(encode(other, SHORT)[:2]):
        assert relative_l2(found, truth[k]) < 0.02
    assert relative_l2(truth[1], encode(pipeline, SHORT)[1]) > 0.05  # pooled: CLIP's
    assert len(builds) == 3
    with pytest.raises(UserError, match=r"t5_first_block.*hidden_states\.shape"):
        encode(other, SHORT, length=64)

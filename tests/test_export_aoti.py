"""export_aoti with real AOTI packages of a tiny random FluxPipeline, built and run on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from aoti_pieces import FakeCheckpoint, generate, make_args, make_pipeline, transformer_call

from utils import aoti, artifacts
from utils.calls import only_known_calls
from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import export_aoti, on


@pytest.fixture(scope="module", autouse=True)
def counted():
    """Replace the pipeline's call, and count what is compiled."""
    builds = []
    with pytest.MonkeyPatch.context() as patch:
        compile_package = aoti.compile_package

        def counting(program, component, options, scratch):
            builds.append(component.name)
            return compile_package(program, component, options, scratch)

        patch.setattr("utils.pipeline_utils.generate", generate)
        patch.setattr(aoti, "compile_package", counting)
        yield builds


@pytest.fixture(scope="module")
def built(tmp_path_factory, counted):
    """Build both packages once: the pipeline, eager images before, and the cache folder."""
    root = tmp_path_factory.mktemp("home") / "cache"
    pipeline, args = make_pipeline(), make_args(root)
    eager = generate(pipeline, args)
    export_aoti.apply(pipeline, args)
    assert counted == ["transformer", "decoder"]
    return SimpleNamespace(pipeline=pipeline, args=args, eager=eager, root=root)


@pytest.fixture
def copied(built, tmp_path):
    """A cache folder of one's own with the same packages."""
    shutil.copytree(built.root, tmp_path / "cache")
    return tmp_path / "cache"


def test_packages_equal_eager(built):
    assert isinstance(built.pipeline.transformer.forward, aoti.PackageForward)
    assert isinstance(built.pipeline.vae.decoder.forward, aoti.PackageForward)
    found = generate(built.pipeline, built.args)
    torch.testing.assert_close(found, built.eager, rtol=1e-4, atol=1e-4)  # fp32
    with pytest.raises(RuntimeError, match=r"transformer\.forward has been replaced already"):
        aoti.Component("transformer", built.pipeline.transformer)


def test_packages_hold_no_weights(built):
    weights = sum(p.numel() * p.element_size() for p in built.pipeline.transformer.parameters())
    packages = sorted(built.root.glob("transformer-*.pt2"))
    assert len(packages) == 1 and packages[0].stat().st_size < weights / 2
    names = {path.name.split("-")[0].lstrip(".") for path in built.root.iterdir()}
    assert names == {"transformer", "decoder"}
    assert not list(built.root.glob(".*.tmp"))


def test_every_weight_is_outside_of_the_code(built):
    # Inductor inlines vectors of up to 8 elements unless told not to: conv_out.bias has 3
    manifest = json.loads(next(built.root.glob("decoder-*.json")).read_text())
    assert set(manifest["constants"]) == set(dict(built.pipeline.vae.decoder.named_parameters()))


def test_second_start_builds_nothing(built, counted):
    before = len(counted)
    for use_cached_model in (False, True):
        pipeline = make_pipeline()
        args = make_args(built.root, use_cached_model=use_cached_model)
        export_aoti.apply(pipeline, args)
        found = generate(pipeline, args)
        torch.testing.assert_close(found, built.eager, rtol=1e-4, atol=1e-4)
    assert len(counted) == before


def test_a_package_that_is_removed_before_it_is_loaded_is_built_again(
    built, copied, counted, monkeypatch
):
    """Another process makes room, or stores its own, after the look that verified it."""
    attach, removed = aoti.attach, []

    def attaching(component, files, expected):
        if component.name == "decoder" and not removed:
            removed.append([path.unlink() for path in files.values()])
        return attach(component, files, expected)

    monkeypatch.setattr(aoti, "attach", attaching)
    before = len(counted)
    pipeline, args = make_pipeline(), make_args(copied)
    export_aoti.apply(pipeline, args)
    assert counted[before:] == ["decoder"]
    torch.testing.assert_close(generate(pipeline, args), built.eager, rtol=1e-4, atol=1e-4)
    removed.clear()
    args.use_cached_model = True
    with pytest.raises(UserError, match=r"--use-cached-model: decoder-.*: found No such file"):
        export_aoti.apply(make_pipeline(), args)


@pytest.mark.slow
def test_a_new_process_loads_what_another_has_built(built, tmp_path):
    torch.save(generate(built.pipeline, built.args), tmp_path / "here.pt")
    code = (
        "import sys, torch, aoti_pieces as t, utils.pipeline_utils as p\n"
        "from utils import aoti; from utils.steps import export_aoti\n"
        "p.generate, aoti.compile_package = t.generate, None\n"
        "args = t.make_args(sys.argv[1], use_cached_model=True)\n"
        "pipeline = t.make_pipeline(); export_aoti.apply(pipeline, args)\n"
        "here = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(t.generate(pipeline, args), here, rtol=1e-4, atol=1e-4)\n"
    )
    root = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{root.parent}:{root}"}
    command = [sys.executable, "-c", code, str(built.root), str(tmp_path / "here.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_other_weights_in_the_same_code_give_their_own_picture(built, counted):
    before = len(counted)
    pipeline, args = make_pipeline(seed=7), make_args(built.root, use_cached_model=True)
    pipeline.vae.decoder.conv_out.bias.copy_(torch.tensor([0.5, -0.25, 0.125]))
    eager = generate(pipeline, args)
    export_aoti.apply(pipeline, args)
    found = generate(pipeline, args)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)
    assert (found - built.eager).abs().max() > 0.05
    assert len(counted) == before


def test_code_follows_weights_that_change_in_place(built):
    pipeline, args = make_pipeline(), make_args(built.root, use_cached_model=True)
    export_aoti.apply(pipeline, args)
    pipeline.transformer.proj_out.weight.zero_()
    pipeline.transformer.proj_out.bias.zero_()
    assert pipeline.transformer(**transformer_call())[0].abs().max() == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(1, 17, 64)}, r"hidden_states\.shape: .*16, 64\].*17, 64\]"),
        ({"hidden_states": torch.zeros(2, 16, 64)}, r"hidden_states\.shape: .*expected \[2, 16"),
        ({"timestep": torch.zeros(1, dtype=torch.bfloat16)}, r"timestep\.dtype.*32.*bfloat16"),
        ({"timestep": torch.zeros(1, device="meta")}, r"timestep\.device.*cpu.*meta"),
        ({"guidance": torch.ones(1)}, r"guidance\.shape: found nothing, expected \[1\]"),
        ({"txt_ids": None}, r"txt_ids\.shape: found \[32, 3\], expected nothing"),
        ({"joint_attention_kwargs": {"scale": 2.0}}, r"joint_attention_kwargs\.scale.*2\.0"),
        ({"controlnet_blocks_repeat": True}, r"controlnet_blocks_repeat.*False.*True"),
    ],
    ids=["tokens", "batch", "dtype", "device", "guidance", "missing", "kwargs", "flag"],
)
def test_a_call_of_another_kind_is_told_by_field(built, monkeypatch, changes, message):
    monkeypatch.setattr(built.args, "use_cached_model", True)
    with pytest.raises(UserError, match=message):
        built.pipeline.transformer(**transformer_call(**changes))


def test_a_call_of_another_kind_gets_packages_of_its_own(built, copied, counted):
    pipeline, args = make_pipeline(), make_args(copied)
    wide = make_args(copied, width=24)
    eager = generate(pipeline, wide)
    export_aoti.apply(pipeline, args)
    before = len(counted)
    with only_known_calls(), pytest.raises(RuntimeError, match=r"transformer.*in a timed run"):
        generate(pipeline, wide)
    found = generate(pipeline, wide)
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)
    assert counted[before:] == ["transformer", "decoder"]
    with only_known_calls():  # both kinds are known from here on
        torch.testing.assert_close(generate(pipeline, wide), found)
        torch.testing.assert_close(generate(pipeline, args), built.eager, rtol=1e-4, atol=1e-4)
    again = make_pipeline()
    export_aoti.apply(again, make_args(copied, use_cached_model=True))
    torch.testing.assert_close(generate(again, wide), found)
    assert len(counted) == before + 2


def test_strides_positions_names_and_return_dict(built):
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    forward = built.pipeline.transformer.forward
    call = transformer_call()
    (plain,) = forward(**call)
    strided = call["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(forward(**(call | {"hidden_states": strided}))[0], plain)
    in_order = [call.pop(name) for name in ("hidden_states", "encoder_hidden_states")]
    assert torch.equal(forward(*in_order, **call)[0], plain)
    output = forward(*in_order, **(call | {"return_dict": True}))
    assert isinstance(output, Transformer2DModelOutput)
    assert torch.equal(output.sample, plain)
    with pytest.raises(TypeError, match="no_such"):
        built.pipeline.transformer(**transformer_call(), no_such=1)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"height": 24}, r"inputs\.hidden_states\.shape: found \[1, 16, 64\], expected \[1, 24"),
        ({"checkpoint": FakeCheckpoint(weights="2")}, r"checkpoint\.weights: found sha256:1"),
        ({"plan": {"fused_projections": on(), "channels_last": on(), "fa3": on(backend="fa2")}},
         r"steps\.fa3\.backend: found nothing, expected fa2"),
        ({"machine": Machine("cpu", "other")}, r"machine\.name: found test processor"),
        ({"disable_inductor_tuning_flags": True}, r"compiler\.epilogue_fusion: found False"),
    ],
    ids=["size", "weights", "steps", "machine", "compiler"],
)  # fmt: skip
def test_cached_model_of_another_run_is_refused_by_field(built, counted, changes, field):
    before = len(counted)
    pipeline = make_pipeline()
    with pytest.raises(UserError, match=field):
        export_aoti.apply(pipeline, make_args(built.root, use_cached_model=True, **changes))
    assert len(counted) == before
    assert "forward" not in vars(pipeline.transformer)


def test_other_versions_are_refused_or_replaced(built, copied, monkeypatch):
    now = artifacts.environment()
    monkeypatch.setattr("utils.artifacts.run.environment", lambda: now | {"torch": "9.9"})
    args = make_args(copied, use_cached_model=True)
    with pytest.raises(UserError, match=r"transformer.*versions\.torch: found 2.*, expected 9\.9"):
        export_aoti.apply(make_pipeline(), args)
    code = {c: next(copied.glob(f"{c}-*.pt2")).read_bytes() for c in ("transformer", "decoder")}
    tables = {
        c: json.loads(next(copied.glob(f"{c}-*.json")).read_text())["constants"] for c in code
    }
    monkeypatch.setattr(aoti, "export", lambda component: None)
    monkeypatch.setattr(  # another build of the same code: a zip may have bytes behind it
        aoti, "compile_package", lambda p, c, o, s: ({".pt2": code[c.name]}, tables[c.name])
    )
    before = {path.name for path in copied.glob("*.json")}
    args.use_cached_model = False
    export_aoti.apply(make_pipeline(), args)
    assert {path.name for path in copied.glob("*.json")} == before
    assert len(list(copied.glob("*.pt2"))) == 2
    args.use_cached_model = True
    export_aoti.apply(make_pipeline(), args)


@pytest.mark.parametrize(
    "harm", ["truncated", "flipped", "absent", "swapped", "manifest", "format"]
)
def test_a_broken_package_is_refused_and_never_opened(copied, monkeypatch, capsys, harm):
    package = next(copied.glob("transformer-*.pt2"))
    manifest = next(copied.glob("transformer-*.json"))
    content = package.read_bytes()
    expected = "transformer.*sha256: found"
    if harm == "truncated":
        package.write_bytes(content[:-1])
        expected = rf"size: found {len(content) - 1}, expected {len(content)}"
    elif harm == "flipped":
        package.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    elif harm == "absent":
        package.unlink()
        expected = "No such file"
    elif harm == "swapped":
        other = next(copied.glob("decoder-*.pt2")).read_bytes()
        package.write_bytes(other[: len(content)].ljust(len(content)))
    elif harm == "manifest":
        manifest.write_text(manifest.read_text()[:100])
        expected = "no readable manifest"
    else:
        manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
        expected = "format: found 1, expected 2"
    monkeypatch.setattr(aoti, "load_package", lambda path: pytest.fail("opened"))
    with pytest.raises(UserError, match=expected):
        export_aoti.apply(make_pipeline(), make_args(copied, use_cached_model=True))

    class BuiltAnewError(Exception):
        pass

    def build(*args):
        raise BuiltAnewError

    monkeypatch.setattr(aoti, "compile_package", build)
    monkeypatch.setattr(aoti, "export", lambda component: None)
    with pytest.raises(BuiltAnewError):
        export_aoti.apply(make_pipeline(), make_args(copied))
    said = capsys.readouterr().err
    assert re.search(f"the stored package is damaged or does not fit .*{expected}", said), said


def test_weights_that_do_not_fit_the_code_are_refused(built):
    """By _find as another package's, and again before pointers are handed over."""
    pipeline = make_pipeline()
    package = next(built.root.glob("decoder-*.pt2"))
    manifest = json.loads(next(built.root.glob("decoder-*.json")).read_text())
    component = aoti.Component("decoder", pipeline.vae.decoder)
    pipeline.vae.decoder.conv_in.weight.data = pipeline.vae.decoder.conv_in.weight.double()
    with pytest.raises(RuntimeError, match=r"decoder: weight conv_in\.weight: found.*float64"):
        aoti.attach(component, {".pt2": package}, manifest["constants"])
    pipeline = make_pipeline()
    pipeline.vae.to(memory_format=torch.contiguous_format)  # other strides: other memory
    with pytest.raises(UserError, match=r"decoder.*weight conv_out\.weight: found.*expected"):
        export_aoti.apply(pipeline, make_args(built.root, use_cached_model=True))


def test_a_graph_around_the_package(built):
    """CUDA's layering, with the CPU stand-in for a graph: the call is compared before it."""
    from test_cudagraph import RerunRecorder

    from utils.cudagraph import CUDAGraphWrapper, GraphPool

    pipeline, recorder = make_pipeline(), RerunRecorder()
    pool = GraphPool(recorder)
    export_aoti.apply(pipeline, make_args(built.root, use_cached_model=True))
    for name, module in (("transformer", pipeline.transformer), ("decoder", pipeline.vae.decoder)):
        (runner,) = module.forward.runners.values()
        runner.run = CUDAGraphWrapper(runner.run, name, pool)
    found = generate(pipeline, built.args)
    torch.testing.assert_close(found, built.eager, rtol=1e-4, atol=1e-4)
    assert recorder.recorded == 2  # two steps replayed one graph
    with pytest.raises(UserError, match="guidance"):
        pipeline.transformer(**transformer_call(guidance=torch.ones(1)))
    assert recorder.recorded == 2


def test_check_compares_what_needs_no_weights(built):
    args = make_args(built.root, use_cached_model=True)
    assert export_aoti.check(args).is_on
    args.dtype = torch.bfloat16
    verdict = export_aoti.check(args)
    assert verdict.state == "refused"
    for component in export_aoti.COMPONENTS["full"]:
        assert f"--use-cached-model: {component}-" in verdict.reason
    assert "dtype: found torch.float32, expected torch.bfloat16" in verdict.reason

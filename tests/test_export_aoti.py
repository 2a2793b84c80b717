"""export_aoti with real AOTI packages of a tiny random FluxPipeline, built and run on a CPU."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from utils import aoti, artifacts
from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import export_aoti, off, on

PIXELS, TEXT = 16, 32  # edge of the picture, text tokens
TOKENS = (PIXELS // 4) ** 2  # this VAE halves once, FLUX packs 2x2


@dataclass(frozen=True)
class FakeCheckpoint:
    name: str = "tiny"
    weights: str = "sha256:1"

    def identity(self):
        return self.weights


def make_transformer(dtype, seed=0, guidance=False):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )
    for name, parameter in model.named_parameters():
        if ".norm" in name and name.endswith("linear.bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # gates near 0 would hide the blocks
    return model.requires_grad_(False).eval().to(dtype)


def make_pipeline(dtype=torch.float32, seed=0, guidance=False):
    """Build a FluxPipeline without text encoders: fused, custom attention op, channels-last VAE."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.steps import channels_last, fused_projections

    transformer = make_transformer(dtype, seed, guidance)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.requires_grad_(False).eval().to(dtype),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    fused_projections.apply(pipeline, None)
    transformer.set_attn_processor(FlashFusedFluxAttnProcessor3_0("sdpa"))
    channels_last.apply(pipeline, None)
    return pipeline


def generate(pipeline, args, num_inference_steps=None, output_type="pt"):
    """Stand in for pipeline_utils.generate where there are no text encoders."""
    generator = torch.Generator().manual_seed(5)
    like = pipeline.transformer.x_embedder.bias
    with torch.no_grad():
        return pipeline(
            prompt_embeds=torch.randn(1, TEXT, 64, generator=generator).to(like),
            pooled_prompt_embeds=torch.randn(1, 64, generator=generator).to(like),
            height=args.height,
            width=args.width,
            num_inference_steps=num_inference_steps or 2,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images


def make_args(cache_dir, **changes):
    args = SimpleNamespace(
        checkpoint=FakeCheckpoint(),
        machine=Machine("cpu", "test processor"),
        dtype=torch.float32,
        plan={"fused_projections": on(), "channels_last": on(), "quant": off("cpu")},
        cache_dir=str(cache_dir),
        use_cached_model=False,
        compile_export_mode="export_aoti",
        compile_scope="full",
        disable_inductor_tuning_flags=False,
        height=PIXELS,
        width=PIXELS,
    )
    vars(args).update(changes)
    return args


@pytest.fixture(scope="module", autouse=True)
def counted():
    """Replace the pipeline's call, and count what is compiled."""
    builds = []
    with pytest.MonkeyPatch.context() as patch:
        compile_package = aoti.compile_package

        def counting(program, component, options):
            builds.append(component.name)
            return compile_package(program, component, options)

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


@pytest.mark.slow
def test_a_new_process_loads_what_another_has_built(built, tmp_path):
    torch.save(generate(built.pipeline, built.args), tmp_path / "here.pt")
    code = (
        "import sys, torch, test_export_aoti as t, utils.pipeline_utils as p\n"
        "from utils import aoti; from utils.steps import export_aoti\n"
        "p.generate, aoti.compile_package = t.generate, None\n"
        "assert 'utils.kernels.flash_attention' not in sys.modules\n"
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
    call = transformer_call(built)
    assert pipeline.transformer(**call)[0].abs().max() == 0


def transformer_call(built, **changes):
    """A call that the transformer's package covers, with changes."""
    call = {
        "hidden_states": torch.randn(1, TOKENS, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": None,
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
    return call | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_states": torch.zeros(1, 17, 64)}, r"hidden_states shape.*\[1, 16, 64\].*17"),
        ({"hidden_states": torch.zeros(2, 16, 64)}, r"hidden_states shape.*\[2, 16, 64\]"),
        ({"timestep": torch.zeros(1, dtype=torch.bfloat16)}, r"timestep dtype.*32.*bfloat16"),
        ({"timestep": torch.zeros(1, device="meta")}, r"timestep device.*cpu.*meta"),
        ({"guidance": torch.ones(1)}, r"guidance.*the value None.*\[1\]"),
        ({"txt_ids": None}, r"txt_ids.*\[32, 3\].*None"),
        ({"joint_attention_kwargs": {"scale": 2.0}}, "joint_attention_kwargs.*covers None"),
        ({"controlnet_blocks_repeat": True}, r"controlnet_blocks_repeat.*False.*True"),
    ],
    ids=["tokens", "batch", "dtype", "device", "guidance", "missing", "kwargs", "flag"],
)
def test_a_call_that_is_not_covered_is_refused_by_name(built, changes, message):
    with pytest.raises(ValueError, match=message):
        built.pipeline.transformer(**transformer_call(built, **changes))


def test_an_unknown_argument_is_refused(built):
    with pytest.raises(TypeError, match="no_such"):
        built.pipeline.transformer(**transformer_call(built), no_such=1)


def test_strides_positions_and_return_dict(built):
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    forward = built.pipeline.transformer.forward
    call = transformer_call(built)
    (plain,) = forward(**call)
    strided = call["hidden_states"].transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(forward(**(call | {"hidden_states": strided}))[0], plain)
    in_order = [call.pop(name) for name in ("hidden_states", "encoder_hidden_states")]
    assert torch.equal(forward(*in_order, **call)[0], plain)
    output = forward(*in_order, **(call | {"return_dict": True}))
    assert isinstance(output, Transformer2DModelOutput)
    assert torch.equal(output.sample, plain)


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
    monkeypatch.setattr(artifacts, "environment", lambda: now | {"torch": "9.9"})
    args = make_args(copied, use_cached_model=True)
    with pytest.raises(UserError, match=r"transformer.*versions\.torch: found 2.*, expected 9\.9"):
        export_aoti.apply(make_pipeline(), args)
    code = {c: next(copied.glob(f"{c}-*.pt2")).read_bytes() for c in ("transformer", "decoder")}
    tables = {
        c: json.loads(next(copied.glob(f"{c}-*.json")).read_text())["constants"] for c in code
    }
    monkeypatch.setattr(aoti, "export", lambda component: None)
    monkeypatch.setattr(  # another build of the same code: a zip may have bytes behind it
        aoti, "compile_package", lambda p, c, o: ({".pt2": code[c.name]}, tables[c.name])
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
def test_a_broken_package_is_refused_and_never_opened(copied, monkeypatch, harm):
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
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 0'))
        expected = "format: found 0, expected 1"
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


def test_replaced_forward_cannot_be_exported(built):
    with pytest.raises(RuntimeError, match=r"transformer\.forward has been replaced already"):
        aoti.Component("transformer", built.pipeline.transformer)


def test_shell_shares_every_tensor_and_leaves_the_module_alone():
    model = make_transformer(torch.bfloat16)
    before = {name: type(module) for name, module in model.named_modules()}
    weights = aoti.Component("transformer", model).weights()
    live = dict(model.named_parameters())
    assert weights.keys() == live.keys()
    assert all(weights[name].data_ptr() == live[name].data_ptr() for name in live)
    assert {name: type(module) for name, module in model.named_modules()} == before


def packaged(name, module, call, tmp_path):
    """Export, compile, store and load one module; give the component and its new forward."""
    component = aoti.Component(name, module)
    aoti.record_inputs([component], lambda: module(**call))
    files, constants = aoti.compile_package(aoti.export(component), component, {})
    package = artifacts.save(
        artifacts.open_cache(tmp_path / "c"), {"component": name}, files, constants
    )
    return aoti.PackageForward(component, aoti.attach(component, package.files, constants)), package


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def quantise(model, granularity, monkeypatch):
    """Quantise the blocks' Linears on a CPU, which torchao would refuse."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda g: None)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=granularity)
    quantize_(
        model,
        config,
        filter_fn=lambda m, n: isinstance(m, torch.nn.Linear) and "blocks" in n and "norm" not in n,
    )


def test_float8_rows_with_guidance_in_bf16(monkeypatch, tmp_path):
    from torchao.quantization import PerRow

    model = make_transformer(torch.bfloat16, guidance=True)
    quantise(model, PerRow(), monkeypatch)
    call = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value
        for name, value in transformer_call(None, guidance=torch.tensor([4.0])).items()
    }  # 4.0: bf16 rounds 3.5 * 1000
    with torch.no_grad():
        eager = model(**call)[0]
    forward, package = packaged("transformer", model, call, tmp_path)
    assert relative_error(forward(**call)[0], eager) < 0.02  # bf16: Inductor keeps fp32 inside
    other = call | {"guidance": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert relative_error(forward(**other)[0], eager) > 1e-4  # an input, not a constant
    with pytest.raises(ValueError, match="guidance"):
        forward(**(call | {"guidance": None}))
    kinds = {spec[1] for spec in package.constants.values()}
    assert kinds == {"torch.bfloat16", "torch.float8_e4m3fn", "torch.float32"}
    assert type(model.transformer_blocks[0].attn.to_q) is torch.nn.Linear

    other_model = make_transformer(torch.bfloat16, seed=3, guidance=True)
    quantise(other_model, PerRow(), monkeypatch)
    with torch.no_grad():
        truth = other_model(**call)[0]
    component = aoti.Component("transformer", other_model)
    run = aoti.attach(component, package.files, package.constants)
    component.inputs = component.bind((), call)[0]
    found = aoti.PackageForward(component, run)(**call)[0]
    assert relative_error(found, truth) < 0.02


def test_a_graph_around_the_package(built):
    """CUDA's layering, with the CPU stand-in for a graph: the call is compared before it."""
    from test_cudagraph import RerunRecorder

    from utils.cudagraph import CUDAGraphWrapper

    pipeline, recorder = make_pipeline(), RerunRecorder()
    export_aoti.apply(pipeline, make_args(built.root, use_cached_model=True))
    for name, module in (("transformer", pipeline.transformer), ("decoder", pipeline.vae.decoder)):
        module.forward.run = CUDAGraphWrapper(module.forward.run, name, recorder)
    found = generate(pipeline, built.args)
    torch.testing.assert_close(found, built.eager, rtol=1e-4, atol=1e-4)
    assert recorder.recorded == 2  # two steps replayed one graph
    with pytest.raises(ValueError, match="guidance"):
        pipeline.transformer(**transformer_call(built, guidance=torch.ones(1)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_pipeline(tmp_path):
    from utils.cudagraph import CUDAGraphWrapper
    from utils.hardware import detect

    pipeline = make_pipeline(torch.bfloat16).to("cuda")
    args = make_args(tmp_path / "cache", dtype=torch.bfloat16, machine=detect("cuda"))
    eager = generate(pipeline, args, output_type="latent")
    export_aoti.apply(pipeline, args)
    assert isinstance(pipeline.transformer.forward.run, CUDAGraphWrapper)
    first = generate(pipeline, args, output_type="latent")
    assert relative_error(first, eager) < 0.02
    assert torch.equal(generate(pipeline, args, output_type="latent"), first)
    again = make_pipeline(torch.bfloat16).to("cuda")
    args.use_cached_model = True
    export_aoti.apply(again, args)
    assert torch.equal(generate(again, args, output_type="latent"), first)


@pytest.mark.slow
def test_bf16_pipeline(tmp_path):
    pipeline = make_pipeline(torch.bfloat16)
    args = make_args(tmp_path / "cache", dtype=torch.bfloat16)
    eager = generate(pipeline, args, output_type="latent")
    export_aoti.apply(pipeline, args)
    assert relative_error(generate(pipeline, args, output_type="latent"), eager) < 0.02


def test_scales_per_tensor_are_part_of_the_identity(monkeypatch):
    """One-element scales are folded into the code, so other values mean another package."""
    from torchao.quantization import PerRow, PerTensor

    digests = []
    for factor in (1, 1, 2):
        model = make_transformer(torch.bfloat16)
        model.transformer_blocks[0].ff.net[2].weight.mul_(factor)
        quantise(model, PerTensor(), monkeypatch)
        digests.append(aoti.folded_values(aoti.Component("transformer", model).weights()))
    assert digests[0] == digests[1] != digests[2]
    quantise(by_row := make_transformer(torch.bfloat16), PerRow(), monkeypatch)
    assert aoti.folded_values(aoti.Component("transformer", by_row).weights()) is None


class WithLiftedTensor(torch.nn.Module):
    """Has a weight that is in no state dict."""

    def __init__(self, table):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16), requires_grad=False)
        self.table = table  # a plain attribute: export lifts it to a constant

    def forward(self, sample, latent_embeds=None):
        return sample * self.scale + self.table + torch.tensor([1.0, 2.0] * 8)


def test_lifted_tensors_travel_with_the_package(tmp_path):
    module = WithLiftedTensor(torch.arange(16.0))
    call = {"sample": torch.randn(4, 16)}
    expected = module(**call)
    forward, package = packaged("decoder", module, call, tmp_path)
    torch.testing.assert_close(forward(**call), expected)
    assert package.constants.keys() == {"scale"}
    content = bytearray(package.files[".safetensors"].read_bytes())
    content[-1] ^= 1
    package.files[".safetensors"].write_bytes(content)
    found, lines = artifacts.find(tmp_path / "c", {"component": "decoder"})
    assert found is None and "safetensors sha256: found" in lines[0]


# The store alone


IDENTITY = {"component": "decoder", "dtype": "bf16", "versions": {"torch": "1"}, "code": "a"}


def store(path):
    return artifacts.open_cache(path / "cache")


def test_store_round_trip_and_replacement(tmp_path):
    root = store(tmp_path)
    saved = artifacts.save(root, IDENTITY, {".pt2": b"old"}, {"w": [[2], "f", [1]]})
    assert artifacts.find(root, IDENTITY) == (saved, [])
    newer = IDENTITY | {"versions": {"torch": "2"}}
    assert artifacts.find(root, newer)[1] == [f"{saved.name}: versions.torch: found 1, expected 2"]
    again = artifacts.save(root, newer, {".pt2": b"new"}, {})
    assert again.name == saved.name and not saved.files[".pt2"].exists()
    assert [path.name for path in root.iterdir() if path.suffix == ".pt2"] == [
        again.files[".pt2"].name
    ]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", range(4))
def test_an_interrupted_save_leaves_the_previous_package(tmp_path, monkeypatch, error, call):
    root = store(tmp_path)
    old = artifacts.save(root, IDENTITY, {".pt2": b"old", ".safetensors": b"t"}, {})
    before = {path: path.read_bytes() for path in root.iterdir()}
    real, calls = artifacts.os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > call:
            raise error
        real(descriptor)

    monkeypatch.setattr(artifacts.os, "fsync", fsync)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        artifacts.save(root, IDENTITY, {".pt2": b"new", ".safetensors": b"t"}, {})
    assert {path: path.read_bytes() for path in root.iterdir()} == before
    assert artifacts.find(root, IDENTITY) == (old, [])


def test_cache_directory_is_private(tmp_path, monkeypatch):
    root = store(tmp_path / "a")
    assert root.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o722):
        root.chmod(mode)
        with pytest.raises(UserError, match=rf"--cache-dir.*mode 0{mode:o} lets others write"):
            artifacts.open_cache(root)
    root.chmod(0o755)
    artifacts.open_cache(root)
    monkeypatch.setattr(artifacts.os, "geteuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(UserError, match="owned by user"):
        artifacts.open_cache(root)


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({}, "on", ""),
        ({"compile_export_mode": "disabled"}, "off", "disabled"),
        (
            {"compile_export_mode": "compile", "use_cached_model": True},
            "refused",
            "--use-cached-model: found --compile_export_mode compile, expected export_aoti",
        ),
        ({"compile_scope": "blocks"}, "refused", "--compile_scope blocks"),
        ({"use_cached_model": True}, "refused", "transformer: found no package in"),
    ],
    ids=["on", "off", "cached without export", "blocks", "nothing cached"],
)
def test_check(tmp_path, changes, state, reason):
    verdict = export_aoti.check(make_args(tmp_path / "cache", **changes))
    assert verdict.state == state
    assert reason in verdict.reason
    assert not (tmp_path / "cache").exists()  # checking makes nothing


def test_check_compares_what_needs_no_weights(built):
    args = make_args(built.root, use_cached_model=True)
    assert export_aoti.check(args).is_on
    args.dtype = torch.bfloat16
    verdict = export_aoti.check(args)
    assert verdict.state == "refused"
    for component in export_aoti.COMPONENTS:
        assert f"--use-cached-model: {component}-" in verdict.reason
    assert "dtype: found torch.float32, expected torch.bfloat16" in verdict.reason


def test_check_refuses_a_cache_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    verdict = export_aoti.check(make_args(tmp_path / "file" / "cache"))
    assert verdict.state == "refused" and "is not a folder" in verdict.reason


def test_flags_are_spelled_with_either_dash():
    from utils.benchmark_utils import create_parser

    args = create_parser().parse_args(["--cache_dir", "x", "--use_cached_model"])
    assert args.cache_dir == "x" and args.use_cached_model
    assert not Path(create_parser().parse_args([]).cache_dir).is_absolute()

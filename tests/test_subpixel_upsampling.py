"""Upsampling inside the convolution: diffusers' numbers by both ways, and the bundled picture."""

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args
from diffusers.models.upsampling import Upsample2D
from torch._dynamo.testing import CompileCounterWithBackend

from tests.flux_pieces import vae
from utils import aoti
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels.subpixel_upsampling import SubpixelUpsample, summed_taps
from utils.pipeline_utils import STEPS, generate, load_pipeline, optimize
from utils.quality import psnr_db, relative_l2
from utils.steps import channels_last, on, subpixel_upsampling, vae_attention

WAYS = ("transposed", "phases")
LAYOUTS = (torch.contiguous_format, torch.channels_last)
CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    ],
)


@torch.no_grad()
def pair(way: str, layout, channels: int = 32, out: int = 24, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    plain = Upsample2D(channels, use_conv=True, out_channels=out).to(dtype).requires_grad_(False)
    ours = SubpixelUpsample(plain.conv, way == "transposed")
    return plain.to(device), ours.to(device, memory_format=layout)


def apply(model, way: str) -> None:
    plan = {"subpixel_upsampling": on(way=way)}
    subpixel_upsampling.apply(SimpleNamespace(vae=model), SimpleNamespace(plan=plan))


def optimized(model, way: str):
    """Give a copy of a VAE with the step applied."""
    model = copy.deepcopy(model)
    apply(model, way)
    return model


def test_taps_that_read_the_same_pixel_are_summed():
    taps = summed_taps(torch.arange(9.0).view(1, 1, 3, 3))[0, 0]
    assert taps[0].tolist() == [8, 7 + 8, 6 + 7, 6]
    assert taps[2].tolist() == [2 + 5, 1 + 2 + 4 + 5, 0 + 1 + 3 + 4, 0 + 3]
    assert summed_taps(torch.randn(3, 2, 3, 3).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 9, 7), (3, 16, 5)])
@torch.no_grad()
def test_it_equals_upsampling_first(way, layout, size, device):
    batch, height, width = size
    plain, ours = pair(way, layout, device=device)
    x = torch.randn(batch, 32, height, width, device=device).contiguous(memory_format=layout)
    exact = plain.double()(x.double())
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = ours(x)
    assert found.shape == exact.shape and relative_l2(found, exact) < 2e-6  # cuDNN sums otherwise
    as_asked = layout if way == "transposed" else torch.channels_last
    if height * width > 1:  # one pixel lies in every layout
        assert found.is_contiguous(memory_format=as_asked)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_in_bf16_summed_taps_are_rounded_once_more(way, device):
    """8/9 of the products' variance has such taps: the square root of 1 + 8/9 of one rounding.

    A CPU that emulates bf16 adds a transposed convolution's taps in bf16, besides: 2.35 was seen.
    """
    plain, ours = pair(way, torch.channels_last, 256, 256, torch.bfloat16, device)
    x = torch.randn(2, 256, 12, 9, device=device, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last)
    own = plain(x)
    exact = plain.double()(x.double())
    found = ours(x)
    assert found.dtype == torch.bfloat16
    emulated = device == "cpu" and way == "transposed" and Machine("cpu", "").emulates_bf16
    assert relative_l2(found, exact) < (2.5 if emulated else 1.45) * relative_l2(own, exact)


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_it_is_one_graph_and_can_be_exported(way):
    plain, ours = pair(way, torch.channels_last)
    calls = [torch.randn(1, 32, 6, 5), torch.randn(2, 32, 8, 4)]
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    for x in calls:  # the second makes the sizes dynamic
        assert relative_l2(compiled(x), plain(x)) < 1e-6
    exported = torch.export.export(ours, (calls[0],)).module()  # of one size, as packages are
    assert relative_l2(exported(calls[0]), plain(calls[0])) < 1e-6


def test_the_step_is_asked_for():
    assert make_args("--device", "cpu").plan["subpixel_upsampling"].state == "off"
    verdict = make_args("--device", "cpu", "--subpixel_upsampling", "phases").plan[
        "subpixel_upsampling"
    ]
    assert verdict.lossless and verdict.settings == {"way": "phases"}
    assert STEPS.index(subpixel_upsampling) < STEPS.index(channels_last)


@torch.no_grad()
def test_what_it_does_not_know_is_refused():
    for other in (
        Upsample2D(32, use_conv=False),
        Upsample2D(32, use_conv=True, kernel_size=1, padding=0),
        Upsample2D(32, use_conv_transpose=True),
        Upsample2D(32, use_conv=True, norm_type="rms_norm", eps=1e-6, elementwise_affine=True),
    ):
        model = vae()
        model.decoder.up_blocks[0].upsamplers[0] = other
        with pytest.raises(UserError, match="--subpixel_upsampling: found Upsample2D at up_blocks"):
            apply(model, "phases")


@pytest.mark.parametrize("way", WAYS)
def test_old_weights_go_and_the_layout_follows(way):
    model = vae()
    old = model.decoder.up_blocks[0].upsamplers[0].conv
    count = sum(p.numel() for p in model.parameters())
    apply(model, way)
    channels_last.apply(SimpleNamespace(vae=model), None)
    new = model.decoder.up_blocks[0].upsamplers[0]
    assert new.weight.is_contiguous(memory_format=torch.channels_last)
    assert not new.weight.requires_grad
    grown = sum(p.numel() for p in model.parameters()) - count
    more = 3 * old.bias.numel() if way == "phases" else 0
    assert grown == old.weight.numel() * 7 // 9 + more  # 16 taps for 9, and none of the 9 left


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_one_graph_of_a_decoder_serves_all_sizes_and_tiles_go_through_it(way):
    plain = vae(torch.float32)
    model = optimized(plain, way)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model.decoder, fullgraph=True, backend=counter)
    for size in ((6, 10), (5, 7), (12, 4)):
        latents = torch.randn(2, 16, *size)
        assert relative_l2(compiled(latents), plain.decoder(latents)) < 1e-5
    assert counter.frame_count == 2  # one static, then one dynamic
    latents = torch.randn(1, 16, 24, 40)
    for one in (plain, model):
        one.enable_tiling()
        one.tile_sample_min_size, one.tile_latent_min_size = 32, 16
    assert relative_l2(model.decode(latents)[0], plain.decode(latents)[0]) < 1e-5


@torch.no_grad()
def test_the_decoder_is_as_near_to_fp32_as_before():
    latents = torch.randn(2, 16, 9, 16, generator=torch.Generator().manual_seed(1))
    args = make_args("--device", "cpu", "--disable_bf16")
    plain = load_pipeline(args).vae
    exact = plain.decode(latents)[0]
    before = plain.bfloat16().decode(latents.bfloat16())[0]
    for way in WAYS:
        ours = optimized(plain, way)
        assert sum(isinstance(m, SubpixelUpsample) for m in ours.decoder.modules()) == 3
        assert not any(isinstance(m, Upsample2D) for m in ours.decoder.modules())  # nor weights
        after = ours.decode(latents.bfloat16())[0]
        assert relative_l2(after, exact) <= 1.25 * relative_l2(before, exact)


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA])
def test_the_whole_calls_picture_at_once_and_in_tiles(device):
    """The two ways by turns, since a call of each costs a second."""
    call = ("--device", device, "--num_inference_steps", "1", "--width", "160", "--disable_quant")
    call = (*call, "--compile_export_mode", "disabled")
    for way, tier in (("transposed", "full"), ("phases", "tiled")):
        plain = make_args(*call, "--memory", tier)
        pipeline = optimize(load_pipeline(plain), plain)
        expected = generate(pipeline, plain)[0]
        ours = make_args(*call, "--memory", tier, "--subpixel_upsampling", way)
        assert ours.plan["subpixel_upsampling"].is_on
        subpixel_upsampling.apply(pipeline, ours)
        found = generate(pipeline, ours)[0]
        assert found.tobytes() != expected.tobytes() and psnr_db(found, expected) > 45


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_a_package_of_the_decoder(way, tmp_path):
    """With the attention's op inside, too."""
    model = optimized(vae(), way)
    for step in (vae_attention, channels_last):
        step.apply(SimpleNamespace(vae=model), None)
    latents = torch.randn(1, 16, 6, 10).bfloat16()
    expected = model.decode(latents)[0]
    component = aoti.Component("decoder", model.decoder)
    aoti.record_inputs([component], lambda: model.decode(latents))
    files, constants = aoti.compile_package(aoti.export(component), component, {})
    paths = {}
    for ending, content in files.items():
        paths[ending] = tmp_path / f"decoder{ending}"
        paths[ending].write_bytes(content)
    package = aoti.attach(component, paths, constants)
    assert relative_l2(package(**component.inputs), expected) < 0.02


@pytest.mark.slow
def test_inductors_code_never_writes_the_enlarged_tensor():
    done = subprocess.run(
        [sys.executable, "-m", "tests.decoder_codegen"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    *rows, total = map(json.loads, done.stdout.splitlines())
    for row in rows:
        assert row["ours_kernels"] == row["plain_kernels"] - 1, row
        enlarged = 2 * row["channels"] * (2 * row["edge"]) ** 2 / 1e6  # bf16, in MB
        saved = row["plain_mb"] - row["ours_mb"]  # written once, read once, for larger weights
        assert 1.9 * enlarged < saved < 2.05 * enlarged, row
    assert total["plain_gb"] - total["ours_gb"] > 1.7

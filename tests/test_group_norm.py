"""GroupNorm along the channels: torch's numbers, another order of reading, in the decoder alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_args

from utils.errors import UserError
from utils.kernels.group_norm import ChannelGroupNorm
from utils.pipeline_utils import load_pipeline
from utils.quality import relative_l2
from utils.steps import group_norm

ON = ("--device", "cpu", "--channel_group_norm", "--compile_export_mode", "compile")


@torch.no_grad()
def pair(groups: int, channels: int, dtype):
    torch.manual_seed(0)
    plain = torch.nn.GroupNorm(groups, channels, eps=1e-6)
    torch.nn.init.normal_(plain.weight), torch.nn.init.normal_(plain.bias)
    plain = plain.to(dtype)
    ours = ChannelGroupNorm(groups, channels, eps=1e-6, dtype=dtype)
    ours.load_state_dict(plain.state_dict())
    return plain.requires_grad_(False), ours.requires_grad_(False)


@pytest.mark.parametrize("shape", [(2, 64, 9, 7), (1, 32, 16, 16), (3, 96, 40)])
@pytest.mark.parametrize("offset", [0.0, 300.0])
@torch.no_grad()
def test_it_equals_torchs_own(shape, offset):
    plain, ours = pair(32, shape[1], torch.float32)
    x = torch.randn(shape) * torch.linspace(0.1, 20, shape[1]).view(1, -1, *[1] * (len(shape) - 2))
    x = x + offset  # a large mean: variances must not cancel
    exact = plain.double()(x.double())
    assert relative_l2(ours(x), exact) < (1e-4 if offset else 1e-6)
    plain, ours = pair(32, shape[1], torch.bfloat16)
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    found = ours(x.bfloat16())
    assert found.dtype == torch.bfloat16 and found.stride() == x.stride()
    exact = plain.double()(x.bfloat16().double())
    assert relative_l2(found, exact) <= 1.25 * 2**-9  # one rounding to bf16


def test_the_step_is_asked_for_and_needs_layout_and_compiler():
    assert make_args("--device", "cpu").plan["group_norm"].state == "off"
    assert make_args(*ON).plan["group_norm"].lossless
    for flags, expected in (
        (("--compile_export_mode", "disabled"), "found --compile_export_mode disabled"),
        (("--disable_channels_last",), "found --disable_channels_last"),
    ):
        with pytest.raises(UserError, match=f"--channel_group_norm: {expected}"):
            make_args(*ON, *flags)


def test_the_decoder_is_as_near_to_fp32_as_before_and_nothing_else_changes():
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    args = make_args(*ON)
    with torch.no_grad():
        exact = load_pipeline(make_args("--device", "cpu", "--disable_bf16")).vae.decode(latents)[0]
        pipeline = load_pipeline(args)
        before = pipeline.vae.decode(latents.bfloat16())[0]
        group_norm.apply(pipeline, args)
        after = pipeline.vae.decode(latents.bfloat16())[0]
    kinds = {type(m) for m in pipeline.vae.decoder.modules() if isinstance(m, torch.nn.GroupNorm)}
    assert kinds == {ChannelGroupNorm}
    assert ChannelGroupNorm not in {type(m) for m in pipeline.vae.encoder.modules()}
    assert relative_l2(after, exact) <= 1.25 * relative_l2(before, exact)


@pytest.mark.slow
def test_inductors_code_touches_fewer_memory_sectors():
    done = subprocess.run(
        [sys.executable, "-m", "tests.group_norm_codegen"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    *rows, total = map(json.loads, done.stdout.splitlines())
    for row in rows:
        assert row["ours_mb"] <= 1.01 * row["tensor_mb"] + 1, row  # every sector once
        assert row["ours_mb"] <= row["torch_mb"] + 1, row
    assert total["torch_gb"] > 4 * total["ours_gb"]

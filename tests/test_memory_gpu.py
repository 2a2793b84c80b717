"""Memory tiers on a CUDA device: the estimate against the allocator's peak, and the same bits."""

import copy
import gc

import pytest
import torch
from conftest import make_args

from utils import quality, reference
from utils.memory_tiers import GIB, TIERS
from utils.pipeline_utils import generate, load_pipeline, optimize

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]
EAGER = (
    "--device",
    "cuda",
    "--disable_quant",
    "--disable_fa3",
    "--compile_export_mode",
    "disabled",
)
ONE_TILE = ("--ckpt", "tiny-schnell", "--height", "64", "--width", "64")
LARGE = ("--ckpt", "tiny-schnell", "--height", "1024", "--width", "1024")


@pytest.mark.parametrize("tier", TIERS[1:])
def test_weights_that_move_change_no_bit(tier):
    def run(tier):
        args = make_args(*EAGER, *ONE_TILE, "--memory", tier)
        return quality.run(optimize(load_pipeline(args), args), args)

    assert torch.equal(run(tier).latents, run("full").latents)


@pytest.mark.parametrize("tier", TIERS)
def test_the_estimate_bounds_the_peak(tier):
    args = make_args(*EAGER, *LARGE, "--memory", tier)
    gc.collect()  # pipelines of other tests, which refer to themselves
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    generate(optimize(load_pipeline(args), args), args)
    peak, found = torch.cuda.max_memory_allocated() - before, args.memory_estimate
    assert 0.7 * (found.weights + found.moment) < peak <= found.gib * GIB


def test_a_reference_is_made_where_the_weights_wait_on_the_host():
    args = make_args(*EAGER, *ONE_TILE, "--memory", "encoders")
    resident = copy.copy(args)
    resident.load_device = "cuda"
    found = [
        generate(reference._load_plain(a, a.dtype), a, output_type="latent")
        for a in (args, resident)
    ]
    assert torch.equal(*found)

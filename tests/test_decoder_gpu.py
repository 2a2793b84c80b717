"""The decoder's opt-in steps on a CUDA device: against fp64, their twins, and eager fp32."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import MODES, make_args

from tests.test_vae_attention import KINDS, heads, truth
from utils.calls import only_known_calls
from utils.hardware import detect
from utils.kernels import vae_attention as kernel
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.quality import relative_l2
from utils.steps import channels_last, group_norm, on, subpixel_upsampling, vae_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
FLAGS = ("--subpixel_upsampling", "transposed", "--vae_attention", "--conv_benchmark")


@pytest.fixture(autouse=True)
def able():
    """Skip, with the reason, on a GPU that the steps are not for."""
    if lacking := vae_attention.lacking(detect("cuda")):
        pytest.skip(lacking)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 4097, 512), (2, 130, 64)])
def test_attention_against_fp64_and_torchs_own(kind, batch, tokens, width):
    given = [x.cuda() for x in heads(kind, batch, tokens, width, torch.bfloat16)]
    exact = truth(*given)
    own = F.scaled_dot_product_attention(*(x.unsqueeze(1) for x in given)).squeeze(1)
    found = relative_l2(kernel.attend(*given), exact)
    assert found <= max(1.25 * relative_l2(own, exact), 2**-9)


def test_attention_keeps_its_memory_bounded():
    """At 1024x1024 the scores of a chunk and their weights: 0.4 GB, not 1.6."""
    given = [x.cuda() for x in heads("random", 1, 16384, 512, torch.bfloat16)]
    attend = torch.compile(kernel.attend, fullgraph=True)
    attend(*given)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    attend(*given)
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 1.25 * kernel.ROWS * 16384 * 6 + 3 * 2**26, peak


@pytest.mark.parametrize("way", ["transposed", "phases"])
@pytest.mark.parametrize("compiled", [False, True])
@torch.no_grad()
def test_the_decoder_is_as_near_to_fp32_as_before(compiled, way):
    latents = torch.randn(2, 16, 32, 24, generator=torch.Generator().manual_seed(1)).cuda()
    exact = load_pipeline(make_args("--device", "cpu", "--disable_bf16")).vae.decode(latents.cpu())
    model = load_pipeline(make_args("--device", "cpu")).vae.cuda()
    before = model.decode(latents.bfloat16())[0]
    pipe = SimpleNamespace(vae=model)
    args = SimpleNamespace(plan={"subpixel_upsampling": on(way=way)})
    for step in (vae_attention, subpixel_upsampling, channels_last, group_norm):
        step.apply(pipe, args)
    torch._dynamo.reset()
    run = torch.compile(model.decoder, fullgraph=True) if compiled else model.decoder
    after = run(latents.bfloat16())
    error = relative_l2(after.cpu(), exact[0])
    assert error <= 1.25 * relative_l2(before.cpu(), exact[0])


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode[::2]))
def test_all_flags_in_every_mode(mode, tmp_path):
    """Graphs and packages included; the flag of the process is as it was."""
    call = ("--ckpt", "tiny-schnell", "--device", "cuda", "--prompt", "a red circle")
    plain = make_args(*call, "--disable_quant", "--disable_fa3")
    expected = generate(load_pipeline(plain), plain, output_type="pt")
    where = ("--compile_export_mode", *mode, "--cache-dir", str(tmp_path / "packages"))
    args = make_args(*call, "--disable_quant", *where, *FLAGS)
    for name in ("subpixel_upsampling", "vae_attention", "conv_algorithms"):
        assert args.plan[name].is_on
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    found = generate(pipeline, args, output_type="pt")
    assert (found.float() - expected.float()).square().mean().sqrt() < 0.01  # 40 dB
    assert not torch.backends.cudnn.benchmark
    with only_known_calls():
        assert torch.equal(generate(pipeline, args, output_type="pt"), found)

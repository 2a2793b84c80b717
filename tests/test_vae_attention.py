"""The VAE's attention by plain products: against fp64, against torch's own, in decoders."""

import copy
import re
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from conftest import make_args
from torch._dynamo.testing import CompileCounterWithBackend

from tests.flux_pieces import vae
from utils import aoti
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels import vae_attention as kernel
from utils.pipeline_utils import load_pipeline
from utils.quality import relative_l2
from utils.steps import channels_last, fused_projections, group_norm, vae_attention

KINDS = ("random", "large", "tiny", "constant", "outliers")


def heads(kind: str, batch: int, tokens: int, width: int, dtype) -> list[torch.Tensor]:
    """Make Q, K and V as slices of one fused product."""
    x = torch.randn(batch, tokens, 3 * width, generator=torch.Generator().manual_seed(3))
    if kind == "large":  # scores of 100 and more: the softmax picks one
        x = x * 4
    elif kind == "tiny":
        x = x * 1e-6
    elif kind == "constant":
        x = torch.full_like(x, 0.37)
    elif kind == "outliers":
        x[..., ::37] *= 30
    return list(x.to(dtype).chunk(3, dim=-1))


def truth(q, k, v):
    """Attend in fp64."""
    q, k, v = (x.double() for x in (q, k, v))
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("batch", "tokens", "width"), [(1, 77, 512), (3, 130, 64)])
def test_it_is_as_near_to_fp64_as_torchs_own(kind, batch, tokens, width):
    """In chunks of 32 queries, the last one shorter."""
    with mock.patch.object(kernel, "ROWS", 32):
        given = heads(kind, batch, tokens, width, torch.float32)
        assert relative_l2(kernel.attend(*given), truth(*given)) < 1e-5
        given = heads(kind, batch, tokens, width, torch.bfloat16)
        found = kernel.attend(*given)
    exact = truth(*given)
    own = F.scaled_dot_product_attention(*(x.unsqueeze(1) for x in given)).squeeze(1)
    assert found.dtype == torch.bfloat16
    assert relative_l2(found, exact) <= 1.25 * relative_l2(own, exact)


def test_scores_in_bf16_would_not_do():
    """Why the op exists: rounded scores are five times as far from the truth."""
    q, k, v = given = heads("large", 1, 130, 512, torch.bfloat16)
    weights = torch.softmax((q @ k.mT).float() * 512**-0.5, dim=-1)
    rounded = relative_l2(weights.bfloat16() @ v, truth(*given))
    assert rounded > 2 * relative_l2(kernel.attend(*given), truth(*given))


def test_opcheck():
    q, k, _ = heads("random", 2, 9, 16, torch.bfloat16)
    utilities = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.flux.product.default, (q, k.mT), test_utils=utilities)


def test_the_step_is_asked_for_and_needs_an_nvidia_gpu():
    assert make_args("--device", "cpu").plan["vae_attention"].state == "off"
    verdict = make_args("--device", "cpu", "--vae_attention").plan["vae_attention"]
    assert verdict.state == "unavailable" and "found a CPU" in verdict.reason
    for capability, hip, state in (
        ((9, 0), None, "on"),
        ((7, 5), None, "unavailable"),
        ((9, 4), "6.4", "unavailable"),
    ):
        machine = Machine("cuda", "", capability, hip)
        args = SimpleNamespace(vae_attention=True, machine=machine)
        assert vae_attention.check(args).state == state


@pytest.mark.parametrize("size", [(6, 10), (5, 7)])
@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_a_decoder_keeps_its_picture(fused, size):
    latents = torch.randn(2, 16, *size, generator=torch.Generator().manual_seed(1))
    model = vae(torch.float32)
    expected = model.decode(latents)[0]
    pipe = SimpleNamespace(vae=model, transformer=None)
    if fused:
        fused_projections.apply(pipe, None)
    encoder = model.encoder.mid_block.attentions[0].processor
    with mock.patch.object(kernel, "ROWS", 16):
        vae_attention.apply(pipe, None)
        assert relative_l2(model.decode(latents)[0], expected) < 1e-5
    assert model.encoder.mid_block.attentions[0].processor is encoder


@torch.no_grad()
def test_the_bundled_decoder_is_as_near_to_fp32_as_before():
    """With the neighbouring steps; measured 0.99 to 1.05 times eager's error."""
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    exact = load_pipeline(make_args("--device", "cpu", "--disable_bf16")).vae.decode(latents)[0]
    pipeline = load_pipeline(make_args("--device", "cpu"))
    before = pipeline.vae.decode(latents.bfloat16())[0]
    for step in (fused_projections, vae_attention, channels_last, group_norm):
        step.apply(pipeline, None)
    after = pipeline.vae.decode(latents.bfloat16())[0]
    assert relative_l2(after, exact) <= 1.25 * relative_l2(before, exact)


def test_what_it_does_not_know_is_refused():
    model = vae()
    model.decoder.mid_block.attentions[0].heads = 2
    with pytest.raises(UserError, match="--vae_attention: found 2 heads"):
        vae_attention.apply(SimpleNamespace(vae=model), None)
    model = vae()
    vae_attention.apply(SimpleNamespace(vae=model), None)
    x = torch.zeros(1, 64, 2, 2, dtype=torch.bfloat16)
    for more in ("encoder_hidden_states", "attention_mask", "temb"):
        with pytest.raises(ValueError, match="vae_attention: got more than the picture"):
            model.decoder.mid_block.attentions[0](x, **{more: x})


@torch.no_grad()
def test_it_compiles_and_exports_whole():
    model = vae(torch.float32)
    vae_attention.apply(SimpleNamespace(vae=model), None)
    decoder = model.decoder
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decoder, fullgraph=True, backend=counter)
    with mock.patch.object(kernel, "ROWS", 64):
        for size in ((6, 10), (5, 7), (6, 8), (7, 9)):  # up to 64 tokens: one chunk
            latents = torch.randn(2, 16, *size)
            assert relative_l2(compiled(latents), decoder(latents)) < 1e-6
        assert counter.frame_count == 2  # one static, then one dynamic
        latents = torch.randn(1, 16, 12, 11)  # three chunks
        component = aoti.Component("decoder", copy.deepcopy(decoder))
        component.inputs = component.bind((latents,), {})[0]
        program = aoti.export(component)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("flux.product.default") == 6
    assert relative_l2(program.module()(**component.inputs), decoder(latents)) < 1e-6


@pytest.mark.slow
def test_inductor_makes_one_kernel_of_all_that_stands_between_the_products():
    """For an H200 and 16384 tokens: the scores are read twice, the weights written once."""
    code = _generated()
    call = code[code.index("def call(") : code.index("runner = Runner")]
    assert call.count("torch.ops.flux.product.default(") == 8  # four chunks
    launched = re.findall(r"triton_(\w+)\.run\(", call)
    assert sorted(launched) == ["poi_fused_1"] * 4 + ["red_fused_0"] * 4
    body = code[code.index("def triton_red_fused_0(") : code.index("def triton_poi_fused_1(")]
    assert body.count("tl.load(in_ptr0") == 2 and body.count("tl.store(") == 2


def _generated() -> str:
    import subprocess
    import sys
    from pathlib import Path

    script = (
        "import torch\n"
        "from tests.fused_kernel_codegen import generate, pretend_h200\n"
        "from utils.kernels.vae_attention import attend\n"
        "pretend_h200()\n"
        "print(generate(attend, [((1, 16384, 512), torch.bfloat16)] * 3, on_cpu=False))\n"
    )
    root = Path(__file__).parent.parent
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout

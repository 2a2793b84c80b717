"""Every attention kernel that this machine has, on the GPU, against plain fp64 attention."""

import pytest
import torch

from tests.test_attention import (
    BF16_TOLERANCE,
    FP8_TOLERANCE,
    HEAD_TOLERANCE,
    SHAPES,
    head_errors,
    make,
    run_fp8,
    truth,
)
from tests.test_int8_attention import INT8_TOLERANCE
from utils import aoti
from utils.cudagraph import CUDAGraphWrapper
from utils.hardware import detect
from utils.kernels import flash_attention as fa
from utils.steps import fa3

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(backend: str, fp8: bool = False) -> None:
    """Skip, with the reason, a backend that this machine or installation has not."""
    lacking = fa3._expected(detect("cuda"), backend, False) or fa3.probe(backend, fp8)[1]
    if lacking:
        pytest.skip(f"{backend}: needs {lacking}")


def tolerance(backend: str) -> float:
    return INT8_TOLERANCE if backend == "int8" else 2 * BF16_TOLERANCE  # P is rounded to bf16


def qkv(shape, kind="random"):
    return [make(k, shape, i, device="cuda") for i, k in enumerate(("random", "random", kind))]


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1025, 24, 128)])
@pytest.mark.parametrize("backend", fa3.BACKENDS)
class TestBackendsOnGpu:
    def test_bf16_against_truth(self, backend, shape):
        on_gpu(backend)
        q, k, v = qkv(shape, "outliers")
        out = fa.flash_attn_func(q, k, v, backend=backend)
        assert out.is_contiguous()
        assert max(head_errors(out, truth(q, k, v))) < tolerance(backend)

    def test_strided_inputs(self, backend, shape):
        on_gpu(backend)
        batch, tokens, heads, head_dim = shape
        fused = make("random", (batch, tokens, 3 * heads * head_dim), device="cuda")
        q, k, v = (x.unflatten(-1, (heads, head_dim)) for x in fused.chunk(3, dim=-1))
        out = fa.flash_attn_func(q, k, v, backend=backend)
        assert max(head_errors(out, truth(q, k, v))) < tolerance(backend)

    @pytest.mark.parametrize("fp8", [False, True])
    def test_replay_of_a_cuda_graph(self, backend, shape, fp8):
        if fp8 and backend != "fa3":
            pytest.skip(f"{backend} takes no float8")
        on_gpu(backend, fp8)
        run = run_fp8 if fp8 else lambda *x: fa.flash_attn_func(*x[:3], backend=x[3])
        q, k, v = qkv(shape)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # first call: lazy initialisation must not be captured
            run(q, k, v, backend)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(q, k, v, backend)
        for x, other in zip((q, k, v), qkv(shape, "outliers"), strict=True):
            x.copy_(other.flip(0, 1))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, run(q, k, v, backend))


class Attention(torch.nn.Module):
    def __init__(self, backend: str):
        super().__init__()
        self.backend = backend

    def forward(self, q, k, v):
        return 2 * fa.flash_attn_func(q, k, v * 2, backend=self.backend)


@pytest.mark.parametrize("backend", fa3.BACKENDS)
@pytest.mark.parametrize("mode", ["compile", "export_aoti"])
def test_inside_of_compiled_code_and_a_cuda_graph(backend, mode, tmp_path):
    """What compiles at its first call (FA4) does so in the wrapper's warm-up, for every shape."""
    on_gpu(backend)
    module = Attention(backend)
    shapes = [(2, 1025, 24, 128)]
    if mode == "compile":  # a package takes the C++ compiler's ten seconds for every shape
        shapes.insert(0, (1, 77, 3, 128))
    for shape in shapes:
        q, k, v = qkv(shape)
        torch._dynamo.reset()
        if mode == "compile":
            run = torch.compile(module, fullgraph=True)
        else:
            aoti.name_toolkit()
            program = torch.export.export(module, (q, k, v))
            path = str(tmp_path / "attention.pt2")
            torch._inductor.aoti_compile_and_package(program, package_path=path)
            run = torch._inductor.aoti_load_package(path, run_single_threaded=True)
        run = CUDAGraphWrapper(run, "attention")
        for kind in ("random", "outliers"):  # recorded, then replayed
            q, k, v = qkv(shape, kind)
            assert max(head_errors(run(q, k, v) / 4, truth(q, k, v))) < tolerance(backend)
        assert run.num_graphs == 1


@pytest.mark.parametrize("shape", [*SHAPES, (2, 1025, 24, 128)])
@pytest.mark.parametrize("kind", ["random", "constant", "outliers", "tiny", "large"])
class TestFp8OnGpu:
    def test_fa3_against_truth(self, kind, shape):
        on_gpu("fa3", fp8=True)
        q, k, v = qkv(shape, kind)
        # P is rounded to float8 too, which the CPU kernel does not do
        errors = head_errors(run_fp8(q, k, v, "fa3"), truth(q, k, v))
        assert max(errors) < 1.5 * FP8_TOLERANCE

    def test_compiled_quantiser_equals_eager(self, kind, shape):
        x = make(kind, shape, device="cuda")
        torch._dynamo.reset()  # each shape is a graph of its own: stay below the recompile limit
        quantised, descale = torch.compile(fa.quantize_heads, fullgraph=True)(x)
        eager, eager_descale = fa.quantize_heads(x)
        torch.testing.assert_close(descale, eager_descale)
        assert max(head_errors(fa.dequantize_heads(quantised, descale), x)) < HEAD_TOLERANCE
        # Inductor multiplies by 1 / 448: a scale that differs in its last bit moves bf16's many
        # ties, up to 1.6 % of the values here
        assert (quantised.float() != eager.float()).float().mean() < 0.05

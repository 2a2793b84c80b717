"""The fused kernels on a CUDA device: against fp64 and their twins, in graphs, in transformers."""

import pytest
import torch

from tests import fused_kernel_cases as cases
from tests.flux_pieces import inputs, relative_error, transformer
from tests.test_fused_kernels import ready
from utils.hardware import detect
from utils.kernels import modulate, norm_rope
from utils.steps import fused_kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LARGE_ROWS, LARGE_HEADS = (2, 1025, 3072), (2, 77, 1025, 24)
# The GPU's own division, exp and rsqrt: one bit of a scale moves up to 0.7 % of V's values, one of
# the mean 1 to 2 % of a constant row's, whose variance is 0
TIES = 0.05


@pytest.fixture(autouse=True)
def able():
    """Skip, with the reason, on a GPU that the kernels are not for."""
    if lacking := fused_kernels.lacking(detect("cuda")):
        pytest.skip(lacking)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("shape", [*cases.ROWS, LARGE_ROWS])
def test_rows_against_truth_and_twin(kind, shape):
    results = cases.of_rows(kind, shape, modulate.norm_modulate, "cuda")
    for found in results + cases.of_gelu(kind, shape, modulate.gelu_quantize, "cuda"):
        assert found["error"] < cases.tolerance(found), found
        assert found["differs"] < TIES, found


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("case", [*cases.HEADS, LARGE_HEADS])
def test_heads_against_truth_and_twin(kind, case):
    for found in cases.of_heads(kind, case, norm_rope.norm_rope, "cuda"):
        assert found["error"] < cases.tolerance(found), found
        assert found["differs"] < TIES, found


@pytest.mark.parametrize("width", [12288, 1000])
def test_gelu_at_full_width(width):
    mlp = cases.rows("outliers", (1, 513, width), device="cuda")
    attention = cases.rows("random", (1, 513, 3072), 1, "cuda")
    values, scale = modulate.gelu_quantize(mlp, attention)
    error = cases.row_error(values.float() * scale, cases.true_gelu(mlp, attention))
    assert error < cases.FP8_TOLERANCE


def test_replay_of_a_cuda_graph():
    x, y = (cases.rows("random", LARGE_ROWS, seed, "cuda") for seed in (0, 1))
    gate, shift, scale = cases.vectors(2, 3072, "cuda")
    rope = cases.heads("random", LARGE_HEADS, "cuda")

    def run():
        hidden, out, row_scale = modulate.norm_modulate(x, shift, scale, y, gate, True)
        return [hidden, out, row_scale, *modulate.gelu_quantize(x, y), *norm_rope.norm_rope(*rope)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # first call: compilation must not be captured
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(cases.rows("outliers", LARGE_ROWS, 2, "cuda"))
    graph.replay()
    torch.cuda.synchronize()
    for found, expected in zip(captured, run(), strict=True):
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def on_cuda(call):
    return {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in call.items()}


@pytest.mark.parametrize("backend", [None, "inductor"])
@pytest.mark.parametrize("float8", [False, True])
def test_whole_transformer(float8, backend):
    """The blocks with torch's attention: float8 in the Linears only, as no package is needed."""
    call = on_cuda(inputs(2, text=77, height=9, width=15))
    expected = transformer().cuda()(**call)[0]
    model = ready(float8=float8, float8_attention=False, device="cuda")
    torch._dynamo.reset()
    if backend:
        model = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert relative_error(model(**call)[0], expected) < (0.04 if float8 else 0.02)

"""The transformer's attention, by every backend of utils/kernels/flash_attention.py.

The error is that against fp64 on three heads and 64 queries, of the inputs before any cast.
"""

from functools import partial

import torch

from utils.kernel_bench.trial import Case, Setting, Trial, Unavailable, relative_l2
from utils.kernels import flash_attention as fa
from utils.steps import fa3

QUERIES = 64
# Twice, once and 1.5 times what the CPU's kernels may have in a test
BOUNDS = {"bf16": 0.01, "int8": 0.03, "fp8": 0.1}
FP8 = "-fp8"  # ending of a variant
VARIANTS = ("sdpa", "fa3-fp8", *(name for name in fa.BACKENDS if name != "sdpa"))


def shapes(setting: Setting) -> dict[str, tuple[int, int, int, int]]:
    """Name (B, S, H, D) of Dev, Schnell and Kontext, 1024x1024."""
    if not setting.is_full:
        return {"48": (1, 48, 2, 64)}
    return {str(tokens): (1, tokens, 24, 128) for tokens in (4608, 4352, 8704)}


def draw(setting: Setting, shape: tuple, fp8: bool, seed: int) -> tuple:
    """Draw q, k and v, cast with a scale per head if asked to."""
    tensors = [setting.randn(*shape, seed=3 * seed + i) for i in range(3)]
    if not fp8:
        return tuple(tensors)
    cast = [fa.quantize_heads(x) for x in tensors]
    return *(x for x, _ in cast), *(descale for _, descale in cast)


def check(setting: Setting, shape: tuple, out: torch.Tensor, inputs: tuple) -> dict:
    """Compare a part of the output with attention in fp64."""
    heads = sorted({0, shape[2] // 2, shape[2] - 1})
    rows = torch.arange(0, shape[1], max(1, shape[1] // QUERIES), device=out.device)
    q, k, v = (x[0][:, heads].transpose(0, 1).double() for x in draw(setting, shape, False, 0))
    weights = torch.softmax(q[:, rows] @ k.transpose(1, 2) * shape[3] ** -0.5, dim=-1)
    return {"error": relative_l2(out[0][rows][:, heads].transpose(0, 1), weights @ v)}


def lacking(setting: Setting, backend: str, fp8: bool) -> str:
    """Say what a backend would need that is not here; "" if it can run."""
    if backend == "sdpa" or (backend == "sdpa_math" and setting.machine.device != "cpu"):
        return ""
    expected = fa3._expected(setting.machine, backend, False) or fa3.probe(backend, fp8)[1]
    return expected and f"{backend}: needs {expected}"


def make(setting: Setting, shape: tuple, variant: str) -> Trial:
    """Prepare one backend at one shape."""
    fp8 = variant.endswith(FP8)
    backend = variant.removesuffix(FP8)
    dtype = "fp8" if fp8 else "int8" if backend == "int8" else "bf16"
    if reason := lacking(setting, backend, fp8):
        raise Unavailable(reason)
    batch, tokens, heads, width = shape
    return Trial(
        run=partial(fa.flash_attn_func, backend=backend),
        draw=partial(draw, setting, shape, fp8),
        check=partial(check, setting, shape),
        bound=BOUNDS[dtype],
        flop=4 * batch * heads * tokens * tokens * width,
        dtype=dtype,
    )


def cases(setting: Setting) -> list[Case]:
    """List every backend at every shape."""
    return [
        Case(f"attention/{name}/{variant}", partial(make, setting, shape, variant))
        for name, shape in shapes(setting).items()
        for variant in VARIANTS
    ]

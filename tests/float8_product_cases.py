"""Inputs and fp64 truth for the float8 products, and their run under Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.float8_product_cases      prints one JSON line per case

A process of its own, and torch's rounding in the interpreter, as in tests/fused_kernel_cases.py.
"""

import json

import torch

from tests.fused_kernel_cases import KINDS, exact_casts, in_two, row_error, rows, true_gelu
from utils.kernels import float8_gelu, float8_product
from utils.kernels.flash_attention import E4M3_MAX
from utils.kernels.modulate import quantize_rows

# B, S, N, K: FLUX's products by a 48th (QKV, MLP up, both together, out), and odd ones. Between
# them each tile is chosen; the last has FLUX's longest K
SHAPES = [(1, 7, 192, 64), (2, 65, 256, 64), (1, 130, 448, 64), (3, 1, 64, 320), (1, 100, 384, 64)]
LONGEST = (1, 5, 72, 15360)
GELU_TOLERANCE = 2**-5  # one rounding to e4m3 (measured up to 0.0293)
TOLERANCE = 2**-8  # worst row: one rounding to bf16 (measured up to 0.0021)
PROGRAMS = 3


def case(kind: str, shape, device: str = "cpu") -> tuple:
    """Make float8_product's arguments, quantised as the blocks quantise."""
    batch, tokens, columns, inner = shape
    x = rows(kind, (batch, tokens, inner), 0, device)
    weight = rows("random", (1, columns, inner), 1, device)[0] / inner**0.5
    bias, gate = (rows("random", (1, batch, columns), seed, device)[0] for seed in (2, 3))
    residual = rows("random", (batch, tokens, columns), 4, device)
    # A modulation's gate is a slice of one row per image
    gate = torch.cat([gate, gate], dim=1)[:, columns:]
    return (*quantize_rows(x), *quantize_rows(weight), bias[0], residual, gate)


def truth(
    x, x_scale, weight, weight_scale, bias=None, residual=None, gate=None, front=None
) -> torch.Tensor:
    """The product of the quantised values, in fp64."""
    x_scale = x_scale if x_scale.dim() == 3 else x_scale[0]
    out = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
    out = out if bias is None else out + bias.double()
    residual = residual if front is None else torch.cat([front, residual], dim=1)
    return out if residual is None else residual.double() + gate.double()[:, None] * out


def of_case(kind: str, shape, run, device: str = "cpu") -> list[dict]:
    """Compare the product alone, with a bias, and as blocks end, with truth and twin.

    A single block ends with a residual in two parts. Its input may have a static scale.
    """
    *others, residual, gate = case(kind, shape, device)
    image, text = in_two(residual)
    scale = float8_gelu.static_scale(others[1].max().item(), device)
    static = [others[0], scale, *others[2:], residual, gate]
    found = []
    for inputs in (
        *(others[:4], others, [*others, residual, gate], static),
        [*others, image, gate, text],
    ):
        out = run(*inputs)
        twin = float8_product.plain_float8_product(*inputs)
        error = row_error(out, truth(*inputs))
        differs = (out.float() != twin.float()).double().mean().item()
        found.append({"kind": kind, "inputs": len(inputs), "error": error, "differs": differs})
    return found


def gelu_case(kind: str, shape, device: str = "cpu", within: float = 1.0) -> tuple:
    """Make float8_gelu's arguments, with attention (B, S, 72) in front, a slice of wider rows.

    `within`: what part of the largest output still fits into the static scale.
    """
    given = case(kind, shape, device)[:5]
    attention = rows("random", (*shape[:2], 100), 5, device)[..., :72]
    most = true_gelu(truth(*given), attention).abs().amax().item()
    scale = float8_gelu.static_scale(within * most / E4M3_MAX, device)
    return *given, scale, attention


def of_gelu(kind: str, shape, run, device: str = "cpu") -> list[dict]:
    """Compare gelu(product) in float8 with truth and twin, alone and behind attention.

    The error is that of all of it: a static scale has few steps for a row of small numbers.
    """
    *given, attention = gelu_case(kind, shape, device)
    found = []
    for behind in (None, attention):
        out = run(*given, behind)
        twin = float8_gelu.plain_float8_gelu(*given, behind)
        true = true_gelu(truth(*given[:5]), behind)
        off = out.double() * given[5][0].double() - true
        parts = [(off, true)]
        if behind is not None and kind in ("random", "constant"):  # no size of its own hides it
            parts.append((off[..., : behind.shape[2]], behind.double()))
        found.append(
            {
                "kind": kind,
                "behind": behind is not None,
                "error": max((wrong.norm() / right.norm()).item() for wrong, right in parts),
                "differs": (out.float() != twin.float()).double().mean().item(),
            }
        )
    return found


def hardware_tanh() -> None:
    """Give the interpreter the GPU's tanh instruction, with an error as large as its own may be."""
    from types import SimpleNamespace

    from triton.runtime import interpreter

    def inline(self, asm, constraints, values, types, is_pure, pack):
        assert asm == "tanh.approx.f32 $0, $1;"
        (x,) = (torch.from_numpy(value.data) for value in values)
        signs = torch.arange(x.numel()).reshape(x.shape) % 2 * 2 - 1
        y = (x.double().tanh() * (1 + signs * 2**-11)).float().numpy()
        handle = interpreter.TensorHandle(y, values[0].dtype)
        return SimpleNamespace(get_result=lambda index: handle)

    interpreter.InterpreterBuilder.create_inline_asm = inline


def _launch(*given) -> torch.Tensor:
    return float8_product.launch_float8_product(*given, programs=PROGRAMS)


def _launch_gelu(*given) -> torch.Tensor:
    return float8_gelu.launch_float8_gelu(*given, programs=PROGRAMS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    exact_casts()
    hardware_tanh()
    float8_product.wrap_triton = float8_gelu.wrap_triton = lambda kernel: kernel
    cases = [(kind, SHAPES[0]) for kind in KINDS]
    cases += [("outliers", shape) for shape in (*SHAPES[1:], LONGEST)] + [("random", SHAPES[1])]
    for kind, shape in cases:
        for found in of_case(kind, shape, _launch):
            print(json.dumps({"shape": shape, **found}), flush=True)
        for found in of_gelu(kind, shape, _launch_gelu):
            print(json.dumps({"shape": shape, "gelu": True, **found}), flush=True)

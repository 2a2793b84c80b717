"""Inputs and fp64 truth for the float8 product, and its run under Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.float8_product_cases      prints one JSON line per case

A process of its own, and torch's rounding in the interpreter, as in tests/fused_kernel_cases.py.
"""

import json

import torch

from tests.fused_kernel_cases import KINDS, exact_casts, row_error, rows
from utils.kernels import float8_product
from utils.kernels.modulate import quantize_rows

# B, S, N, K: FLUX's products by a 48th (QKV, MLP up, both together, out), and odd ones. Between
# them each tile is chosen; the last has FLUX's longest K
SHAPES = [(1, 7, 192, 64), (2, 65, 256, 64), (1, 130, 448, 64), (3, 1, 64, 320), (1, 100, 384, 64)]
LONGEST = (1, 5, 72, 15360)
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


def truth(x, x_scale, weight, weight_scale, bias=None, residual=None, gate=None) -> torch.Tensor:
    """The product of the quantised values, in fp64."""
    out = (x.double() * x_scale.double()) @ (weight.double() * weight_scale.double()).t()
    out = out if bias is None else out + bias.double()
    return out if residual is None else residual.double() + gate.double()[:, None] * out


def of_case(kind: str, shape, run, device: str = "cpu") -> list[dict]:
    """Compare the product alone, with a bias, and as a block ends, with truth and twin."""
    given, found = case(kind, shape, device), []
    for count in (4, 5, 7):
        out = run(*given[:count])
        twin = float8_product.plain_float8_product(*given[:count])
        error = row_error(out, truth(*given[:count]))
        differs = (out.float() != twin.float()).double().mean().item()
        found.append({"kind": kind, "inputs": count, "error": error, "differs": differs})
    return found


def _launch(*given) -> torch.Tensor:
    return float8_product.launch_float8_product(*given, programs=PROGRAMS)


if __name__ == "__main__":
    torch.set_num_threads(1)
    exact_casts()
    float8_product.wrap_triton = lambda kernel: kernel
    cases = [(kind, SHAPES[0]) for kind in KINDS]
    cases += [("outliers", shape) for shape in (*SHAPES[1:], LONGEST)]
    for kind, shape in cases:
        for found in of_case(kind, shape, _launch):
            print(json.dumps({"shape": shape, **found}), flush=True)

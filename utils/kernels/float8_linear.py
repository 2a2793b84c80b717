"""A Linear whose input is float8 already: torchao's own product, or ours."""

import torch

from utils.kernels.float8_product import float8_product
from utils.kernels.linear import LinearThenBias
from utils.kernels.modulate import quantize_rows


class TritonFloat8Linear(torch.nn.Linear):
    """Do what a Linear does whose weight torchao made float8, by `float8_product`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x (B, S, in_features) -> (B, S, out_features) bf16"""
        return linear_float8(*quantize_rows(x), self)


def linear_float8(
    x: torch.Tensor,
    scale: torch.Tensor,
    linear: torch.nn.Linear,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    front: torch.Tensor | None = None,
) -> torch.Tensor:
    """Apply a Linear whose weight torchao made float8 to an input that is float8 already.

    The product is torchao's own, without its quantisation of the input, or `float8_product`. Given
    both residual and gate, residual + gate * product is returned; the residual may be in two parts,
    [front, residual] along the tokens.

    Shapes: x (B, S, K) float8_e4m3fn, scale (B, S, 1), for `float8_product` also (2,), fp32,
        residual (B, S - T, N), front (B, T, N), gate (B, N) -> (B, S, N) bf16
    """
    weight = linear.weight  # [N, K] float8 with a scale per row, [N, 1]
    if isinstance(linear, TritonFloat8Linear):
        end = residual, gate, front
        return float8_product(x, scale, weight.qdata, weight.scale, linear.bias, *end)
    bias_after = isinstance(linear, LinearThenBias)
    out = torch._scaled_mm(
        x.flatten(0, 1),
        weight.qdata.t(),
        scale_a=scale.flatten(0, 1),
        scale_b=weight.scale.t(),
        bias=None if bias_after else linear.bias,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    out = (out + linear.bias if bias_after else out).unflatten(0, x.shape[:2])
    if residual is None:
        return out
    residual = residual if front is None else torch.cat([front, residual], dim=1)
    return residual + gate[:, None] * out

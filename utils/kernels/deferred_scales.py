"""A float8 Linear whose scales and bias are pointwise work behind the product."""

import torch

from utils.kernels.modulate import quantize_rows


class LinearThenScales(torch.nn.Linear):
    """Multiply in float8 without scales; both scales and the bias follow, in fp32.

    The weight is torchao's, with one scale per row; `one` is the scale that the product asks for.
    The unscaled sum is at most 448 * 448 * in_features, far inside of bf16, whose rounding is as
    large relative to it as to the scaled one: an output in fp32, twice the bytes, would gain
    nothing. The plain twin is torchao's own product.
    """

    one: torch.Tensor  # (1, 1) fp32

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes: x (..., in_features) bf16 -> (..., out_features) bf16."""
        rows, scale = quantize_rows(x)
        out = torch._scaled_mm(
            rows.flatten(0, -2),
            self.weight.qdata.t(),
            scale_a=self.one,
            scale_b=self.one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
        out = out.unflatten(0, x.shape[:-1]).float() * scale * self.weight.scale.t()
        return (out if self.bias is None else out + self.bias).to(x.dtype)

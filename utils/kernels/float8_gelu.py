"""An MLP's first product that writes float8: GELU and the cast in its epilogue.

A row's scale is known when the whole row is, so elsewhere the product is stored in bf16 and read
again by `flux::gelu_quantize`. With a static scale, one for all rows and calls (step
static_scales), each tile can be cast where it is computed: `flux::float8_gelu` is float8_product's
kernel with that epilogue. A single block's last Linear reads [attention, gelu(MLP)], so the op
takes the attention's output too and casts it into the same rows, by a kernel of its own.

A static scale is a vector of two, the scale and its inverse: Inductor folds vectors of one element
into its code, and blocks that share a package would share a scale.

Triton ops with a CPU twin, as in utils/kernels/modulate.py. Backward: none. Inference only.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from utils.kernels.flash_attention import E4M3, E4M3_MAX
from utils.kernels.float8_product import launch_into
from utils.kernels.modulate import warps


def plain_float8_gelu(x, x_scale, weight, weight_scale, bias, out_scale, attention=None):
    """Do what `float8_gelu` does, in torch."""
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.t() + bias.float()
    out = F.gelu(out, approximate="tanh")
    out = out if attention is None else torch.cat([attention.float(), out], dim=-1)
    return (out * out_scale[1]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


@triton.jit
def cast_rows_kernel(
    x_ptr,
    scale_ptr,
    out_ptr,
    tokens,
    x_batch,  # strides, in elements
    x_token,
    D: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of the output
    BLOCK: tl.constexpr,
):
    """Write one row (program_id 0) of x into the first columns of the output's."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    x = tl.load(x_ptr + row // tokens * x_batch + row % tokens * x_token + columns, inside, 0.0)
    x = x.to(tl.float32) * tl.load(scale_ptr + 1)  # the cast saturates, NaN stays NaN
    tl.store(out_ptr + row * WIDTH + columns, x.to(out_ptr.dtype.element_ty), inside)


def launch_float8_gelu(
    x, x_scale, weight, weight_scale, bias, out_scale, attention=None, programs=None, tile=None
) -> torch.Tensor:
    """Do what `float8_gelu` does, by its kernels."""
    batch, tokens = x.shape[:2]
    first = 0 if attention is None else int(attention.shape[2])
    out = x.new_empty((batch, tokens, first + int(weight.shape[0])))
    if first:
        attention = attention if attention.stride(-1) == 1 else attention.contiguous()
        wrap_triton(cast_rows_kernel)[(batch * tokens,)](
            attention,
            out_scale,
            out,
            tokens,
            *attention.stride()[:2],
            D=first,
            WIDTH=int(out.shape[2]),
            BLOCK=triton.next_power_of_2(first),
            num_warps=warps(first),
        )
    given = x, x_scale, weight, weight_scale, bias, None
    return launch_into(out, *given, out_scale, first, programs, tile)


@triton_op("flux::float8_gelu", mutates_args=())
def float8_gelu(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor,
    out_scale: torch.Tensor,
    attention: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute [attention, gelu(x_scale * weight_scale * (x @ weight') + bias)] / out_scale[0].

    What lies beyond e4m3's 448 saturates.

    Shapes: x (B, S, K), weight (N, K), both float8_e4m3fn; x_scale (B, S, 1), weight_scale (N, 1),
        out_scale (2,), the scale and its inverse, fp32; bias (N,), attention (B, S, C) bf16
        -> (B, S, C + N) float8_e4m3fn
    Raises: ValueError on shapes that do not belong together, and K no multiple of 16.
    """
    (batch, tokens, inner), columns = x.shape, weight.shape[0]
    ok = weight.shape == (columns, inner) and weight.is_contiguous() and inner % 16 == 0
    ok = ok and tuple(x_scale.shape) == (batch, tokens, 1) and weight_scale.shape == (columns, 1)
    ok = ok and bias.shape == (columns,) and out_scale.shape == (2,)
    if not ok or (attention is not None and attention.shape[:2] != x.shape[:2]):
        given = (x, x_scale, weight, weight_scale, bias, out_scale, attention)
        found = [None if tensor is None else tuple(tensor.shape) for tensor in given]
        raise ValueError(f"float8_gelu: shapes that do not belong together: {found}")
    run = launch_float8_gelu if x.is_cuda else plain_float8_gelu
    return run(x, x_scale, weight, weight_scale, bias, out_scale, attention)


def static_scale(scale: float, device) -> torch.Tensor:
    """Give a scale as the ops take it. Shapes: (2,) fp32, the scale and its inverse"""
    return torch.tensor([scale, 1 / scale], dtype=torch.float32, device=device)

"""LayerNorm + adaLN modulation, and GELU, each in one pass with the float8 cast that follows.

A Linear in float8 wants its input as e4m3 with one scale per row, and the scale needs the whole
row: whoever has the row in registers can write the float8 values directly. `flux::norm_modulate`
does so for the inputs of Q, K, V and both MLPs, with gate + residual before where there is one, and
for a single block's text and image without their concatenation; `flux::gelu_quantize` for the
second Linear of an MLP and for a single block's [attention, MLP], likewise. Several Linears then
share one quantised input (`linear_float8` in utils/kernels/float8_linear.py).

Each is a triton_op, not an opaque custom op: compile and AOTI see the kernels and put them into
their own code, so a package calls no Python. On a CPU the op is its plain twin. Arithmetic is fp32
with one rounding at the end, where eager bf16 rounds after each operation.
Backward: none. Inference only.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from utils.kernels.flash_attention import E4M3, E4M3_MAX, TINY

# The same numbers as constants of kernels
_MAX = tl.constexpr(E4M3_MAX)
_TINY = tl.constexpr(TINY)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale every row by its own largest magnitude and cast to float8 e4m3.

    As torchao does, except that a row of zeros stays zeros instead of becoming NaN.

    Shapes: x (..., D) any float dtype -> (..., D) float8_e4m3fn, scale (..., 1) fp32,
        with x = x_fp8 * scale.
    """
    x = x.float()
    scale = (x.abs().amax(dim=-1, keepdim=True) / E4M3_MAX).clamp(min=TINY)
    return (x * scale.reciprocal()).to(E4M3), scale


def plain_norm_modulate(
    x, shift, scale, y=None, gate=None, float8=False, front=None
) -> list[torch.Tensor]:
    """Do what `norm_modulate` does, in torch."""
    outputs = []
    x = x if front is None else torch.cat([front, x], dim=1)
    if y is not None:
        x = (x.float() + gate[:, None].float() * y.float()).to(x.dtype)
        outputs.append(x)
    out = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6)
    out = out * (1 + scale[:, None].float()) + shift[:, None].float()
    return [*outputs, *quantize_rows(out)] if float8 else [*outputs, out.to(x.dtype)]


def plain_gelu_quantize(mlp, attention=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `gelu_quantize` does, in torch."""
    out = F.gelu(mlp.float(), approximate="tanh")
    return quantize_rows(out if attention is None else torch.cat([attention.float(), out], dim=-1))


@triton.jit
def _quantize(out, amax):
    """Give the values to be cast and the scale; the cast saturates, NaN stays NaN."""
    scale = tl.maximum(amax / _MAX, _TINY)
    return out * (1.0 / scale), scale


@triton.jit
def norm_modulate_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    hidden_ptr,
    out_ptr,
    row_scale_ptr,
    tokens,
    x_batch,  # strides, in elements
    x_token,
    y_batch,
    y_token,
    gate_batch,
    shift_batch,
    scale_batch,
    front_tokens,  # of y, which stand in front of x
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    RESIDUAL: tl.constexpr,
    FLOAT8: tl.constexpr,
):
    """Normalise one row (program_id 0) of x, of x + gate * y, or of [y, x]."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < D
    at = x_ptr + batch * x_batch + (token - front_tokens) * x_token
    if token < front_tokens:
        at = y_ptr + batch * y_batch + token * y_token
    x = tl.load(at + columns, inside, 0.0).to(tl.float32)
    if RESIDUAL:
        y = tl.load(y_ptr + batch * y_batch + token * y_token + columns, inside, 0.0)
        gate = tl.load(gate_ptr + batch * gate_batch + columns, inside, 0.0)
        x += gate.to(tl.float32) * y.to(tl.float32)
        hidden = x.to(hidden_ptr.dtype.element_ty)
        tl.store(hidden_ptr + row * D + columns, hidden, inside)
        x = hidden.to(tl.float32)  # what is normalised is what the next residual reads
    mean = tl.sum(x, 0) / D
    x = tl.where(inside, x - mean, 0.0)
    inverse = tl.rsqrt(tl.sum(x * x, 0) / D + 1e-6)
    scale = tl.load(scale_ptr + batch * scale_batch + columns, inside, 0.0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_batch + columns, inside, 0.0).to(tl.float32)
    out = x * inverse * (1.0 + scale) + shift  # 0 outside
    if FLOAT8:
        out, row_scale = _quantize(out, tl.max(tl.abs(out), 0))
        tl.store(row_scale_ptr + row, row_scale)
    tl.store(out_ptr + row * D + columns, out.to(out_ptr.dtype.element_ty), inside)


@triton.jit
def gelu_quantize_kernel(
    mlp_ptr,
    attention_ptr,
    out_ptr,
    row_scale_ptr,
    tokens,
    mlp_batch,  # strides, in elements
    mlp_token,
    attention_batch,
    attention_token,
    D_MLP: tl.constexpr,
    D_ATTENTION: tl.constexpr,  # 0: there is none
    BLOCK_MLP: tl.constexpr,
    BLOCK_ATTENTION: tl.constexpr,
):
    """Write one row (program_id 0) of [attention, gelu(mlp)] in float8."""
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK_MLP)
    inside = columns < D_MLP
    x = tl.load(mlp_ptr + batch * mlp_batch + token * mlp_token + columns, inside, 0.0)
    x = x.to(tl.float32)
    # tanh(u) = 2 sigmoid(2 u) - 1 turns 0.5 x (1 + tanh(u)) into x sigmoid(2 u)
    x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    amax = tl.max(tl.abs(x), 0)
    out_ptr += row * (D_ATTENTION + D_MLP)
    if D_ATTENTION > 0:
        first = tl.arange(0, BLOCK_ATTENTION)
        within = first < D_ATTENTION
        address = attention_ptr + batch * attention_batch + token * attention_token + first
        attention = tl.load(address, within, 0.0).to(tl.float32)
        attention, row_scale = _quantize(attention, tl.maximum(amax, tl.max(tl.abs(attention), 0)))
        tl.store(out_ptr + first, attention.to(out_ptr.dtype.element_ty), within)
        x *= 1.0 / row_scale
    else:
        x, row_scale = _quantize(x, amax)
    tl.store(out_ptr + D_ATTENTION + columns, x.to(out_ptr.dtype.element_ty), inside)
    tl.store(row_scale_ptr + row, row_scale)


def warps(width: int) -> int:
    """Give a row's number of warps: about 16 values per thread, 4 to 16 warps."""
    return min(16, max(4, triton.next_power_of_2(width) // 512))


def _dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _check_rows(x: torch.Tensor, others: list, what: str) -> None:
    wanted = (x.shape[0], x.shape[2])
    for other in others:
        if tuple(other.shape) != wanted:
            raise ValueError(f"norm_modulate: {what} must be {wanted}, got {tuple(other.shape)}")


def launch_norm_modulate(
    x, shift, scale, y=None, gate=None, float8=False, front=None
) -> list[torch.Tensor]:
    """Do what `norm_modulate` does, by its kernel."""
    x, shift, scale = _dense(x, shift, scale)
    residual, front_tokens = y is not None, 0 if front is None else front.shape[1]
    y, gate = _dense(y, gate) if residual else (x, shift)  # unread without a residual
    (y,) = (y,) if front is None else _dense(front)
    batch, tokens = x.shape[0], front_tokens + x.shape[1]
    width = int(x.shape[2])  # a constant of the kernel, never a symbol
    out = x.new_empty((batch, tokens, width), dtype=E4M3 if float8 else x.dtype)
    outputs, hidden, row_scale = [out], out, out
    if residual:
        hidden = x.new_empty(x.shape)
        outputs = [hidden, out]
    if float8:
        row_scale = x.new_empty((batch, tokens, 1), dtype=torch.float32)
        outputs.append(row_scale)
    wrap_triton(norm_modulate_kernel)[(batch * tokens,)](
        x,
        y,
        gate,
        shift,
        scale,
        hidden,
        out,
        row_scale,
        tokens,
        *x.stride()[:2],
        *y.stride()[:2],
        gate.stride(0),
        shift.stride(0),
        scale.stride(0),
        front_tokens,
        D=width,
        BLOCK=triton.next_power_of_2(width),
        RESIDUAL=residual,
        FLOAT8=float8,
        num_warps=warps(width),
    )
    return outputs


@triton_op("flux::norm_modulate", mutates_args=())
def norm_modulate(
    x: torch.Tensor,
    shift: torch.Tensor,
    scale: torch.Tensor,
    y: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    float8: bool = False,
    front: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Compute LayerNorm(h) * (1 + scale) + shift.

    h is x; given y and gate, x + gate * y; given front, [front, x] along the tokens: Inductor would
    store such a concatenation once for each argument of the kernel that reads it. LayerNorm has no
    weights and eps 1e-6, as all of FLUX's.

    Shapes: x, y (B, S, D) bf16 or fp32; shift, scale, gate (B, D), all with a dense last dimension
        -> [out (B, S, D) of x's dtype], or with float8 [out e4m3, row scale (B, S, 1) fp32];
        with y, h (B, S, D) comes first; with front (B, T, D) there are T + S tokens.
    Raises: ValueError on shapes that do not belong together.
    """
    _check_rows(x, [shift, scale, *([gate] if gate is not None else [])], "shift, scale and gate")
    if (y is None) != (gate is None) or (y is not None and y.shape != x.shape):
        raise ValueError("norm_modulate: y and gate go together, y with the shape of x")
    if front is not None and (y is not None or front.shape[::2] != x.shape[::2]):
        raise ValueError("norm_modulate: front has x's batch and width, and stands without y")
    run = launch_norm_modulate if x.is_cuda else plain_norm_modulate
    return run(x, shift, scale, y, gate, float8, front)


def launch_gelu_quantize(mlp, attention=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what `gelu_quantize` does, by its kernel."""
    (mlp,) = _dense(mlp)
    first = 0 if attention is None else int(attention.shape[2])
    (attention,) = (mlp,) if attention is None else _dense(attention)
    batch, tokens, width = *mlp.shape[:2], int(mlp.shape[2])
    out = mlp.new_empty((batch, tokens, first + width), dtype=E4M3)
    row_scale = mlp.new_empty((batch, tokens, 1), dtype=torch.float32)
    wrap_triton(gelu_quantize_kernel)[(batch * tokens,)](
        mlp,
        attention,
        out,
        row_scale,
        tokens,
        *mlp.stride()[:2],
        *attention.stride()[:2],
        D_MLP=width,
        D_ATTENTION=first,
        BLOCK_MLP=triton.next_power_of_2(width),
        BLOCK_ATTENTION=triton.next_power_of_2(max(first, 1)),
        num_warps=warps(width),
    )
    return out, row_scale


@triton_op("flux::gelu_quantize", mutates_args=())
def gelu_quantize(
    mlp: torch.Tensor, attention: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute GELU (tanh) of an MLP's input, with the attention's output in front, in float8.

    Shapes: mlp (B, S, D), attention (B, S, C) bf16 or fp32, both with a dense last dimension
        -> [attention, gelu(mlp)] (B, S, C + D) float8_e4m3fn, row scale (B, S, 1) fp32
    Raises: ValueError if batch or tokens differ.
    """
    if attention is not None and attention.shape[:2] != mlp.shape[:2]:
        raise ValueError(f"gelu_quantize: got {tuple(mlp.shape)} and {tuple(attention.shape)}")
    run = launch_gelu_quantize if mlp.is_cuda else plain_gelu_quantize
    return run(mlp, attention)

"""RMSNorm of Q and K, RoPE, both streams joined, and the float8 cast, in one pass per token.

`flux::norm_rope` takes the projections of the text and of the image stream as they come (slices of
a fused product) and writes Q, K and V of all tokens, text first, in the layout of the attention op:
no concatenation, no other pass.

With float8 each (batch, head) has one scale, as in quantize_heads, but Q's and K's are known before
the data: RMSNorm bounds a head's values by sqrt(D) times its largest weight, and RoPE keeps the
length of a pair. e4m3 is a floating-point format, so a scale that is some times too large costs
range at the small end and no precision. V has no such bound: its largest magnitudes come out of
the same pass, and a second one (`cast_heads_kernel`) casts it. With `rotate` Q and K are turned on
their way (utils/kernels/rotation.py).

triton_op, CPU twins and rounding as in utils/kernels/modulate.py. Backward: none.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

from utils.kernels.flash_attention import E4M3, E4M3_MAX, TINY
from utils.kernels.rotation import FACTOR, rotate_halves, rotate_heads

_TINY = tl.constexpr(TINY)
_FACTOR = tl.constexpr(FACTOR)


def bound(head_dim: int) -> float:
    """Give the largest descale that a head's values can need, per unit of its largest weight.

    Rounding in fp32 may pass sqrt(D) by some 2^-20; e4m3 rounds up to 464 down to 448.
    """
    return head_dim**0.5 / E4M3_MAX


def plain_norm_rope(img, txt, norms, cos, sin, eps, float8=False, rotate=False) -> list:
    """Do what `norm_rope` does, in torch."""
    streams = [(img, norms[:2])] if not txt else [(txt, norms[2:]), (img, norms[:2])]
    cos, sin = (x[None, :, None, ::2].float() for x in (cos, sin))  # [1, S, 1, D/2]
    outputs, descales = [], []
    for i in range(2):
        weights = [norms[i].float() for _, norms in streams]
        if float8:
            largest = torch.stack(weights).abs().amax()
            descale = (largest * bound(int(cos.shape[-1]) * 2)).clamp(min=TINY)
            weights = [weight / descale for weight in weights]
            descales.append(descale.expand(img[i].shape[0], img[i].shape[2]).clone())
        pairs = zip(streams, weights, strict=True)
        x = torch.cat([_rms_norm(tensors[i], weight, eps) for (tensors, _), weight in pairs], dim=1)
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        x = rotate_heads(x) if rotate else x
        outputs.append(x.to(E4M3 if float8 else img[0].dtype))
    v = torch.cat([tensors[2] for tensors, _ in streams], dim=1)
    if not float8:
        return [*outputs, v] if txt else outputs
    descale = _v_descale(v.float().abs().amax(dim=-1))
    v = (v.float() * descale.reciprocal()[:, None, :, None]).to(E4M3)
    return [*outputs, v, *descales, descale]


def _rms_norm(x, weight, eps):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _v_descale(amax: torch.Tensor) -> torch.Tensor:
    """Give V's descale. Shapes: largest magnitudes (B, S, H) -> (B, H) fp32"""
    return (amax.amax(dim=1) / E4M3_MAX).clamp(min=TINY)


@triton.jit
def _pairs(ptr, D: tl.constexpr):
    """Load a norm's weights as even and odd ones."""
    pair = 2 * tl.arange(0, D // 2)
    return tl.load(ptr + pair).to(tl.float32), tl.load(ptr + pair + 1).to(tl.float32)


@triton.jit
def _descale(even, odd, other_ptr, bound, TEXT: tl.constexpr, D: tl.constexpr):
    """Give the descale that no head of either stream can exceed."""
    largest = tl.maximum(tl.abs(even), tl.abs(odd))
    if TEXT:
        other_even, other_odd = _pairs(other_ptr, D)
        largest = tl.maximum(largest, tl.maximum(tl.abs(other_even), tl.abs(other_odd)))
    return tl.maximum(tl.max(largest, 0) * bound, _TINY)


@triton.jit
def _turn(x, even, odd, cos, sin, eps, HEADS: tl.constexpr, D: tl.constexpr, ROTATE: tl.constexpr):
    """Apply RMSNorm, RoPE and, but for its factor, rotate_heads to (HEADS, D)."""
    x = x.to(tl.float32)
    x = x * tl.rsqrt(tl.sum(x * x, 1) / D + eps)[:, None]
    x_even, x_odd = tl.split(tl.reshape(x, (HEADS, D // 2, 2)))
    x_even, x_odd = x_even * even[None, :], x_odd * odd[None, :]
    x_even, x_odd = x_even * cos - x_odd * sin, x_odd * cos + x_even * sin
    if ROTATE:
        x = tl.reshape(tl.join(x_even + x_odd, x_even - x_odd), (HEADS, D))
        x = rotate_halves(x, HEADS, D)
    else:
        x = tl.reshape(tl.join(x_even, x_odd), (HEADS, D))
    return x


@triton.jit
def norm_rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    txt_q_ptr,
    txt_k_ptr,
    txt_v_ptr,
    norm_q_ptr,
    norm_k_ptr,
    norm_txt_q_ptr,
    norm_txt_k_ptr,
    cos_ptr,
    sin_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,  # with FLOAT8 the largest magnitudes of V, (B, S, H) fp32
    q_descale_ptr,
    k_descale_ptr,
    txt_tokens,
    tokens,  # of text and image
    img_batch,  # strides, in elements
    img_token,
    txt_batch,
    txt_token,
    eps,
    bound,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # heads at a time, a divisor of H
    TEXT: tl.constexpr,
    FLOAT8: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """Handle all heads of one token (program_id 0) of one batch entry (program_id 1)."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    source = batch * img_batch + (token - txt_tokens) * img_token
    q_ptr, k_ptr, v_ptr = q_ptr + source, k_ptr + source, v_ptr + source
    q_weight, q_other, k_weight, k_other = norm_q_ptr, norm_txt_q_ptr, norm_k_ptr, norm_txt_k_ptr
    if TEXT and token < txt_tokens:
        source = batch * txt_batch + token * txt_token
        q_ptr, k_ptr, v_ptr = txt_q_ptr + source, txt_k_ptr + source, txt_v_ptr + source
        q_weight, q_other = norm_txt_q_ptr, norm_q_ptr
        k_weight, k_other = norm_txt_k_ptr, norm_k_ptr
    q_even, q_odd = _pairs(q_weight, D)
    k_even, k_odd = _pairs(k_weight, D)
    if FLOAT8:  # into the weights, so that the loop has nothing to scale
        q_descale = _descale(q_even, q_odd, q_other, bound, TEXT, D)
        k_descale = _descale(k_even, k_odd, k_other, bound, TEXT, D)
        if token == 0:
            for head in tl.static_range(H):
                tl.store(q_descale_ptr + batch * H + head, q_descale)
                tl.store(k_descale_ptr + batch * H + head, k_descale)
        q_even, q_odd = q_even / q_descale, q_odd / q_descale
        k_even, k_odd = k_even / k_descale, k_odd / k_descale
    if ROTATE:
        q_even, q_odd = q_even * _FACTOR, q_odd * _FACTOR
        k_even, k_odd = k_even * _FACTOR, k_odd * _FACTOR
    pair = token * D + 2 * tl.arange(0, D // 2)
    cos, sin = tl.load(cos_ptr + pair)[None, :], tl.load(sin_ptr + pair)[None, :]
    row = (batch * tokens + token) * H
    for first in tl.static_range(0, H, HEADS):
        heads = first + tl.arange(0, HEADS)
        offsets = heads[:, None] * D + tl.arange(0, D)[None, :]
        target = row * D + offsets
        q = _turn(tl.load(q_ptr + offsets), q_even, q_odd, cos, sin, eps, HEADS, D, ROTATE)
        k = _turn(tl.load(k_ptr + offsets), k_even, k_odd, cos, sin, eps, HEADS, D, ROTATE)
        if FLOAT8:
            v = tl.load(v_ptr + offsets).to(tl.float32)
            tl.store(v_out_ptr + row + heads, tl.max(tl.abs(v), 1))
        elif TEXT:
            tl.store(v_out_ptr + target, tl.load(v_ptr + offsets))
        tl.store(q_out_ptr + target, q.to(q_out_ptr.dtype.element_ty))
        tl.store(k_out_ptr + target, k.to(k_out_ptr.dtype.element_ty))


@triton.jit
def cast_heads_kernel(
    v_ptr,
    txt_v_ptr,
    descale_ptr,
    out_ptr,
    txt_tokens,
    tokens,
    img_batch,  # strides, in elements
    img_token,
    txt_batch,
    txt_token,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    TEXT: tl.constexpr,
):
    """Scale and cast V of one token (program_id 0) of one batch entry (program_id 1)."""
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    v_ptr += batch * img_batch + (token - txt_tokens) * img_token
    if TEXT and token < txt_tokens:
        v_ptr = txt_v_ptr + batch * txt_batch + token * txt_token
    for first in tl.static_range(0, H, HEADS):
        heads = first + tl.arange(0, HEADS)
        offsets = heads[:, None] * D + tl.arange(0, D)[None, :]
        inverse = 1.0 / tl.load(descale_ptr + batch * H + heads)
        v = tl.load(v_ptr + offsets).to(tl.float32) * inverse[:, None]
        target = out_ptr + (batch * tokens + token) * H * D + offsets
        tl.store(target, v.to(out_ptr.dtype.element_ty))


def heads_at_a_time(heads: int) -> int:
    """Give the largest power of two up to 8 that divides the number of heads."""
    return min(8, heads & -heads)


def _one_layout(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Give the tensors as they are if heads are dense and strides the same, else copies."""
    heads, head_dim = tensors[0].shape[2:]
    strides = tensors[0].stride()
    dense = strides[2:] == (head_dim, 1) or (heads == 1 and strides[3] == 1)
    if dense and all(x.stride() == strides for x in tensors):
        return tensors
    return [x.contiguous() for x in tensors]


def _check(img, txt, norms, cos, sin) -> None:
    shape = img[0].shape
    for name, tensors, count in (("image", img, (3,)), ("text", txt, (0, 3))):
        ok = len(tensors) in count and all(x.dim() == 4 for x in tensors)
        ok = ok and all(x.shape == tensors[0].shape for x in tensors)
        ok = ok and all(x.shape[0] == shape[0] and x.shape[2:] == shape[2:] for x in tensors)
        if not ok:
            found = [tuple(x.shape) for x in tensors]
            raise ValueError(f"norm_rope: {name} must be Q, K and V (B, S, H, D), got {found}")
    tokens = shape[1] + (txt[0].shape[1] if txt else 0)
    if cos.shape != (tokens, shape[3]) or sin.shape != cos.shape:
        expected = (tokens, shape[3])
        raise ValueError(f"norm_rope: cos and sin must be {expected}, got {tuple(cos.shape)}")
    if len(norms) != (4 if txt else 2) or any(x.shape != shape[3:] for x in norms):
        raise ValueError(f"norm_rope: a weight of {shape[3]} for Q and K of each stream")


def launch_norm_rope(img, txt, norms, cos, sin, eps, float8=False, rotate=False) -> list:
    """Do what `norm_rope` does, by its kernels."""
    img, cos, sin = _one_layout(img), cos.contiguous(), sin.contiguous()
    other, weights = (_one_layout(txt), norms) if txt else (img, [*norms, *norms])
    batch, img_tokens = img[0].shape[:2]
    heads, head_dim = map(int, img[0].shape[2:])  # constants of the kernel, never symbols
    txt_tokens = txt[0].shape[1] if txt else 0
    tokens = txt_tokens + img_tokens
    shape, fp32 = (batch, tokens, heads, head_dim), torch.float32
    dtype = E4M3 if float8 else img[0].dtype
    q, k = (img[0].new_empty(shape, dtype=dtype) for _ in range(2))
    q_descale = k_descale = v = q  # unread where they are not made
    if float8:
        q_descale, k_descale = (q.new_empty((batch, heads), dtype=fp32) for _ in range(2))
        v = q.new_empty((batch, tokens, heads), dtype=fp32)
    elif txt:
        v = q.new_empty(shape)
    strides = (*img[0].stride()[:2], *other[0].stride()[:2])
    sizes = {"H": heads, "D": head_dim, "HEADS": heads_at_a_time(heads), "TEXT": bool(txt)}
    wrap_triton(norm_rope_kernel)[(tokens, batch)](
        *img,
        *other,
        *weights,
        cos,
        sin,
        q,
        k,
        v,
        q_descale,
        k_descale,
        txt_tokens,
        tokens,
        *strides,
        eps,
        bound(head_dim),
        **sizes,
        FLOAT8=float8,
        ROTATE=rotate,
    )
    if not float8:
        return [q, k, v] if txt else [q, k]
    descale, v = _v_descale(v), torch.empty_like(q)
    wrap_triton(cast_heads_kernel)[(tokens, batch)](
        img[2], other[2], descale, v, txt_tokens, tokens, *strides, **sizes
    )
    return [q, k, v, q_descale, k_descale, descale]


@triton_op("flux::norm_rope", mutates_args=())
def norm_rope(
    img: list[torch.Tensor],
    txt: list[torch.Tensor],
    norms: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    float8: bool = False,
    rotate: bool = False,
) -> list[torch.Tensor]:
    """Normalise and turn Q and K of both streams, and join them and V, text first.

    RoPE as in diffusers' FLUX: pairs (0, 1), (2, 3), ... of a head, one angle each, so cos and sin
    hold every value twice (only the first is read).

    Shapes: img three of (B, S, H, D), txt three of (B, T, H, D) or empty; norms of Q and K, image
        first, (D,) each; cos, sin (T + S, D) fp32
        -> [q, k, v] (B, T + S, H, D) contiguous, of img's dtype; without text v is left out, since
        it is img's; with float8 [q, k, v, q_descale, k_descale, v_descale] as flash_attn_func
        takes them, e4m3 and (B, H) fp32. With rotate Q and K as rotate_heads leaves them.
    Raises: ValueError on shapes that do not belong together.
    """
    _check(img, txt, norms, cos, sin)
    run = launch_norm_rope if img[0].is_cuda else plain_norm_rope
    return run(img, txt, norms, cos, sin, eps, float8, rotate)

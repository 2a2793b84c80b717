"""Q and K turned by a Hadamard matrix before their float8 cast: incoherent processing.

A few channels of Q and K are much larger than the rest (RMSNorm's weights, which are learned, make
them so), and e4m3 errs in proportion to each number: the error of a score is then that of one or
two products. An orthogonal matrix leaves every Q K' as it is, and spreads a large channel over 16,
whose errors are independent. Of the transform's log2(D) stages four are made, on channels that are
far from each other and on the two of RoPE's pair: all seven bring more on one trained checkpoint of
three (docs/performance.md). Neighbours are alike, so that turning those alone does not help.

A head's length stays, so the bound of its values that norm_rope knows before the data holds.

Source: Shah et al. 2024, arXiv:2407.08608 (FlashAttention-3), section 3.3; Tseng et al. 2024,
arXiv:2402.04396 (QuIP#)
"""

import torch
import triton
import triton.language as tl

STAGES = 3  # on halves of a head, after the one on pairs
_STAGES = tl.constexpr(STAGES)
FACTOR = 2.0 ** (-(STAGES + 1) / 2)  # a power of two: it rounds nothing


def rotate_heads(x: torch.Tensor) -> torch.Tensor:
    """Turn every head; channels come out in another order, the same for Q and for K.

    Shapes: x (..., D) any float dtype, D divisible by 16 -> the same
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    x = torch.stack([even + odd, even - odd], dim=-1).flatten(-2)
    for _ in range(STAGES):
        low, high = x.chunk(2, dim=-1)
        x = torch.stack([low + high, low - high], dim=-1).flatten(-2)
    return x * FACTOR


@triton.jit
def rotate_halves(x, HEADS: tl.constexpr, D: tl.constexpr):
    """Make the stages on halves of (HEADS, D), without the factor."""
    for _ in tl.static_range(_STAGES):
        low, high = tl.split(tl.permute(tl.reshape(x, (HEADS, 2, D // 2)), (0, 2, 1)))
        x = tl.reshape(tl.join(low + high, low - high), (HEADS, D))
    return x

"""What comfy-kitchen's int8 attention computes, in plain torch: its twin on any device.

Queries, keys, values and probabilities are all 8-bit integers, products accumulate in int32:

Q, K  minus one representative key where that narrows the range of K (softmax does not see it); both
      rotated by the same Hadamard matrix, which spreads an outlying channel over all; one scale per
      4 rows of Q and per 16 or 32 keys
V     one scale per channel, over all keys
P     0 to 255, from the largest score of each row within 64 or 128 keys; the denominator is the sum
      of what was rounded

An integer times its scale is a fp32 number, so the products here are fp32 on rounded inputs. What
differs from the library's kernel: its signs in front of the rotation and the order of its sums.

Source: comfy-kitchen 0.2.40 (Apache-2.0), after SageAttention, arXiv:2410.02367.
"""

import math

import torch
import torch.nn.functional as F

SAMPLED_KEYS = 9
SHORT = 256  # keys up to which only groups of 4 channels are rotated
LONG = 1024  # keys beyond which a tile of heads of 128 has 128 keys instead of 64


def int8_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with Q, K, V and P rounded to 8 bits.

    Shapes: q (B, Sq, H, D), k, v (B, Sk, H, D) bf16, fp16 or fp32, D 64 or 128 -> (B, Sq, H, D)
    """
    dtype, head = q.dtype, q.shape[-1]
    q, k, v = (x.transpose(1, 2).float() for x in (q, k, v))  # [B, H, S, D]
    keys = k.shape[2]
    tile = 128 if head >= 128 and keys > LONG else 64
    rotation = _rotation(4 if keys <= SHORT else head, head).to(q.device)
    k = k - _representative(k)
    q = _round(q @ rotation, (4, 8), (-3, -1))  # rows r, r + 8, r + 16, r + 24
    k = _round(k @ rotation, (tile // 8, 4, 2), (-4, -2, -1))  # pairs, 8 rows apart
    v = _round(v, (keys,), (-2,))

    scores = q @ k.transpose(-1, -2) * (math.log2(math.e) / head**0.5)  # powers of 2
    scores = F.pad(scores, (0, -keys % tile), value=-math.inf).unflatten(-1, (-1, tile))
    most = scores.amax(dim=-1, keepdim=True)  # [B, H, Sq, tiles, 1]
    weights = (scores - most + math.log2(255)).exp2().round()
    weights = (weights * (most - most.amax(dim=-2, keepdim=True)).exp2()).flatten(-2)[..., :keys]
    return (weights @ v / weights.sum(dim=-1, keepdim=True)).to(dtype).transpose(1, 2)


def _representative(k: torch.Tensor) -> torch.Tensor:
    """Give the sampled key in the middle of the others, or 0 where subtracting it does not help.

    Shapes: k (B, H, S, D) -> (B, H, 1, D)
    """
    rows = torch.arange(SAMPLED_KEYS, device=k.device) * (k.shape[2] - 1) // (SAMPLED_KEYS - 1)
    samples = k[:, :, rows]
    distance = (samples - samples.mean(dim=2, keepdim=True)).square().sum(-1)  # [B, H, 9]
    chosen = distance.argmin(-1)[..., None, None].expand(-1, -1, 1, k.shape[-1])
    key = samples.gather(2, chosen)
    left = samples - key
    narrower = _amax(left, (-2, -1)) <= 1.125 * _amax(samples, (-2, -1))
    smaller = left.square().sum((-2, -1), True) < samples.square().sum((-2, -1), True)
    return torch.where(narrower & smaller, key, 0.0)


def _rotation(group: int, head: int) -> torch.Tensor:
    """Make an orthogonal matrix that mixes groups of so many channels.

    A whole head gets random signs first: without, all that is constant would fall into one channel.

    Shapes: -> (head, head) fp32
    """
    hadamard = torch.ones(1, 1)
    while hadamard.shape[0] < group:
        hadamard = torch.cat([torch.cat([hadamard, hadamard]), torch.cat([hadamard, -hadamard])], 1)
    mixed = torch.block_diag(*[hadamard / group**0.5] * (head // group))
    signs = torch.randint(2, (head, 1), generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    return mixed * signs if group == 128 else mixed


def _round(x: torch.Tensor, block: tuple[int, ...], shared: tuple[int, ...]) -> torch.Tensor:
    """Round rows to multiples of their scale; `shared` dimensions of a block of rows have one.

    Shapes: x (B, H, S, D); S is cut into blocks, the last one filled with zeros -> (B, H, S, D)
    """
    rows, edge = x.shape[2], math.prod(block)
    x = F.pad(x, (0, 0, 0, -rows % edge)).unflatten(2, (-1, *block))
    scale = (_amax(x, shared) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    return ((x / scale).round() * scale).flatten(2, -2)[:, :, :rows]


def _amax(x: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    return x.abs().amax(dim=dims, keepdim=True)

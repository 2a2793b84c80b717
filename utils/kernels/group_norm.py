"""GroupNorm that reads a channels-last tensor along its channels.

What Inductor makes of torch's own GroupNorm walks over the pixels of one channel, then the next: in
channels-last that is every 128th to 512th element, 2 bytes of each 32-byte sector that the memory
delivers. Statistics per channel, put together per group afterwards, are the same numbers, and
neighbouring threads read neighbouring channels. Plain torch, for a compiler: run eagerly it makes
float32 copies.

Twin: torch.nn.GroupNorm; both compute in fp32 and agree to its rounding.
Source: Chan, Golub, LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample
variances", for variances of parts put together without cancellation
"""

import torch
from torch import nn


class ChannelGroupNorm(nn.GroupNorm):
    """torch.nn.GroupNorm with the statistics taken per channel first.

    Shapes: (B, C, ...) any float dtype -> the same, in the layout of the input
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise each group of channels of each image, then scale and shift each channel."""
        batch, channels = x.shape[:2]
        parts = (batch, self.num_groups, channels // self.num_groups)
        pixels = tuple(range(2, x.dim()))
        var, mean = torch.var_mean(x.float(), dim=pixels, correction=0)  # [B, C]
        var, mean = var.view(parts), mean.view(parts)
        middle = mean.mean(2, keepdim=True)  # [B, G, 1]
        spread = (var + (mean - middle).square()).mean(2, keepdim=True)
        scale = torch.rsqrt(spread + self.eps) * self.weight.float().view(parts[1:])  # [B, G, C/G]
        shift = self.bias.float().view(parts[1:]) - middle * scale
        wide = (batch, channels) + (1,) * len(pixels)
        return (x.float() * scale.view(wide) + shift.view(wide)).to(x.dtype)

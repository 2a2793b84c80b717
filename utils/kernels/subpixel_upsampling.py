"""Nearest upsampling and the 3x3 convolution behind it, as one transposed convolution.

Every pixel of the enlarged picture stands there four times, so of the nine taps that reach it those
that read the same pixel may be added beforehand: four taps are left for each output pixel. Laid out
for stride 2 they are a 4x4 kernel: along each axis, from taps (a, b, c), it is (c, b+c, a+b, a).
4/9 of the arithmetic, and the enlarged picture is never written nor read. Beyond the border both
read zeros.

The sums are made in fp32 and rounded once to the model's dtype: an error of up to half a unit in
the last place of each weight, about as large as the rounding of the layer's own output.

Twin: diffusers' Upsample2D.
Source: Shi et al. 2016, arXiv:1609.07009, "Is the deconvolution layer the same as a convolutional
layer?"
"""

import torch
from torch import nn


def _folded(weight: torch.Tensor, dim: int) -> torch.Tensor:
    a, b, c = weight.unbind(dim)
    return torch.stack([c, b + c, a + b, a], dim)


def fold(conv: nn.Conv2d) -> nn.ConvTranspose2d:
    """Give the layer that equals `conv` behind a nearest upsampling by two.

    Shapes: weights (O, I, 3, 3) -> (I, O, 4, 4); the layer (B, I, H, W) -> (B, O, 2 H, 2 W)
    Raises: ValueError unless it is a 3x3 convolution of stride 1 that keeps the size.
    """
    plain = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
    if plain != ((3, 3), (1, 1), (1, 1), (1, 1), 1) or conv.padding_mode != "zeros":
        raise ValueError(f"fold: got {conv}, expected 3x3, stride 1, padding 1 with zeros")
    layer = nn.ConvTranspose2d(
        conv.in_channels,
        conv.out_channels,
        kernel_size=4,
        stride=2,
        padding=1,
        device="meta",  # its own first weights would be drawn from the random state
    )
    weight = _folded(_folded(conv.weight.detach().float().transpose(0, 1), 2), 3)
    layer.weight = nn.Parameter(weight.to(conv.weight.dtype), conv.weight.requires_grad)
    layer.bias = conv.bias
    return layer.train(conv.training)

"""Nearest 2x upsampling and a 3x3 convolution as one product over the small tensor.

After upsampling, two or four of the nine taps read the same pixel. Summed beforehand they are a 4x4
kernel of stride 2, of which each output pixel meets 2x2 taps: 4/9 of the FLOP, and the upsampled
tensor is never written. Either as a transposed convolution, which writes the large tensor itself,
or as one convolution of 2x2 taps with the four phases of the output as channels, and a copy that
interleaves them.

Twin: diffusers' Upsample2D. Sums are made in fp32; rounded to bf16 they err once more than taps
that were bf16 already: 1.4 times the error of the twin's one rounding, for this module alone.
Source: Shi et al. 2016, arXiv:1609.07009, "Is the deconvolution layer the same as a convolutional
layer?", for resize-convolution as sub-pixel convolution
"""

import torch
import torch.nn.functional as F
from torch import nn

# Rows of the 4x4 kernel from rows of the 3x3 one: output row 2i reads input rows i - 1 (tap 3) and
# i (tap 1), row 2i + 1 reads i (tap 2) and i + 1 (tap 0)
SUMS = ((0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 0, 0))


def summed_taps(weight: torch.Tensor) -> torch.Tensor:
    """Sum the taps that read the same pixel.

    Shapes: (O, I, 3, 3) any float dtype -> (O, I, 4, 4) fp32, as F.conv_transpose2d counts taps
    """
    sums = torch.tensor(SUMS, dtype=torch.float32, device=weight.device)
    return torch.einsum("oihw,kh,lw->oikl", weight.float(), sums, sums)


class SubpixelUpsample(nn.Module):
    """diffusers' Upsample2D with interpolation and a 3x3 convolution, for 2x exactly.

    Shapes: (B, C, H, W) -> (B, O, 2H, 2W), the weight's dtype, in the layout of the input, but
        always channels-last without `transposed`
    """

    def __init__(self, conv: nn.Conv2d, transposed: bool) -> None:
        """Sum the taps of Upsample2D's convolution, which is not needed any more."""
        super().__init__()
        self.transposed = transposed
        taps, bias = summed_taps(conv.weight), conv.bias
        if transposed:
            taps = taps.transpose(0, 1)
        else:
            by_phase = taps.flip(2, 3).unflatten(3, (2, 2)).unflatten(2, (2, 2))
            # [O, I, tap, phase, tap, phase] -> [phase, phase, O, I, tap, tap]
            taps = by_phase.permute(3, 5, 0, 1, 2, 4).flatten(0, 2)
            bias = bias.repeat(4)
        self.weight = nn.Parameter(
            taps.to(conv.weight.dtype).contiguous(), requires_grad=conv.weight.requires_grad
        )
        self.bias = nn.Parameter(bias, requires_grad=conv.bias.requires_grad)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Upsample and convolve."""
        if self.transposed:
            return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
        # Row p has phase 0 of input row p, and phase 1 of row p - 1; columns likewise
        y = F.conv2d(x, self.weight, self.bias, padding=1)  # [B, 4 O, H + 1, W + 1]
        y = y.unflatten(1, (2, 2, -1)).unfold(4, 2, 1).unfold(5, 2, 1)
        y = y.diagonal(0, 1, 6).diagonal(0, 1, 5)  # [B, O, H, W, phase, phase]
        return y.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)

"""The layers of the VAE's decoder and encoder, as utils/work.py lists those of the other networks.

Source: diffusers 0.42 (vae.py).
"""

from utils.layers import (
    Layer,
    attention,
    convolution,
    elementwise,
    linear,
    place,
    subpixel_convolution,
)


class _Picture:
    """The VAE's layers at one batch and size, which its blocks change as they go."""

    def __init__(self, batch: int, size: tuple[int, int], base: str):
        self.batch, self.size, self.base = batch, size, base

    @property
    def pixels(self) -> int:
        return self.batch * self.size[0] * self.size[1]

    def scale(self, factor: float) -> None:
        self.size = (int(self.size[0] * factor), int(self.size[1] * factor))

    def conv(self, name: str, inputs: int, outputs: int, **options) -> Layer:
        return convolution(name, self.batch, inputs, outputs, self.size, self.base, **options)

    def upsample(self, c: int, subpixel: bool) -> list[Layer]:
        small, name = self.pixels, "conv after upsample"
        self.scale(2)
        if not subpixel:
            return [elementwise("upsample", small, c, 4 * c, self.base), self.conv(name, c, c)]
        return [subpixel_convolution(self.batch, c, c, self.size, self.base)]

    def norm(self, c: int, name: str = "GroupNorm + SiLU") -> Layer:
        return elementwise(name, self.pixels, 2 * c, c, self.base, parameters=2 * c)

    def resnet(self, inputs: int, outputs: int) -> list[Layer]:
        shortcut = [self.conv("shortcut", inputs, outputs, k=1)] if inputs != outputs else []
        return [
            self.norm(inputs),
            self.conv("conv", inputs, outputs),
            self.norm(outputs),
            self.conv("conv", outputs, outputs),
            *shortcut,
            elementwise("residual", self.pixels, 2 * outputs, outputs, self.base),
        ]

    def middle(self, c: int, config: dict) -> list[Layer]:
        between = [
            self.norm(c, "GroupNorm"),
            linear("QKV", self.pixels, c, 3 * c, self.base),
            attention(self.batch, self.pixels // self.batch, 1, c, self.base),
            linear("out", self.pixels, c, c, self.base),
            elementwise("residual", self.pixels, 2 * c, c, self.base),
        ]
        between *= config.get("mid_block_add_attention", True)
        return place("middle", 1, [*self.resnet(c, c), *between, *self.resnet(c, c)])


def vae_decoder(
    config: dict, batch: int, size: tuple[int, int], base: str, subpixel: bool = False
) -> list[Layer]:
    """List the layers of AutoencoderKL.decode; `size` is the latents' height and width."""
    widths = list(reversed(config["block_out_channels"]))
    latent, at = config["latent_channels"], _Picture(batch, size, base)
    first = [at.conv("post-quant conv", latent, latent, k=1)] * config.get(
        "use_post_quant_conv", True
    )
    layers = place("input", 1, [*first, at.conv("conv", latent, widths[0])])
    layers += at.middle(widths[0], config)
    before = widths[0]
    for i, c in enumerate(widths):
        block = []
        for _ in range(config["layers_per_block"] + 1):
            block += at.resnet(before, c)
            before = c
        if i < len(widths) - 1:
            block += at.upsample(c, subpixel)
        layers += place(f"up block {i}", 1, block)
    last = [at.norm(before), at.conv("conv", before, config["out_channels"])]
    return layers + place("output", 1, last)


def vae_encoder(config: dict, batch: int, size: tuple[int, int], base: str) -> list[Layer]:
    """List the layers of AutoencoderKL.encode; `size` is the picture's height and width."""
    widths = list(config["block_out_channels"])
    moments, at = 2 * config["latent_channels"], _Picture(batch, size, base)  # mean, log variance
    layers = place("input", 1, [at.conv("conv", config["in_channels"], widths[0])])
    before = widths[0]
    for i, c in enumerate(widths):
        block = []
        for _ in range(config["layers_per_block"]):
            block += at.resnet(before, c)
            before = c
        if i < len(widths) - 1:
            at.scale(1 / 2)
            block.append(at.conv("downsample", c, c, stride=2))
        layers += place(f"down block {i}", 1, block)
    layers += at.middle(before, config)
    last = [at.norm(before), at.conv("conv", before, moments)]
    last += [at.conv("quant conv", moments, moments, k=1)] * config.get("use_quant_conv", True)
    return layers + place("output", 1, last)

"""FLOP and bytes of one layer, from its shapes.

FLOP: 2 per multiply-add of every product (linear layer, attention, convolution) and nothing else,
exactly what `torch.utils.flop_counter` counts; a test compares them.

Bytes: what a layer that is one kernel has to move at least, each weight and input read once, each
output written once. Q, K and V are one product, as are the two halves of T5's gated MLP.
Elementwise layers are the passes that are left when everything between two products is one kernel
(norm + modulate, QK norm + RoPE, GELU, gate + residual); GroupNorm reads twice, since its
statistics span the picture. A float8 layer reads float8 weights and inputs and writes bf16;
whatever comes before it writes float8. Not counted: float8 scales, reads of the RoPE table and of
T5's position bias (the same in every block, they can stay in a cache), scheduler, packing, PIL.
"""

from dataclasses import dataclass, replace

# Bytes of a number; the last two with their share of a block's scale
WIDTH = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "mxfp8": 33 / 32, "nvfp4": 9 / 16}


@dataclass(frozen=True)
class Layer:
    """One kind of layer; parameters, FLOP and bytes are those of one of them."""

    name: str
    kind: str  # "linear", "attention", "convolution", "modulation" or "elementwise"
    shape: str
    flop: int
    bytes: int
    dtype: str  # that its product runs in
    parameters: int = 0
    part: str = ""
    count: int = 1  # how often it runs in one run of its component


@dataclass(frozen=True)
class Precision:
    """What runs in which dtype (a key of WIDTH); an empty one is `base`."""

    base: str = "bf16"
    linear: str = ""  # the transformer blocks' linear layers
    attention: str = ""  # the transformer's
    other: str = ""  # the transformer's modulation, embedders and last projection
    text: str = ""  # T5's linear layers


def total(layers, what: str, *kinds: str) -> int:
    """Sum "flop", "bytes" or "parameters" over layers, all or those of some kinds."""
    return sum(
        getattr(layer, what) * layer.count for layer in layers if not kinds or layer.kind in kinds
    )


def products(layers) -> list[Layer]:
    """Leave out the elementwise passes."""
    return [layer for layer in layers if layer.kind != "elementwise"]


def place(part: str, count: int, layers: list[Layer]) -> list[Layer]:
    """Say where layers stand and how often; equal ones become one with their number."""
    merged: dict[tuple, Layer] = {}
    for layer in layers:
        known = merged.get(key := (layer.name, layer.shape))
        times = layer.count * count + (known.count if known else 0)
        merged[key] = replace(layer, part=part, count=times)
    return list(merged.values())


def linear(
    name: str, rows: int, inputs: int, outputs: int, base: str, dtype: str = "", bias: bool = True
) -> Layer:
    """Count a linear layer."""
    dtype = dtype or base
    weights = inputs * outputs
    return Layer(
        name,
        "linear",
        f"{rows} x {inputs} -> {outputs}",
        flop=2 * rows * weights,
        bytes=int(WIDTH[dtype] * (weights + rows * inputs)) + WIDTH[base] * (rows + bias) * outputs,
        dtype=dtype,
        parameters=weights + bias * outputs,
    )


def modulation(name: str, images: int, inputs: int, outputs: int, precision: Precision) -> Layer:
    """Count a linear layer that sees one row an image, so that it is all weights."""
    layer = linear(name, images, inputs, outputs, precision.base, precision.other)
    return replace(layer, kind="modulation")


def attention(batch: int, tokens: int, heads: int, head: int, base: str, dtype: str = "") -> Layer:
    """Count softmax(Q K') V; a mask saves nothing here, as in torch's counter."""
    dtype = dtype or base
    elements = batch * tokens * heads * head
    return Layer(
        "attention",
        "attention",
        f"{batch} x {heads} x {tokens} x {head}",
        flop=4 * elements * tokens,
        bytes=(3 * WIDTH[dtype] + WIDTH[base]) * elements,
        dtype=dtype,
    )


def convolution(
    name: str,
    batch: int,
    inputs: int,
    outputs: int,
    size: tuple[int, int],
    base: str,
    k: int = 3,
    stride: int = 1,
) -> Layer:
    """Count a convolution with k x k weights by the height and width that it writes."""
    pixels = batch * size[0] * size[1]
    weights = k * k * inputs * outputs
    return Layer(
        name,
        "convolution",
        f"{inputs} -> {outputs}, {k}x{k}, {size[0]}x{size[1]}",
        flop=2 * pixels * weights,
        bytes=WIDTH[base] * (weights + outputs + pixels * (inputs * stride**2 + outputs)),
        dtype=base,
        parameters=weights + outputs,
    )


def subpixel_convolution(
    batch: int, inputs: int, outputs: int, size: tuple[int, int], base: str
) -> Layer:
    """Count nearest 2x upsampling and a 3x3 convolution as one layer (step subpixel_upsampling).

    Of its 4x4 weights each pixel that it writes, `size` of them, meets 2x2.
    """
    pixels, weights = batch * size[0] * size[1], 16 * inputs * outputs
    return Layer(
        "upsample + conv",
        "convolution",
        f"{inputs} -> {outputs}, 4x4 transposed, {size[0]}x{size[1]}",
        flop=2 * pixels * weights // 4,
        bytes=WIDTH[base] * (weights + outputs + pixels * inputs // 4 + pixels * outputs),
        dtype=base,
        parameters=weights + outputs,
    )


def elementwise(
    name: str, rows: int, read: int, write: int, base: str, to: str = "", parameters: int = 0
) -> Layer:
    """Count a pass that reads and writes so many channels a row; `to` is the next layer's dtype."""
    moved = rows * (read * WIDTH[base] + write * WIDTH[to or base]) + parameters * WIDTH[base]
    shape = f"{rows} x {read} -> {write}"
    return Layer(name, "elementwise", shape, 0, int(moved), base, parameters)


def lookup(name: str, rows: int, channels: int, vocabulary: int, base: str) -> Layer:
    """Count an embedding, of which only the rows of the tokens are read."""
    return replace(
        elementwise(name, rows, channels, channels, base), parameters=vocabulary * channels
    )

"""Run a picture through a network tile by tile, so that its size does not decide the memory.

Each tile is read with `overlap` more pixels on every side that is not the picture's own border, and
of the result only the tile itself is kept. Where the overlap reaches as far as the network's
receptive field, no kept pixel has seen a cut edge: the result is the untiled one, up to the order
in which products are summed. `receptive_radius` gives that overlap for networks of convolutions.
"""

from collections.abc import Callable, Iterator

ALIGN = 4  # pixels: Real-ESRGAN's x1 and x2 files put 4x4 pixels into one


def receptive_radius(model) -> int | None:
    """Bound how many input pixels away an output pixel looks; None if it may be all of them.

    For networks of stride-1 convolutions and pointwise parts only, whatever their branches: all
    kernels added up as if each stood behind the other, at the input's resolution.

    Units: pixels of the model's input.
    """
    from torch import nn

    pointwise = (
        nn.LeakyReLU, nn.ReLU, nn.PReLU, nn.PixelShuffle, nn.Upsample, nn.Identity, nn.Dropout,
    )  # fmt: skip
    radius = 0
    for part in model.modules():
        if next(part.children(), None) is not None:
            continue
        if isinstance(part, nn.Conv2d):
            if set(part.stride) != {1}:
                return None
            radius += max(
                (kernel - 1) // 2 * dilation
                for kernel, dilation in zip(part.kernel_size, part.dilation, strict=True)
            )
        elif not isinstance(part, pointwise) and next(part.parameters(), None) is not None:
            return None
    return radius * (getattr(model, "shuffle_factor", None) or 1)


def spans(length: int, tile: int, overlap: int) -> Iterator[tuple[slice, slice]]:
    """Cut one edge: what is read, and what of that is kept, tile by tile.

    Units: pixels.
    """
    for start in range(0, length, tile):
        end = min(start + tile, length)
        left, right = max(0, start - overlap), min(length, end + overlap)
        yield slice(left, right), slice(start - left, end - left)


def run_tiled(
    run: Callable, picture, scale: int, tile: int, overlap: int, done: Callable = lambda: None
):
    """Run `run` on overlapping tiles and put the kept parts together; `done` after each tile.

    Shapes: picture (1, C, H, W); result (1, C', H * scale, W * scale), on the picture's device.
    Units: tile and overlap in pixels of the input, both divisible by ALIGN.
    """
    import torch

    height, width = picture.shape[-2:]
    result = None
    at_y = 0
    for rows, keep_y in spans(height, tile, overlap):
        at_x = 0
        for columns, keep_x in spans(width, tile, overlap):
            part = run(picture[..., rows, columns])
            part = part[..., _times(keep_y, scale), _times(keep_x, scale)]
            if result is None:
                size = (1, part.shape[1], height * scale, width * scale)
                result = torch.empty(size, dtype=part.dtype, device=picture.device)
            bottom, right = at_y + part.shape[-2], at_x + part.shape[-1]
            result[..., at_y:bottom, at_x:right] = part
            at_x = right
            done()
        at_y = bottom
    return result


def count(height: int, width: int, tile: int) -> int:
    """Give the number of tiles of a picture."""
    return -(-height // tile) * -(-width // tile)


def _times(span: slice, scale: int) -> slice:
    return slice(span.start * scale, span.stop * scale)

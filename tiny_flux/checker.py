"""Read a picture back: which shape, which colours, what size, where.

The border gives the background, the pixels farthest from it the shape's colour, and the pixels
nearer to the second make a mask. Against that mask every shape's template is laid with the same
centroid and area; the best overlap names the shape, its radius the size, its centre the position.
Pictures that are not made of two plain colours (noise, blank, blobs) read as nothing. numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

from .scenes import (
    COLOURS,
    IMAGE_SIZE,
    OFFSETS_PX,
    POSITIONS,
    RADII,
    SHAPES,
    Scene,
    render_mask,
)

COLOUR_REACH = 60.0  # RGB distance up to which a pixel counts as a colour
MIN_CONTRAST = 40.0
MIN_PLAIN, MIN_OVERLAP = 0.85, 0.75
MIN_SHARE, MAX_SHARE = 0.005, 0.5
ATTRIBUTES = ("shape", "colour", "background", "size", "position")


@dataclass(frozen=True)
class Reading:
    """What a picture shows; the overlap is the best template's intersection over union."""

    scene: Scene
    overlap: float
    centroid_px: tuple[float, float]  # of the shape's pixels


def _nearest_colour(rgb: np.ndarray) -> str | None:
    distance = {name: np.linalg.norm(rgb - np.array(c)) for name, c in COLOURS.items()}
    name = min(distance, key=distance.get)
    return name if distance[name] <= COLOUR_REACH else None


@cache
def _unit_template(shape: str) -> tuple[float, float, float]:
    """Measure a shape of radius 1: area and centroid."""
    mask = render_mask(shape, 64, 64, 48)
    ys, xs = np.indices(mask.shape)
    area = mask.sum()
    x, y = (mask * (xs + 0.5)).sum() / area, (mask * (ys + 0.5)).sum() / area
    return area / 48**2, (x - 64) / 48, (y - 64) / 48


def read_image(image: Image.Image) -> Reading | None:
    """Read the scene of a picture; None when it is not one plain shape on a plain ground."""
    pixels = np.asarray(image.convert("RGB").resize((IMAGE_SIZE,) * 2), np.float32)
    edge = np.ones(pixels.shape[:2], bool)
    edge[3:-3, 3:-3] = False
    back = np.median(pixels[edge], axis=0)
    away = np.linalg.norm(pixels - back, axis=-1)
    reach = np.percentile(away, 99.5)
    if reach < MIN_CONTRAST:
        return None
    front = np.median(pixels[away > 0.6 * reach], axis=0)
    axis = front - back
    if np.linalg.norm(axis) < MIN_CONTRAST:
        return None
    mask = (pixels - back) @ axis / (axis @ axis) > 0.5
    plain = (away < COLOUR_REACH) | (np.linalg.norm(pixels - front, axis=-1) < COLOUR_REACH)
    colour, background = _nearest_colour(front), _nearest_colour(back)
    if plain.mean() < MIN_PLAIN or None in (colour, background):
        return None
    if not MIN_SHARE < mask.mean() < MAX_SHARE:
        return None
    ys, xs = np.nonzero(mask)
    centroid = float(xs.mean() + 0.5), float(ys.mean() + 0.5)
    overlaps = {}
    for shape in SHAPES:
        area, x, y = _unit_template(shape)
        radius = float(np.sqrt(mask.sum() / area))
        centre = centroid[0] - x * radius, centroid[1] - y * radius
        template = render_mask(shape, *centre, radius) > 0.5
        union = (template | mask).sum()
        overlaps[shape] = ((template & mask).sum() / union, radius, centre)
    shape = max(overlaps, key=lambda name: overlaps[name][0])
    overlap, radius, (x, y) = overlaps[shape]
    size = min(RADII, key=lambda name: abs(np.log(radius / RADII[name])))
    column, row = (_third(v - IMAGE_SIZE / 2) for v in (x, y))
    position = " ".join(w for w in (("top", "", "bottom")[row], ("left", "", "right")[column]) if w)
    scene = Scene(shape, colour, background, size, position or POSITIONS[4])
    return Reading(scene, float(overlap), centroid)


def _third(offset_px: float) -> int:
    """Say which third an offset from the middle lies in: 0, 1 or 2."""
    limit = OFFSETS_PX["right"] / 2
    return 0 if offset_px < -limit else 2 if offset_px > limit else 1


def check_image(image: Image.Image, scene: Scene) -> dict[str, bool]:
    """Compare a picture with its scene, attribute by attribute; see `check_reading`."""
    return check_reading(read_image(image), scene)


def check_reading(reading: Reading | None, scene: Scene) -> dict[str, bool]:
    """Compare what was read with a scene, attribute by attribute.

    Every value is False when the picture is no plain shape on a plain ground; the shape must also
    overlap its template by 75 % (thin small shapes lose 10 % to an outline half a pixel off).
    """
    if reading is None:
        return dict.fromkeys(ATTRIBUTES, False)
    right = {name: getattr(reading.scene, name) == getattr(scene, name) for name in ATTRIBUTES}
    right["shape"] = right["shape"] and reading.overlap >= MIN_OVERLAP
    return right

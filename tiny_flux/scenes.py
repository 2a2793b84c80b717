"""Scenes: one coloured shape on a plain background, its captions and its picture.

A `Scene` is the whole truth about a picture up to a small jitter (position, size, colour), which
is all that a seed may change. Captions are written from scenes and parsed back into them, and
about a tenth of the (shape, colour, background) triples is never shown in any training: prompts
of the evaluation come from those alone. Needs numpy and PIL, not torch.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 128
SUPERSAMPLE = 4
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 80, 210),
    "yellow": (245, 215, 50),
    "orange": (245, 135, 30),
    "purple": (140, 60, 180),
    "black": (20, 20, 20),
    "white": (245, 245, 245),
}
RADII = {"small": 14.0, "medium": 20.0, "large": 29.0}  # px at 128x128
SIZES = tuple(RADII)
ROWS, COLUMNS = ("top", "middle", "bottom"), ("left", "middle", "right")
OFFSETS_PX = {"top": -26, "left": -26, "middle": 0, "bottom": 26, "right": 26}
POSITIONS = tuple(
    "centre" if row == column == "middle" else " ".join(w for w in (row, column) if w != "middle")
    for row in ROWS
    for column in COLUMNS
)
POSITION_JITTER_PX, SIZE_JITTER, COLOUR_JITTER = 3.0, 0.05, 6


@dataclass(frozen=True)
class Scene:
    """One shape: what a caption can say."""

    shape: str
    colour: str
    background: str
    size: str = "medium"
    position: str = "centre"


@dataclass(frozen=True)
class Jitter:
    """What a caption does not say: Units: px, relative size, levels of 0..255."""

    dx: float = 0.0
    dy: float = 0.0
    scale: float = 1.0
    colour: tuple[int, int, int] = (0, 0, 0)
    background: tuple[int, int, int] = (0, 0, 0)


def held_out(scene: Scene) -> bool:
    """Say whether the scene's (shape, colour, background) triple is kept from all training."""
    names = list(COLOURS)
    place = SHAPES.index(scene.shape) + 3 * names.index(scene.colour)
    return (place + 4 * names.index(scene.background)) % 10 == 5


def sample_scene(rng: random.Random, of_held_out: bool = False) -> Scene:
    """Draw a scene from the training triples, or from the held-out ones."""
    while True:
        colour, background = rng.sample(list(COLOURS), 2)
        scene = Scene(
            rng.choice(SHAPES), colour, background, rng.choice(SIZES), rng.choice(POSITIONS)
        )
        if held_out(scene) == of_held_out:
            return scene


def default_background(colour: str) -> str:
    """Name the background that a caption without one means."""
    return "black" if colour == "white" else "white"


def article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe(scene: Scene) -> str:
    """Write the plain caption: "a small red circle at the top left on a blue background"."""
    size = "" if scene.size == "medium" else scene.size + " "
    place = "" if scene.position == "centre" else f" at the {scene.position}"
    thing = article(f"{size}{scene.colour} {scene.shape}")
    return f"{thing}{place} on {article(scene.background)} background"


def caption(scene: Scene, rng: random.Random) -> str:
    """Write one of many wordings; all of them are read back by `parse`."""
    size = "" if scene.size == "medium" and rng.random() < 0.8 else scene.size + " "
    if scene.position == "centre":
        place = rng.choice(["", "", "", " in the centre", " in the center", " in the middle"])
    else:
        corner = " corner" if " " in scene.position and rng.random() < 0.3 else ""
        place = f" {rng.choice(['at', 'at', 'in'])} the {scene.position}{corner}"
    noun = f"{size}{scene.colour} {scene.shape}"
    unnamed = scene.background == default_background(scene.colour) and rng.random() < 0.4
    ground = f"{article(scene.background)} background"
    if unnamed:
        text = rng.choice([f"{article(noun)}{place}", f"{noun}{place}"])
    else:
        text = rng.choice(
            [
                *[f"{article(noun)}{place} on {ground}"] * 4,
                f"{article(noun)} on {ground}{place}",
                f"{noun}{place}, {scene.background} background",
                f"{ground} with {article(noun)}{place}",
                f"a picture of {article(noun)}{place} on {ground}",
                f"{article(noun)}{place} on {scene.background}",
            ]
        )
    return restyle(text, rng)


def restyle(text: str, rng: random.Random) -> str:
    """Add a full stop or capitals now and then."""
    if rng.random() < 0.15:
        text += "."
    style = rng.random()
    return text.capitalize() if style < 0.15 else text.upper() if style < 0.17 else text


def parse(text: str) -> Scene | None:
    """Read a caption back into its scene; None when it names no shape with a colour."""
    words = re.findall(r"[a-z]+", text.lower())
    shape = next((w for w in words if w in SHAPES), None)
    if shape is None:
        return None
    at = words.index(shape)
    colour = words[at - 1] if at and words[at - 1] in COLOURS else None
    if colour is None:
        return None
    others = [w for i, w in enumerate(words) if w in COLOURS and i != at - 1]
    background = others[0] if others else default_background(colour)
    size = next((w for w in words if w in SIZES), "medium")
    row = next((w for w in words if w in ("top", "bottom")), "")
    column = next((w for w in words if w in ("left", "right")), "")
    return Scene(shape, colour, background, size, f"{row} {column}".strip() or "centre")


def sample_jitter(rng: random.Random) -> Jitter:
    """Draw the jitter of one picture."""
    level = [rng.randint(-COLOUR_JITTER, COLOUR_JITTER) for _ in range(6)]
    return Jitter(
        rng.uniform(-POSITION_JITTER_PX, POSITION_JITTER_PX),
        rng.uniform(-POSITION_JITTER_PX, POSITION_JITTER_PX),
        rng.uniform(1 - SIZE_JITTER, 1 + SIZE_JITTER),
        tuple(level[:3]),
        tuple(level[3:]),
    )


def _outline(shape: str | tuple) -> Sequence[tuple[float, float]]:
    """List the corners of a shape, y downwards, for a radius of 1; a tuple is such a list."""
    if isinstance(shape, tuple):
        return shape
    if shape == "square":
        return [(-0.86, -0.86), (0.86, -0.86), (0.86, 0.86), (-0.86, 0.86)]
    if shape == "triangle":
        return [(0, -1.05), (1.02, 0.75), (-1.02, 0.75)]
    if shape == "diamond":
        return [(0, -1.1), (0.75, 0), (0, 1.1), (-0.75, 0)]
    if shape == "star":
        radii = [1.12 if i % 2 == 0 else 0.47 for i in range(10)]
        return [
            (r * math.sin(i * math.pi / 5), -r * math.cos(i * math.pi / 5))
            for i, r in enumerate(radii)
        ]
    if shape == "cross":
        a, b = 0.34, 1.0
        arm = [(-a, -b), (a, -b), (a, -a)]  # a quarter of the outline, turned four times
        return [
            point
            for x, y in ((1, 0), (0, 1), (-1, 0), (0, -1))
            for point in [(x * u - y * v, y * u + x * v) for u, v in arm]
        ]
    turns = [2 * math.pi * i / 96 for i in range(96)]
    if shape == "heart":
        return [
            (
                math.sin(t) ** 3,
                -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t))
                / 16.5,
            )
            for t in turns
        ]
    return [(math.sin(t), -math.cos(t)) for t in turns]  # circle, ring


def render_mask(
    shape: str | tuple, x: float, y: float, radius: float, size: int = IMAGE_SIZE
) -> np.ndarray:
    """Draw the coverage of one shape centred on (x, y).

    Shapes: [size, size] float32 in 0..1
    Units: px
    """
    big = Image.new("L", (size * SUPERSAMPLE,) * 2, 0)
    draw = ImageDraw.Draw(big)

    def place(scale: float) -> list[tuple[float, float]]:
        return [
            (
                (x + radius * scale * u) * SUPERSAMPLE - 0.5,
                (y + radius * scale * v) * SUPERSAMPLE - 0.5,
            )
            for u, v in _outline(shape)
        ]

    draw.polygon(place(1.0), fill=255)
    if shape == "ring":
        draw.polygon(place(0.52), fill=0)
    small = big.resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, np.float32) / 255


def render(scene: Scene, jitter: Jitter = Jitter()) -> Image.Image:
    """Draw the scene as a 128x128 RGB picture; colours may also be RGB, a shape its corners."""
    row = next((w for w in scene.position.split() if w in ("top", "bottom")), "middle")
    column = next((w for w in scene.position.split() if w in ("left", "right")), "middle")
    mask = render_mask(
        scene.shape,
        IMAGE_SIZE / 2 + OFFSETS_PX[column] + jitter.dx,
        IMAGE_SIZE / 2 + OFFSETS_PX[row] + jitter.dy,
        RADII[scene.size] * jitter.scale,
    )[..., None]
    front = np.add(COLOURS.get(scene.colour, scene.colour), jitter.colour)
    back = np.add(COLOURS.get(scene.background, scene.background), jitter.background)
    pixels = back + (front - back) * mask
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))

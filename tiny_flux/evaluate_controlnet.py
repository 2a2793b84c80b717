"""Does the shape follow the edges? `python -m tiny_flux.evaluate_controlnet`

Held-out scenes (no training of any kind saw their shape, colour and background together) placed
anywhere in any size; the prompt names shape and colours alone, so that without the net the shape
comes out medium and in the centre. The drawn shape is compared with the one whose edges were given.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxControlNetPipeline, FluxPipeline
from PIL import Image

from extras.preprocess import canny

from .checker import read_image
from .controlnet import WEIGHTS, build
from .evaluate import markdown, put_between_markers
from .scenes import COLOURS, Scene, describe, sample_scene
from .sheets import write_sheet
from .train_controlnet import place

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "extras-pipelines.md"
SCALES = (0.0, 0.5, 1.0)
BATCH = 10
SHEET_COLUMNS = 6


def held_out_scenes(count: int, seed: int) -> list[tuple[Scene, Image.Image, np.ndarray]]:
    """Draw held-out scenes with their pictures and the shapes' masks."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        scene = sample_scene(rng, of_held_out=True)
        picture, coverage = place(scene, rng)
        found.append((Scene(scene.shape, scene.colour, scene.background), picture, coverage > 0.5))
    return found


def mask_of(picture: Image.Image, scene: Scene) -> np.ndarray:
    """Find the pixels that are nearer to the shape's colour than to the background's.

    Shapes: [128, 128] bool
    """
    front, back = (np.array(COLOURS[name], float) for name in (scene.colour, scene.background))
    pixels = np.asarray(picture, float) - back
    return pixels @ (front - back) / ((front - back) @ (front - back)) > 0.5


def score(pictures: list[Image.Image], scenes: list) -> dict[str, float]:
    """Compare drawn shapes with those whose edges were given.

    Units: per cent, and px for the distance of the centres (of pictures with a shape)
    """
    overlaps, distances, colours = [], [], []
    for picture, (scene, _, wanted) in zip(pictures, scenes, strict=True):
        drawn = mask_of(picture, scene)
        overlaps.append((drawn & wanted).sum() / (drawn | wanted).sum())
        if drawn.any():
            ours, theirs = (np.argwhere(mask).mean(0) for mask in (drawn, wanted))
            distances.append(float(np.linalg.norm(ours - theirs)))
        reading = read_image(picture)
        told = (scene.colour, scene.background)
        colours.append(
            reading is not None and (reading.scene.colour, reading.scene.background) == told
        )
    return {
        "mean_overlap": round(100 * float(np.mean(overlaps)), 1),
        "overlap_above_70": round(100 * float(np.mean(np.array(overlaps) > 0.7)), 1),
        "centre_off_px": round(float(np.mean(distances)), 1),
        "colours_right": round(100 * float(np.mean(colours)), 1),
    }


def draw(pipe: FluxControlNetPipeline, scenes: list, scale: float, seed: int) -> list[Image.Image]:
    """Draw every scene from its prompt and edges; picture k has its own seed."""
    pictures = []
    for first in range(0, len(scenes), BATCH):
        some = scenes[first : first + BATCH]
        seeds = range(seed + first, seed + first + len(some))
        pictures += pipe(
            [describe(scene) for scene, _, _ in some],
            control_image=[canny(picture) for _, picture, _ in some],
            controlnet_conditioning_scale=scale,
            height=128,
            width=128,
            num_inference_steps=4,
            max_sequence_length=256,
            generator=[torch.Generator("cpu").manual_seed(k) for k in seeds],
        ).images
    return pictures


def table(rows: dict[str, dict]) -> str:
    """Write the rows as a Markdown table."""
    return markdown(
        ["pictures", "mean overlap", "overlap above 70 %", "centre off", "colours right"],
        [
            [
                name,
                f"{row['mean_overlap']} %",
                f"{row['overlap_above_70']} %",
                f"{row['centre_off_px']} px",
                f"{row['colours_right']} %",
            ]
            for name, row in rows.items()
        ],
    )


def main() -> None:
    """Draw with the net at several scales; write the numbers and a sheet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--scenes", type=int, default=24)
    parser.add_argument("--seed", type=int, default=2026, help="of scenes and noise")
    parser.add_argument("--json", type=Path, default=HERE / "evaluation-controlnet.json")
    parser.add_argument("--page", type=Path, default=PAGE, help="whose table is replaced")
    parser.add_argument("--sheet", type=Path, default=HERE / "controlnet.webp")
    args = parser.parse_args()
    base = FluxPipeline.from_pretrained(HERE / "tiny-schnell", dtype=torch.bfloat16)
    pipe = FluxControlNetPipeline.from_pipe(
        base, dtype=torch.bfloat16, controlnet=build(weights=args.weights)
    )
    pipe.set_progress_bar_config(disable=True)
    scenes = held_out_scenes(args.scenes, args.seed)
    about = {"scenes": args.scenes, "seed": args.seed, "steps": 4, "torch": torch.__version__}
    truth = [picture for _, picture, _ in scenes]
    rows, sheet = {"the renderer's own pictures": score(truth, scenes)}, []
    for scale in SCALES:
        pictures = draw(pipe, scenes, scale, args.seed)
        rows[f"scale {scale:g}"] = score(pictures, scenes)
        sheet.append(pictures[:SHEET_COLUMNS])
        print(f"scale {scale:g}: {rows[f'scale {scale:g}']}", flush=True)
    args.json.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    put_between_markers(args.page, table(rows), "controlnet")
    names = ["edges", *(f"scale {scale:g}" for scale in SCALES)]
    texts = [describe(scene) for scene, _, _ in scenes[:SHEET_COLUMNS]]
    write_sheet([[canny(p) for p in truth[:SHEET_COLUMNS]], *sheet], args.sheet, names, texts)


if __name__ == "__main__":
    main()

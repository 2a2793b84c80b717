"""Measure a checkpoint on 200 held-out prompts: `python -m tiny_flux.evaluate --ckpt FOLDER`.

The (shape, colour, background) triples of these prompts were in no training; the automatic
checker reads every picture back. The first row of the table is the renderer's own pictures.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
from PIL import Image

from .checker import ATTRIBUTES, check_image, check_reading, read_image
from .scenes import IMAGE_SIZE, Scene, caption, render, sample_jitter, sample_scene
from .sheets import write_sheet

HERE = Path(__file__).parent
SETTINGS = ((4, 256), (1, 256), (2, 256), (8, 256), (28, 256), (4, 32), (4, 512))
BATCH = 20
SCORES = (*ATTRIBUTES, "all five", "shape at 80 %", "overlap")  # columns of a table


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, default=HERE / "tiny-schnell")
    parser.add_argument("--num_inference_steps", type=int, default=4)
    parser.add_argument("--max_sequence_length", type=int, default=256)
    parser.add_argument("--all", action="store_true", help="all the settings of the README")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026, help="of prompts and noise")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--sheet", type=Path, help="write a sheet of pictures")
    parser.add_argument("--json", type=Path, help="write the numbers")
    parser.add_argument("--readme", type=Path, help="put the table between this file's markers")
    return parser.parse_args(argv)


def held_out_prompts(count: int, seed: int) -> list[tuple[str, Scene]]:
    """Draw prompts, in all wordings, whose triples were never trained on."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng, of_held_out=True) for _ in range(count)]
    return [(caption(scene, rng), scene) for scene in scenes]


def psnr_db(a: Image.Image, b: Image.Image) -> float:
    """Compare two pictures. Units: dB, at most 99"""
    mse = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return float(min(99.0, 10 * np.log10(255**2 / max(mse, 1e-9))))


def mean_psnr_db(pictures: list[Image.Image], others: list[Image.Image]) -> float:
    """Compare pictures pairwise. Units: dB"""
    return float(np.mean([psnr_db(a, b) for a, b in zip(pictures, others, strict=True)]))


def score(pictures: list[Image.Image], scenes: list[Scene]) -> dict:
    """Count right attributes in per cent, with the overlap."""
    readings = [read_image(p) for p in pictures]
    checks = [check_reading(r, s) for r, s in zip(readings, scenes, strict=True)]
    row = {name: 100 * float(np.mean([c[name] for c in checks])) for name in ATTRIBUTES}
    close = [r is not None and r.overlap >= 0.8 for r in readings]
    row["shape_close"] = 100 * float(
        np.mean([c["shape"] and near for c, near in zip(checks, close, strict=True)])
    )
    row["all"] = 100 * float(np.mean([all(c.values()) for c in checks]))
    row["overlap"] = 100 * float(np.mean([r.overlap if r else 0.0 for r in readings]))
    return row


def draw(
    pipe,
    prompts: list[str],
    steps: int,
    length: int,
    seed: int,
    guidance: float = 0.0,
    sources: list[Image.Image] | None = None,
) -> list[Image.Image]:
    """Draw one 128x128 picture per prompt, or edit its source picture with a Kontext pipeline.

    The noise of each depends on the seed and its index.
    """
    import torch

    pictures = []
    for at in range(0, len(prompts), BATCH):
        part = prompts[at : at + BATCH]
        reference = {}
        if sources is not None:
            reference = {"image": sources[at : at + BATCH], "_auto_resize": False}
            reference |= {"max_area": IMAGE_SIZE**2}
        pictures += pipe(
            prompt=part,
            height=IMAGE_SIZE,
            width=IMAGE_SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=length,
            generator=[
                torch.Generator().manual_seed(seed * 100003 + at + i) for i in range(len(part))
            ],
            **reference,
        ).images
    return pictures


def attribute_cells(row: dict) -> list[str]:
    """Write what `score` gave as cells of a table."""
    return [f"{row[name]:.1f} %" for name in (*ATTRIBUTES, "all", "shape_close", "overlap")]


def table(rows: list[dict]) -> str:
    """Write rows as a Markdown table."""
    return markdown(
        ["steps", "text tokens", *SCORES, "other seed", "s/image"],
        [
            [
                str(row["steps"]),
                str(row["tokens"]),
                *attribute_cells(row),
                f"{row['other_seed_db']:.1f} dB",
                f"{row['s_per_image']:.3f}",
            ]
            for row in rows
        ],
    )


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """Write cells as a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def put_between_markers(path: Path, text: str, name: str) -> None:
    """Replace what stands between the markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises: ValueError when the file has no such markers
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def main() -> None:
    """Draw, check and report."""
    args = parse_args()
    import torch
    from diffusers import FluxPipeline

    prompts = held_out_prompts(args.prompts, args.seed)
    texts, scenes = [p for p, _ in prompts], [s for _, s in prompts]
    rng = random.Random(args.seed)
    own, again = ([render(s, sample_jitter(rng)) for s in scenes] for _ in range(2))
    rows = [
        {"steps": "renderer", "tokens": "-", **score(own, scenes)}
        | {"other_seed_db": mean_psnr_db(own, again), "s_per_image": 0.0}
    ]
    pipe = FluxPipeline.from_pretrained(args.ckpt, dtype=getattr(torch, args.dtype))
    pipe.set_progress_bar_config(disable=True)
    for steps, length in (
        SETTINGS if args.all else [(args.num_inference_steps, args.max_sequence_length)]
    ):
        clock = time.perf_counter()
        pictures = draw(pipe, texts, steps, length, args.seed)
        seconds = (time.perf_counter() - clock) / len(texts)
        others = draw(pipe, texts, steps, length, args.seed + 1)
        rows.append(
            {"steps": steps, "tokens": length, **score(pictures, scenes)}
            | {"other_seed_db": mean_psnr_db(pictures, others), "s_per_image": seconds}
        )
        if args.sheet and len(rows) == 2:
            write_sheet([pictures[at : at + 10] for at in range(0, 60, 10)], args.sheet)
            wrong = [
                f"{text!r}: " + ", ".join(name for name, right in check.items() if not right)
                for text, check in zip(texts, map(check_image, pictures, scenes), strict=True)
                if not all(check.values())
            ]
            print("wrong:", *wrong, sep="\n  ")
    print(table(rows))
    if args.readme:
        put_between_markers(args.readme, table(rows), "evaluation")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()

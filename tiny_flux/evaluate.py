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

from .checker import ATTRIBUTES, check_image, read_image
from .scenes import Scene, caption, render, sample_jitter, sample_scene

HERE = Path(__file__).parent
SETTINGS = ((4, 256), (1, 256), (2, 256), (8, 256), (28, 256), (4, 32), (4, 512))
MARKERS = ("<!-- evaluation:begin -->", "<!-- evaluation:end -->")
BATCH = 20


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


def score(pictures: list[Image.Image], scenes: list[Scene], others: list[Image.Image]) -> dict:
    """Count right attributes in per cent, with the overlap and the PSNR of another seed."""
    checks = [check_image(p, s) for p, s in zip(pictures, scenes, strict=True)]
    readings = [read_image(p) for p in pictures]
    row = {name: 100 * float(np.mean([c[name] for c in checks])) for name in ATTRIBUTES}
    close = [r is not None and r.overlap >= 0.8 for r in readings]
    row["shape_close"] = 100 * float(
        np.mean([c["shape"] and near for c, near in zip(checks, close, strict=True)])
    )
    row["all"] = 100 * float(np.mean([all(c.values()) for c in checks]))
    row["overlap"] = 100 * float(np.mean([r.overlap if r else 0.0 for r in readings]))
    row["other_seed_db"] = float(
        np.mean([psnr_db(a, b) for a, b in zip(pictures, others, strict=True)])
    )
    return row


def draw(pipe, prompts: list[str], steps: int, length: int, seed: int) -> list[Image.Image]:
    """Draw one 128x128 picture per prompt; the noise of each depends on the seed and its index."""
    import torch

    pictures = []
    for at in range(0, len(prompts), BATCH):
        part = prompts[at : at + BATCH]
        pictures += pipe(
            part,
            height=128,
            width=128,
            num_inference_steps=steps,
            guidance_scale=0.0,
            max_sequence_length=length,
            generator=[
                torch.Generator().manual_seed(seed * 100003 + at + i) for i in range(len(part))
            ],
        ).images
    return pictures


def table(rows: list[dict]) -> str:
    """Write rows as a Markdown table."""
    head = [
        "steps",
        "text tokens",
        *ATTRIBUTES,
        "all five",
        "shape at 80 %",
        "overlap",
        "other seed",
        "s/image",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row["steps"]), str(row["tokens"])]
        cells += [f"{row[name]:.1f} %" for name in (*ATTRIBUTES, "all", "shape_close", "overlap")]
        cells += [f"{row['other_seed_db']:.1f} dB", f"{row['s_per_image']:.3f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_sheet(pictures: list[Image.Image], path: Path, columns: int = 10) -> None:
    """Paste pictures into one PNG."""
    side = pictures[0].width
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4) + 4, rows * (side + 4) + 4), (128, 128, 128))
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (4 + i % columns * (side + 4), 4 + i // columns * (side + 4)))
    sheet.save(path, optimize=True)


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers of a file.

    Raises: ValueError when the file has no markers
    """
    before, rest = path.read_text().split(MARKERS[0])
    after = rest.split(MARKERS[1])[1]
    path.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{after}")


def main() -> None:
    """Draw, check and report."""
    args = parse_args()
    import torch
    from diffusers import FluxPipeline

    prompts = held_out_prompts(args.prompts, args.seed)
    texts, scenes = [p for p, _ in prompts], [s for _, s in prompts]
    rng = random.Random(args.seed)
    own, again = ([render(s, sample_jitter(rng)) for s in scenes] for _ in range(2))
    rows = [{"steps": "renderer", "tokens": "-", **score(own, scenes, again), "s_per_image": 0.0}]
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
            {"steps": steps, "tokens": length, **score(pictures, scenes, others)}
            | {"s_per_image": seconds}
        )
        if args.sheet and len(rows) == 2:
            write_sheet(pictures[:60], args.sheet)
            wrong = [
                f"{text!r}: " + ", ".join(name for name, right in check.items() if not right)
                for text, check in zip(texts, map(check_image, pictures, scenes), strict=True)
                if not all(check.values())
            ]
            print("wrong:", *wrong, sep="\n  ")
    print(table(rows))
    if args.readme:
        put_between_markers(args.readme, table(rows))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows[-1]))


if __name__ == "__main__":
    main()

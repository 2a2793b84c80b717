"""Measure tiny-dev's drawing and editing: `python -m tiny_flux.evaluate_dev --ckpt FOLDER`.

Drawing: the held-out prompts and the checker of `evaluate`, over guidance, steps and text lengths.
Editing, through the stock FluxKontextPipeline: held-out edits, as many of each taught kind, and the
kinds that were only begun apart from them. An edit is right when the checker reads the target scene
and the rest stayed (see `edits.judge`).
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from .checker import ATTRIBUTES
from .edits import BEGUN, MAX_DRIFT, MAX_SHIFT_PX, TAUGHT, Edit, instruction, judge, sample_edit
from .evaluate import (
    SCORES,
    attribute_cells,
    draw,
    held_out_prompts,
    markdown,
    psnr_db,
    put_between_markers,
    score,
)
from .scenes import render, sample_jitter
from .sheets import write_sheet

HERE = Path(__file__).parent
STEPS, TOKENS = 28, 512
GUIDANCE = 3.5
EDITING = (2.5, 1.0)  # guidance, the default first
DRAWING = (  # steps, guidance, text tokens
    *((STEPS, guidance, TOKENS) for guidance in (1.0, 1.5, 2.5, GUIDANCE, 5.0)),
    *((steps, GUIDANCE, TOKENS) for steps in (8, 14)),
    *((STEPS, GUIDANCE, tokens) for tokens in (32, 128)),
)
ON_SHEET = 10


@dataclass(frozen=True)
class Task:
    """One edit to make, with the only right answer."""

    edit: Edit
    text: str
    source: Image.Image
    ideal: Image.Image
    other: Image.Image  # the right scene with another jitter: as wrong as it can be and look right


def held_out_edits(count: int, seed: int, kinds: tuple[str, ...] = TAUGHT) -> list[Task]:
    """Draw edits that end at triples never trained on, the kinds in turn."""
    rng, tasks = random.Random(seed), []
    for place in range(count):
        edit = sample_edit(rng, True, kinds=(kinds[place % len(kinds)],))
        one, other = sample_jitter(rng), sample_jitter(rng)
        before, after = render(edit.before, one), render(edit.after, one)
        tasks.append(Task(edit, instruction(edit, rng), before, after, render(edit.after, other)))
    return tasks


def score_edits(pictures: list[Image.Image], tasks: list[Task]) -> dict:
    """Count right attributes and right edits in per cent, with drift, shift and PSNR; by kind too.

    Units: levels, px (the median) and dB
    """
    verdicts = [judge(p, t.edit, t.source, t.ideal) for p, t in zip(pictures, tasks, strict=True)]
    psnrs_db = [psnr_db(p, t.ideal) for p, t in zip(pictures, tasks, strict=True)]

    def row_of(places: Sequence[int]) -> dict:
        some = [verdicts[i] for i in places]
        shares = {name: np.mean([v.attributes[name] for v in some]) for name in ATTRIBUTES}
        shares["all"] = np.mean([all(v.attributes.values()) for v in some])
        return {name: 100 * float(share) for name, share in shares.items()} | {
            "drift": float(np.mean([v.drift for v in some])),
            "shift_px": float(np.median([v.shift_px for v in some])),
            "psnr_db": float(np.mean([psnrs_db[i] for i in places])),
            "right": 100 * float(np.mean([v.right for v in some])),
        }

    names = dict.fromkeys(task.edit.kind for task in tasks)
    kinds = {kind: [i for i, t in enumerate(tasks) if t.edit.kind == kind] for kind in names}
    return row_of(range(len(tasks))) | {"kinds": {kind: row_of(at) for kind, at in kinds.items()}}


def through_vae(pipe, pictures: list[Image.Image]) -> list[Image.Image]:
    """Encode and decode pictures, which is the least that any edit does to them."""
    import torch

    done = []
    for picture in pictures:
        pixels = pipe.image_processor.preprocess(picture).to(pipe.vae.dtype)
        with torch.no_grad():
            decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
        done += pipe.image_processor.postprocess(decoded)
    return done


def timed_draw(*call) -> tuple[list[Image.Image], float]:
    """Call `draw`; return the pictures and the seconds for each."""
    clock = time.perf_counter()
    pictures = draw(*call)
    return pictures, (time.perf_counter() - clock) / len(pictures)


def drawing_rows(pipe, count: int, seed: int) -> tuple[list[dict], dict[float, list[Image.Image]]]:
    """Draw held-out prompts in all settings; return scores and the pictures of every guidance."""
    prompts = held_out_prompts(count, seed)
    texts, scenes = [p for p, _ in prompts], [s for _, s in prompts]
    rows, by_guidance = [], {}
    for steps, guidance, tokens in DRAWING:
        pictures, seconds = timed_draw(pipe, texts, steps, tokens, seed, guidance)
        setting = {"steps": steps, "guidance": guidance, "tokens": tokens}
        rows.append({**setting, **score(pictures, scenes), "s_per_image": seconds})
        print(f"{setting}: {rows[-1]['all']:.1f} % right", flush=True)
        if (steps, tokens) == (STEPS, TOKENS):
            by_guidance[guidance] = pictures
    return rows, by_guidance


def editing_rows(
    pipe, tasks: list[Task], seed: int, guidances: tuple[float, ...]
) -> tuple[list[dict], list[Image.Image]]:
    """Judge what must be right, what must be wrong, and what the pipeline makes.

    The pictures returned are those at the first guidance.
    """
    ideal, texts = [t.ideal for t in tasks], [t.text for t in tasks]
    sources = [t.source for t in tasks]
    rows = [
        {"pictures": name, **score_edits(pictures, tasks), "s_per_image": 0.0}
        for name, pictures in {
            "ideal edits": ideal,
            "ideal, through the autoencoder": through_vae(pipe, ideal),
            "ideal, other jitter": [t.other for t in tasks],
            "sources, unedited": sources,
        }.items()
    ]
    edited = {}
    for guidance in guidances:
        call = pipe, texts, STEPS, TOKENS, seed, guidance, sources
        edited[guidance], seconds = timed_draw(*call)
        scores = score_edits(edited[guidance], tasks)
        rows.append({"pictures": f"guidance {guidance:g}", **scores, "s_per_image": seconds})
        print(f"edits at guidance {guidance:g}: {scores['right']:.1f} % right", flush=True)
    return rows, edited[guidances[0]]


def drawing_table(rows: list[dict]) -> str:
    """Write the scores of drawing as a Markdown table."""
    return markdown(
        ["steps", "guidance", "text tokens", *SCORES, "s/image"],
        [
            [
                str(row["steps"]),
                f"{row['guidance']:g}",
                str(row["tokens"]),
                *attribute_cells(row),
                f"{row['s_per_image']:.3f}",
            ]
            for row in rows
        ],
    )


def editing_table(rows: list[dict]) -> str:
    """Write the scores of editing as two Markdown tables; the second is the default by kind."""

    def cells(row: dict) -> list[str]:
        shares = [f"{row[name]:.1f} %" for name in (*ATTRIBUTES, "all")]
        measures = [f"{row['drift']:.1f}", f"{row['shift_px']:.1f} px", f"{row['psnr_db']:.1f} dB"]
        return [*shares, *measures, f"**{row['right']:.1f} %**"]

    head = [*SCORES[: len(ATTRIBUTES) + 1], "drift", "shift", "PSNR", "right edits"]
    default = next(row for row in rows if row["pictures"] == f"guidance {EDITING[0]:g}")
    return "\n\n".join(
        [
            markdown(
                ["pictures", *head, "s/image"],
                [[row["pictures"], *cells(row), f"{row['s_per_image']:.3f}"] for row in rows],
            ),
            markdown(
                [f"kind, at {default['pictures']}", *head],
                [[kind, *cells(row)] for kind, row in default["kinds"].items()],
            ),
        ]
    )


def guidance_sheet(rows: list[dict], by_guidance: dict, texts: list[str], path: Path) -> None:
    """Show the first held-out prompts, a row per guidance with its share of right pictures."""
    default = {"steps": STEPS, "tokens": TOKENS}.items()
    right = {row["guidance"]: row["all"] for row in rows if default <= row.items()}
    write_sheet(
        [pictures[:ON_SHEET] for pictures in by_guidance.values()],
        path,
        [f"guidance {scale:g}\n{right[scale]:.0f} % right" for scale in by_guidance],
        texts[:ON_SHEET],
    )


def edits_sheet(edited: list[Image.Image], tasks: list[Task], path: Path) -> None:
    """Show held-out edits between source and ideal."""
    write_sheet(
        [[t.source for t in tasks], edited[: len(tasks)], [t.ideal for t in tasks]],
        path,
        ["source", "edited", "ideal"],
        [t.text for t in tasks],
    )


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ckpt", type=Path, default=HERE / "tiny-dev")
    parser.add_argument("--count", type=int, default=200, help="prompts, and edits")
    parser.add_argument("--seed", type=int, default=2026, help="of prompts, edits and noise")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--write", type=Path, help="folder for numbers and sheets; tables go into its README.md"
    )
    return parser.parse_args(argv)


def main() -> None:
    """Draw, edit, check and report."""
    args = parse_args()
    import torch
    from diffusers import FluxKontextPipeline, FluxPipeline

    clock, dtype = time.perf_counter(), getattr(torch, args.dtype)
    pipes = [
        kind.from_pretrained(args.ckpt, dtype=dtype) for kind in (FluxPipeline, FluxKontextPipeline)
    ]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    drawing, by_guidance = drawing_rows(pipes[0], args.count, args.seed)
    tasks = held_out_edits(args.count, args.seed)
    editing, edited = editing_rows(pipes[1], tasks, args.seed, EDITING)
    others = held_out_edits(args.count // 2, args.seed, BEGUN)
    begun, edited_others = editing_rows(pipes[1], others, args.seed, EDITING[:1])
    editing[-len(EDITING)]["kinds"] |= begun[-1]["kinds"]
    tables = {"drawing": drawing_table(drawing), "editing": editing_table(editing)}
    print(*tables.values(), sep="\n\n")
    print(f"right: drift at most {MAX_DRIFT:g} levels, shift at most {MAX_SHIFT_PX:g} px")
    if args.write:
        rows = {"drawing": drawing, "editing": editing}
        (args.write / "evaluation-dev.json").write_text(json.dumps(rows, indent=1) + "\n")
        for name, text in tables.items():
            put_between_markers(args.write / "README.md", text, name)
        texts = [text for text, _ in held_out_prompts(args.count, args.seed)]
        guidance_sheet(drawing, by_guidance, texts, args.write / "guidance.webp")
        some = 3 * len(TAUGHT), len(BEGUN)  # of the sheet's columns
        shown = tasks[: some[0]] + others[: some[1]]
        edits_sheet(edited[: some[0]] + edited_others, shown, args.write / "edits.webp")
    print(f"done: {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()

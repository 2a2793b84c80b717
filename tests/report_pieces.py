"""Rows such as the benchmark writes, made up for the tests of what is rendered from them."""

import json
import random
import statistics
from pathlib import Path

import numpy as np
from PIL import Image

STAGE = {
    "flop": 74.4e12,
    "bytes": 24e9,
    "floor_s": 0.075,
    "seconds": 0.1,
    "tflop_per_s": 744.0,
    "mfu": 0.752,
    "time_over_floor": 1.333,
    "bound": "arithmetic",
}


def spread(median: float, n: int = 10, relative: float = 0.01, seed: int = 0) -> dict:
    """Make up timed runs around a median."""
    normal = random.Random(seed).gauss
    samples = [round(median * (1 + relative * normal(0, 1)), 6) for _ in range(n)]
    middle, low, high = statistics.median(samples), min(samples), max(samples)
    return {"median": middle, "min": low, "max": high, "n": n, "samples": samples}


def row(name: str | None = "eager", seconds: float = 1.0, **changes) -> dict:
    """Make up a row of format 2; None as a change takes a key away."""
    full = {
        "format": 2,
        "row": name,
        "series": "ladder" if name else None,
        "position": 0,
        "command": f"python run_benchmark.py --rows '{name}'",
        "environment": {
            "device": "NVIDIA H200",
            "capability": [9, 0],
            "memory_gib": 139.8,
            "os": "Linux",
            "versions": {"python": "3.11.7", "torch": "2.13.0+cu130"},
            "commit": "0123456789ab",
            "driver": "580.1",
            "power_limit_w": 700,
            "clocks_mhz": {"min": 1755, "max": 1980},
        },
        "call": {
            "ckpt": "black-forest-labs/FLUX.1-schnell",
            "random_weights": False,
            "prompt": ["a lighthouse at dawn"],
            "seed": 0,
            "height": 1024,
            "width": 1024,
            "num_inference_steps": 4,
            "guidance_scale": None,
            "max_sequence_length": 256,
            "num_images_per_prompt": 1,
            "dtype": "bfloat16",
        },
        "steps": {
            "fa3": {"state": "on", "settings": {"backend": "fa3", "why": "Hopper"}},
            "quant": {"state": "off", "reason": "--disable_quant"},
        },
        "step_cache": None,
        "lossless": True,
        "load_s": 10.0,
        "optimize_s": 100.0,
        "total_s": spread(seconds),
        "stages_s": {"denoising_step": spread(seconds / 5)},
        "memory_gib": {"weights": 31.4, "allocated_peak": 34.0, "reserved_peak": 36.0},
        "quality": {
            "prompts": 8,
            "images": 8,
            "identical_images": 0,
            "psnr_db_mean": 46.0,
            "psnr_db_worst": 44.0,
            "ssim_mean": 0.999,
            "ssim_worst": 0.9971,
            "latents_relative_l2": 0.006,
            "latents_cosine": 0.9999,
            "other_seed_psnr_db": 9.0,
            "fp32_relative_l2": 0.0055,
            "eager_fp32_relative_l2": 0.005,
            "checker_right": None,
            "reference": "bfloat16 eager",
        },
        "roofline": {"call": STAGE | {"floor_s": 0.3, "seconds": seconds}, "denoising_step": STAGE},
    }
    merged = full | changes
    return {key: value for key, value in merged.items() if changes.get(key, 0) is not None}


def failed_row(name: str, reason: str, **changes) -> dict:
    """Make up a row that failed: what it was, where and why."""
    known = ("format", "row", "series", "position", "command", "environment", "call")
    return {key: row(name)[key] for key in known} | {"failed": reason} | changes


def ladder() -> list[dict]:
    """Make up two series of one machine, not in their order: lossless, lossy and failed rows."""
    loss = {"psnr_db_worst": 24.3, "images": 8, "latents_relative_l2": 0.11}
    out = {"series": "leave_one_out"}
    return [
        row("+ compile", 0.55, position=2),
        row("eager", 1.0, position=0),
        row("+ fa3", 0.8, position=1, roofline=None),
        row("+ quant", 0.35, position=3, lossless=False, quality=loss),
        failed_row("+ export_aoti", "out of memory: 140 GiB", position=4),
        row("everything", 0.35, position=0, lossless=False, **out),
        row("without fa3", 0.45, position=1, lossless=False, **out),
        row("without fused_projections", 0.351, position=2, lossless=False, **out),
    ]


def old_row(seconds: float = 0.05) -> dict:
    """Make up a row of format 1, as the first benchmark wrote it."""
    new = row(None, seconds)
    quality = {"psnr_db_worst": None, "psnr_db_mean": None, "identical_images": 1, "images": 1}
    return {key: new[key] for key in ("environment", "call", "steps", "lossless", "load_s")} | {
        "format": 1,
        "command": "python run_benchmark.py --num_runs 40",
        "optimize_s": 0.5,
        "total_s": spread(seconds, 40),
        "memory_gib": {"host_peak": 0.517},
        "quality": quality | {"latents_relative_l2": 0.0, "reference": "bfloat16 eager"},
    }


def write(file: Path, rows: list) -> Path:
    """Write rows, or lines as they are, to a results file."""
    lines = (line if isinstance(line, str) else json.dumps(line) for line in rows)
    file.write_text("\n".join(lines) + "\n")
    return file


def strip(file: Path, noise: float, side: int = 64, count: int = 3) -> None:
    """Write a strip of equal squares: discs on a gradient, with some noise."""
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:side, :side] / side
    squares = []
    for k in range(count):
        square = np.stack([x, y, np.full_like(x, 0.3 + 0.2 * k)], -1) * 255
        square[(x - 0.5) ** 2 + (y - 0.3 - 0.1 * k) ** 2 < 0.05] = (240, 230, 40)
        squares.append(square + noise * generator.standard_normal(square.shape))
    pixels = np.concatenate(squares, 1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(file, lossless=True)

"""Cheap checks of a command line, before torch is imported: numbers, texts, and files to write."""

import math
import os
import tempfile
from pathlib import Path

from utils.prompts import PER_KIND
from utils.schedulers import TRAINING_TIMESTEPS

MAX_SEQUENCE_LENGTH = 512  # FluxPipeline's limit; T5 itself has none
MAX_EDGE = 16384  # pixels: a million image tokens for a square, beyond any device's memory
ROOM = 32  # bytes around a name: a picture's number, and what a file has while it is written
BOUNDS = (  # flag, least, most
    ("num_inference_steps", 1, TRAINING_TIMESTEPS),
    ("max_sequence_length", 1, MAX_SEQUENCE_LENGTH),
    ("num_images_per_prompt", 1, math.inf),
    ("num_runs", 1, math.inf),
    ("num_warmup", 0, math.inf),
    ("quality_prompts", 1, PER_KIND),
    ("rounds", 1, math.inf),
    ("seed", 0, math.inf),
)


def number_problems(args) -> list[str]:
    """Hold every number of the call against its bounds, one line each."""
    problems = []
    for flag in ("height", "width"):
        value = getattr(args, flag)
        if value is None:
            continue
        if value < 16:
            problems.append(f"--{flag} {value}: expected 16 or more")
        elif value > MAX_EDGE:
            problems.append(f"--{flag} {value}: expected at most {MAX_EDGE}")
        elif value % 16:
            near = max(16, round(value / 16) * 16)
            problems.append(f"--{flag} {value}: not divisible by 16 (nearest: {near})")
    for flag, least, most in BOUNDS:
        value = getattr(args, flag, None)
        if value is not None and value < least:
            problems.append(f"--{flag} {value}: expected {least} or more")
        elif value is not None and value > most:
            problems.append(f"--{flag} {value}: expected at most {most}")
    images = len(args.prompt or (None,)) * max(args.num_images_per_prompt, 1)
    if args.seed + images > 2**63:  # the last image's has to be a --seed, too
        last = f" (of {images} images the last one's)" if images > 1 else ""
        problems.append(f"--seed {args.seed}: expected less than 2**63{last}")
    for prompt in args.prompt or ():
        if not prompt.strip():
            problems.append("--prompt: empty (expected some words)")
    return problems


def path_problems(args) -> list[str]:
    """Look at every file and folder that the run will write, while it costs nothing."""
    problems = []
    for flag in ("output_file", "trace_file", "results", "mask_file", "scales_file", "pictures"):
        value = getattr(args, flag, None)
        if value is None:
            continue
        try:
            if flag == "pictures":
                problem = folder_problem(Path(value))
            else:
                problem = file_problem(Path(value), ROOM + (flag == "output_file") * _ending(args))
        except OSError as error:
            problem = f"cannot be written ({error.strerror})"
        if not problem and flag == "output_file" and Path(value).suffix.lower() != ".png":
            problem = "expected a name ending in .png"
        if problem:
            dashed = flag in ("output_file", "trace_file")
            problems.append(f"--{flag.replace('_', '-') if dashed else flag} {value}: {problem}")
    return problems


def _ending(args) -> int:
    """Bound the bytes that --swap_loras puts into the name of a picture."""
    given = (args.lora or ()) if getattr(args, "swap_loras", False) else ()
    return max((24 + len(os.fsencode(text.rpartition("/")[2])) for text in given), default=0)


def file_problem(path: Path, room: int = ROOM) -> str:
    """Say why a file cannot be written under a temporary name and renamed; "" if it can."""
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    longest = os.pathconf(path.parent, "PC_NAME_MAX") - room
    if (found := len(os.fsencode(path.name))) > longest:
        return f"the name has {found} bytes, expected at most {longest}"
    if path.is_dir():
        return "is a folder (expected a file name)"
    if not _can_write(path.parent):
        return f"the folder {path.parent} cannot be written"
    return ""


def folder_problem(folder: Path) -> str:
    """Look at a folder to write into, or at the nearest one above it, in which it would be made."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        what = "is a file" if there == folder else f"{there} is a file"
        return f"{what} (expected a folder)"
    return "" if _can_write(there) else f"the folder {there} cannot be written"


def _can_write(folder: Path) -> bool:
    """Try it: permission bits do not tell about read-only file systems, nor about root."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False

"""Read what the benchmark wrote: results/<machine>.jsonl, one JSON object per line.

A line is used whole or not at all: what is not JSON, lacks its timings or holds text where a number
belongs is named on stderr with its number and skipped. So nothing later has to doubt a value; it
may only be absent.
"""

import json
import re
import shlex
import sys
from pathlib import Path

from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
FORMATS = (1, 2)
MEMORY = ("weights", "allocated_peak", "reserved_peak", "host_peak")
# Where a run's files go says nothing of what was run: before.jsonl and after.jsonl are compared
FILES = r" --(results|pictures|trace[-_]file)[ =]('[^']*'|\S+)"
OF_LOOP = ("steps", "loop_graph", "settings", "denoising_step")  # "loop/4": no step was timed

# What a value has to be where there is one: a type, a list of it, a mapping ("*": any key). Keys
# that are not listed are nobody's business here.
_SPREAD = {"median": float, "min": float, "max": float, "n": float, "samples": [float]}
_WORK = {"*": float, "bound": str}
_SCORES = (
    "prompts psnr_db_mean psnr_db_worst identical_images images ssim_mean ssim_worst "
    "latents_relative_l2 latents_cosine other_seed_psnr_db fp32_relative_l2 "
    "eager_fp32_relative_l2 checker_right clip_score eager_clip_score"
)
_CALL = "height width num_inference_steps guidance_scale max_sequence_length num_images_per_prompt"
_SHAPE = {
    "row": str,
    "series": str,
    "with": str,
    "base": str,
    "position": float,
    "round": float,
    "failed": str,
    "command": str,
    "lossless": bool,
    "load_s": float,
    "optimize_s": float,
    "total_s": _SPREAD,
    "stages_s": {"*": _SPREAD},
    "memory_gib": dict.fromkeys(MEMORY, float),
    "quality": dict.fromkeys(_SCORES.split(), float) | {"reference": str, "quality_source": str},
    "roofline": {"*": _WORK},
    "pictures": str,
    "reference_pictures": str,
    "environment": {
        "device": str,
        "capability": [float],
        "os": str,
        "commit": str,
        "threads": float,
        "load_average": float,
        "time": str,
        "memory_gib": float,
        "power_limit_w": float,
        "clocks_mhz": {"min": float, "max": float},
        "versions": {"*": str},
        "variables": {"*": str},
    },
    "call": dict.fromkeys(_CALL.split(), float)
    | {"ckpt": str, "prompt": [str], "random_weights": bool, "dtype": str},
    "steps": {"*": {"state": str, "reason": str, "settings": {}}},
}
_NAMES = {float: "a number", str: "text", bool: "true or false"}


def problem(row: object) -> str:
    """Say why a row cannot be used; "" if nothing is wrong."""
    if not isinstance(row, dict):
        return f"found {type(row).__name__}, expected an object"
    if row.get("format") not in FORMATS or isinstance(row["format"], bool):
        return f"format: found {row.get('format')!r}, expected one of {FORMATS}"
    if found := _misfit(row, _SHAPE, ""):
        return found
    missing = [k for k in ("median", "min", "max", "n") if get(row, "total_s", k) is None]
    if missing and not row.get("failed"):
        return f"total_s: found no {', '.join(missing)}, and the row is not marked as failed"
    times = [] if missing else [row["total_s"]["min"], *samples(row)]
    return (
        "" if all(s > 0 for s in times) else f"total_s: found {min(times)} s, expected more than 0"
    )


def _misfit(value: object, shape: object, where: str) -> str:
    """Name the first value that is not of its shape, by its path."""
    if value is None:
        return ""
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return f"{where}: found {type(value).__name__}, expected an object"
        parts = ((k, v, shape.get(k, shape.get("*"))) for k, v in value.items())
        found = (_misfit(v, s, f"{where}.{k}".strip(".")) for k, v, s in parts if s is not None)
        return next(filter(None, found), "")
    if isinstance(shape, list):
        if not isinstance(value, list):
            return f"{where}: found {type(value).__name__}, expected a list"
        if None in value:
            return f"{where}: found null in a list"
        return next(filter(None, (_misfit(v, shape[0], where) for v in value)), "")
    if shape is float:  # bool is an int, NaN compares with nothing, 10**400 is no float
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and abs(value) < 1e300
    else:
        fits = isinstance(value, shape)
    return "" if fits else f"{where}: found {str(value)[:40]!r}, expected {_NAMES[shape]}"


def read(file: str | Path, flag: str = "") -> list[dict]:
    """Read every row of the file that a flag names; a damaged line is named and skipped.

    Raises: UserError if the file cannot be read, or none of its lines begins an object.
    """
    try:
        lines = Path(file).read_bytes().split(b"\n")
    except OSError as error:
        raise UserError(f"{flag} {file}: {error.strerror}".strip()) from None
    begun = [line.lstrip().startswith(b"{") for line in lines if line.strip()]
    if begun and not any(begun):
        expected = "no JSON lines (expected what --results writes)"
        raise UserError(f"{flag} {file}: {expected}".strip())
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode())
            wrong = problem(row)
        except UnicodeDecodeError:
            wrong = "not UTF-8"
        except (ValueError, RecursionError) as error:
            wrong = f"not JSON ({error})"
        if wrong:
            print(f"{file}:{number}: skipped: {' '.join(wrong.split())[:200]}", file=sys.stderr)
        else:
            rows.append(row)
    return rows


def get(row: dict, *keys: str):
    """Follow keys into a row; None where the path ends early."""
    for key in keys:
        row = row.get(key) if isinstance(row, dict) else None
    return row


def name(row: dict) -> str:
    """Name a row: its own short name, or, for a single run, its command but for its files."""
    command = (row.get("command") or "?").removeprefix("python ")
    return row.get("row") or re.sub(FILES, "", command)


def flags(row: dict) -> dict[str, str]:
    """Give the flags of a row's command but for its files, each spelled with _, with its values."""
    found, flag = {}, None
    command = re.sub(FILES, "", row.get("command") or "")
    try:
        words = shlex.split(command)
    except ValueError:  # written by hand
        words = command.split()
    for word in words:
        if word.startswith("--"):
            flag, _, value = word.partition("=")
            flag = "--" + flag[2:].replace("-", "_")
            found.setdefault(flag, []).extend([value] if value else [])
        elif flag:
            found[flag].append(word)
    return {flag: " ".join(values) or "given" for flag, values in found.items()}


def variables(row: dict) -> dict[str, str]:
    """Give the variables of the environment that decided the row beside its flags."""
    return get(row, "environment", "variables") or {}


SESSION = {  # what rows have to share to be divided -> in the plural
    "commit": "commits",
    "threads": "numbers of threads",
    "variables": "variables of the environment",
}


def apart(a: dict, b: dict) -> list[str]:
    """List what two rows, where both tell, do not share of a session."""
    pairs = {key: [get(row, "environment", key) for row in (a, b)] for key in SESSION}
    return [key for key, pair in pairs.items() if None not in pair and pair[0] != pair[1]]


def is_same_session(a: dict, b: dict) -> bool:
    """Whether two rows may be divided: of one commit, which both have to tell, and not apart."""
    commits = [get(row, "environment", "commit") for row in (a, b)]
    return commits[0] == commits[1] and not apart(a, b)


def samples(row: dict) -> list[float]:
    """List the timed runs. Units: seconds."""
    return get(row, "total_s", "samples") or []


def distinct(rows: list[dict] | tuple[dict, ...], *keys: str) -> list:
    """List the different values at a path, in the order of the rows, without the absent ones."""
    found = []
    for row in rows:
        value = get(row, *keys)
        if value is not None and value not in found:
            found.append(value)
    return found


def where(rows: list[dict]) -> str:
    """Name the machine, torch and the commits that rows were measured with."""
    torch, commits = (
        ", ".join(distinct(rows, "environment", *keys)) or "?"
        for keys in (("versions", "torch"), ("commit",))
    )
    return f"{device(rows)}, torch {torch}, commit {commits}"


def device(rows: list[dict]) -> str:
    """Name the machine that rows were measured on."""
    return "; ".join(distinct(rows, "environment", "device")) or "unknown machine"

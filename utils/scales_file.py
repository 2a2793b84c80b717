"""Static activation scales in a file: the largest input of each Linear that takes one.

`python -m utils.calibrate_scales` writes it, `--static_scales FILE.json` reads it. What an input
reaches belongs to the weights, so the file is refused for any others.
"""

import json
import math
from dataclasses import asdict, dataclass, field

from utils.mask_file import read_json

FORMAT = 1


@dataclass(frozen=True)
class ScalesFile:
    """What a calibration found, and what it holds for."""

    largest: dict[str, float]  # Linear -> the largest magnitude of its input
    checkpoint: str
    identity: str
    weights: dict  # what else makes them: brought_weights()
    command: str = ""
    prompts: list[str] = field(default_factory=list)
    environment: dict = field(default_factory=dict)


def brought_weights(args) -> dict:
    """Name the LoRAs and the GGUF of a run, once their own steps have been asked."""
    from utils.steps import gguf

    loras = [str(lora) for lora in getattr(args, "loras", ())] if args.lora else []
    return {"lora": loras, "gguf": gguf.identity(args) if args.gguf_file else ""}


def dump(found: ScalesFile) -> bytes:
    """Write it as JSON."""
    return (
        json.dumps({"format": FORMAT} | asdict(found), indent=2, ensure_ascii=False) + "\n"
    ).encode()


def load(path: str) -> ScalesFile:
    """Read a file and check its values.

    Raises: ValueError in one line for a file that is not one, or is damaged.
    """
    found = read_json(path, "utils.calibrate_scales", FORMAT, "largest")
    try:
        read = ScalesFile(**found)
    except TypeError as error:
        raise ValueError(f"damaged ({error})") from None
    kinds = (read.largest, dict), (read.weights, dict), (read.checkpoint, str), (read.identity, str)
    if not all(isinstance(value, kind) for value, kind in kinds) or not read.largest:
        raise ValueError("damaged (largest, weights, checkpoint or identity is of another kind)")
    for name, value in read.largest.items():
        if not isinstance(value, float) or not (0 < value < math.inf):
            raise ValueError(f"damaged (largest of {name}: found {value!r}, expected above 0)")
    return read


def problem(found: ScalesFile, args) -> str:
    """Say for what else it was calibrated; "" if it holds for this run.

    `args`: a run whose call is settled (utils/prepare.py)
    """
    if found.identity != args.checkpoint.identity(args.cache_dir):
        return f"calibrated for other weights, those of {found.checkpoint} (--ckpt)"
    for kind, used in brought_weights(args).items():
        if (then := found.weights.get(kind)) != used:
            flag = {"lora": "--lora", "gguf": "--gguf_file"}[kind]
            return f"calibrated with {then or 'none'}, found {used or 'none'} ({flag})"
    return ""

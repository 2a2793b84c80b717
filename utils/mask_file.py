"""A calibrated step mask in a file: which steps are computed, and what predicts each of the others.

`python -m utils.calibrate` writes it, `--step_mask FILE.json` reads it. The weights of its
predictions belong to the checkpoint, the number of steps and the picture's area (which decides how
the steps are spaced), so it is refused for any other.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

FORMAT = 1
SUFFIX = ".json"
MOST = 1000  # of a weight; calibrated ones are of order one, and 1e30 makes a black picture


@dataclass(frozen=True)
class MaskFile:
    """What a calibration found, and what it holds for."""

    mask: str  # 1 is computed, 0 predicted
    weights: dict[int, tuple[float, ...]]  # predicted step -> of the last computed, in order
    latents_error: float  # of the calibration's own pictures, relative (L2)
    checkpoint: str
    identity: str
    pixels: int
    guidance: float | None
    command: str = ""
    prompts: list[str] = field(default_factory=list)
    environment: dict = field(default_factory=dict)

    @property
    def order(self) -> int:
        """How many computed steps a prediction reaches back, less one."""
        return max(map(len, self.weights.values()), default=1) - 1


def is_file(text: str | None) -> bool:
    """Tell a file's name from a mask that is written out."""
    return bool(text) and text.lower().endswith(SUFFIX)


def dump(found: MaskFile) -> bytes:
    """Write it as JSON, a line a prediction."""
    named = asdict(found)
    lines = ",\n".join(f'    "{step}": {json.dumps(w)}' for step, w in named.pop("weights").items())
    rest = json.dumps({"format": FORMAT} | named, indent=2, ensure_ascii=False)
    return f'{rest[:-2]},\n  "weights": {{\n{lines}\n  }}\n}}\n'.encode()


def read_json(path: str, module: str, form: int, field: str) -> dict:
    """Read what a module of a calibration has written; its format is checked and left out.

    Raises: ValueError in one line for any other file.
    """
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be read ({error})") from None
    if not isinstance(found, dict) or found.pop("format", None) != form or field not in found:
        raise ValueError(f"expected a file of python -m {module}, format {form}")
    return found


def load(path: str) -> MaskFile:
    """Read a file and check that mask and weights belong together.

    Raises: ValueError in one line for a file that is not one, or is damaged.
    """
    found = read_json(path, "utils.calibrate", FORMAT, "mask")
    try:
        weights = {int(step): tuple(map(float, w)) for step, w in found.pop("weights").items()}
        read = MaskFile(weights=weights, **found)
        predicted = [step for step, computed in enumerate(read.mask) if computed == "0"]
        whole = sorted(weights) == predicted and all(
            0 < len(w) <= read.mask[:step].count("1") for step, w in weights.items()
        )
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"damaged ({error})") from None
    numbers = (read.latents_error, read.pixels, 0.0 if read.guidance is None else read.guidance)
    if not all(isinstance(n, int | float) and not isinstance(n, bool) for n in numbers):
        raise ValueError("damaged (latents_error, pixels or guidance is no number)")
    if not isinstance(read.checkpoint, str) or not isinstance(read.identity, str):
        raise ValueError("damaged (checkpoint or identity is no text)")
    if not whole or not isinstance(read.mask, str) or set(read.mask) - {"0", "1"}:
        raise ValueError("damaged (its weights are not those of its mask)")
    if not all(abs(one) <= MOST for w in weights.values() for one in w):
        raise ValueError(f"damaged (a weight beyond {MOST}, or not finite)")
    return read


def problem(found: MaskFile, args) -> str:
    """Say for what else it was calibrated; "" if it holds for this run.

    `args`: a run whose call is settled (utils/prepare.py)
    """
    steps, pixels = args.num_inference_steps, args.height * args.width
    if len(found.mask) != steps:
        return f"calibrated for {len(found.mask)} steps, found {steps} (--num_inference_steps)"
    if found.pixels != pixels:
        return (
            f"calibrated for {found.pixels} pixels, which decide how the steps are spaced, found "
            f"{args.width}x{args.height} (--width, --height)"
        )
    if found.identity != args.checkpoint.identity(args.cache_dir):
        return f"calibrated for other weights, those of {found.checkpoint} (--ckpt)"
    return ""

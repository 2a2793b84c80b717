"""Write pictures that say how they were made, and strips that results point to."""

import hashlib
import json
from pathlib import Path

from PIL import Image

from utils import card
from utils.artifacts import replacing
from utils.errors import UserError
from utils.progress import say

STRIP_EDGE = 256  # pixels of one picture in a strip


def save_images(images: list, args, step_cache: dict | None = None, ending: str = "") -> list[Path]:
    """Write PNGs with how they were made in their metadata; several are numbered from 0.

    `step_cache` tells which steps were computed and which reused (`reused_steps`); `ending` is put
    behind the name, and is the name of the LoRA that was swapped in. Of a picture in one colour,
    which is what becomes of NaN, a line is said on stderr.
    """
    target = Path(args.output_file)
    target = target.with_name(f"{target.stem}{ending}{target.suffix}")
    written = []
    for k, image in enumerate(images):
        path = target if len(images) == 1 else target.with_name(f"{target.stem}_{k}{target.suffix}")
        with replacing(path) as new:
            image.save(new, format="PNG", pnginfo=_metadata(args, k, step_cache, ending))
        if all(low == high for low, high in image.getextrema()):
            cure = f"python -m extras.doctor --explain-error {path}"
            say("picture", f"{path} is constant (black?), as NaN would be: {cure}")
        written.append(path)
    return written


def write_strip(images: list, folder: Path) -> str:
    """Write pictures side by side, at most 256 pixels each, without loss.

    Returns: the file's name, a digest of the pixels; equal pictures share one file.
    Raises: UserError if the folder cannot be written.
    """
    small = [image.copy() for image in images]
    for image in small:
        image.thumbnail((STRIP_EDGE, STRIP_EDGE), Image.Resampling.LANCZOS)
    strip = Image.new("RGB", (sum(i.width for i in small), max(i.height for i in small)))
    left = 0
    for image in small:
        strip.paste(image, (left, 0))
        left += image.width
    digest = hashlib.sha256(strip.tobytes()).hexdigest()[:12]
    path = folder / f"{digest}.webp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            strip.save(new, format="WEBP", lossless=True, quality=100, method=6)
    except OSError as error:
        raise UserError(f"--pictures {folder}: cannot be written ({error.strerror})") from None
    return path.name


def _metadata(args, k: int, step_cache: dict | None, ending: str):
    """Describe image k: enough to make it again."""
    from PIL.PngImagePlugin import PngInfo

    about = card.call(args) | {
        "prompt": args.prompt[k // args.num_images_per_prompt],
        "seed": args.seed + k,
        "num_images_per_prompt": 1,
    }
    if "negative_prompt" in about:  # one for each prompt of the batch
        about["negative_prompt"] = [args.negative_prompt]
    info = PngInfo()
    info.add_itxt("prompt", about["prompt"])
    info.add_text("seed", str(about["seed"]))
    info.add_text("checkpoint", args.ckpt)
    info.add_itxt("call", json.dumps(about, ensure_ascii=False))
    info.add_text("steps", json.dumps(card.plan_as_dict(args)))
    info.add_text("versions", json.dumps(card.versions()))
    if ending:
        info.add_itxt("swapped LoRA", ending.removeprefix("_"))
    if step_cache is not None:
        info.add_text("step cache", json.dumps(step_cache))
    if args.random_weights:
        info.add_text("note", "random weights: the picture means nothing")
    return info

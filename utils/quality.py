"""How far a run's pictures and latents are from the reference: the same prompts and seeds.

PSNR and SSIM look at pictures, the relative error and the cosine at the final latents. What a
number means depends on how much pictures differ anyway, so each row also tells the PSNR of another
seed, and for latents the error of bf16 eager itself against fp32 (utils/reference.py).
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

from utils.checkpoints import hub_file
from utils.errors import UserError
from utils.prompts import count_images

LOSSLESS_FACTOR = 1.25  # a lossless row's error against fp32, at most, over bf16 eager's own


@dataclass(frozen=True)
class Result:
    """What one or more calls of the pipeline made."""

    images: list  # PIL
    latents: object  # torch.Tensor (B, latent channels, height, width), on the CPU, float32


def run(pipeline, args, prompts: list[str] | None = None) -> Result:
    """Generate the run's own images, or those of other prompts, with their final latents.

    Other prompts go through in calls of the run's own batch size, so that nothing is compiled for
    them; the last call is filled up from the start. Image k is seeded with seed + k.

    Raises: RuntimeError for NaN or constant results: speed of a broken run is no result.
    """
    if prompts is None:
        return _run_once(pipeline, args)
    import torch

    batch, parts = count_images(args), []
    for at in range(0, len(prompts), batch):
        part = copy.copy(args)
        part.prompt = [prompts[(at + i) % len(prompts)] for i in range(batch)]
        part.num_images_per_prompt, part.seed = 1, args.seed + at
        parts.append(_run_once(pipeline, part))
    images = [image for part in parts for image in part.images]
    latents = torch.cat([part.latents for part in parts])
    return Result(images[: len(prompts)], latents[: len(prompts)])


def _run_once(pipeline, args) -> Result:
    from utils.pipeline_utils import generate

    kept = {}
    decode = pipeline.vae.decode

    def keeping(z, *positional, **named):
        kept["latents"] = z.detach()
        return decode(z, *positional, **named)

    pipeline.vae.decode = keeping
    try:
        images = generate(pipeline, args)
    finally:
        pipeline.vae.decode = decode
    result = Result(images, kept["latents"].float().cpu())
    check_sane(result)
    return result


def check_sane(result: Result) -> None:
    """Refuse NaN latents and black or constant pictures.

    Raises: RuntimeError naming the image.
    """
    import numpy as np

    if not bool(result.latents.isfinite().all()):
        raise RuntimeError("the final latents are not finite (NaN or Inf)")
    for k, image in enumerate(result.images):
        if np.asarray(image).std() < 1:
            raise RuntimeError(f"image {k} is constant (black?)")


def psnr_db(image, reference) -> float:
    """Give the peak signal-to-noise ratio of two pictures; infinity when they are equal.

    Shapes: PIL images or uint8 arrays (H, W, 3), equal sizes. Units: dB.
    """
    import numpy as np

    a, b = (np.asarray(x, dtype=np.float64) for x in (image, reference))
    if a.shape != b.shape:  # numpy would stretch some of them
        raise ValueError(f"pictures differ in shape: {a.shape} and {b.shape}")
    error = np.mean((a - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(image, reference) -> float:
    """Give the structural similarity of two pictures, 1 when they are equal.

    Shapes: PIL images of equal sizes, 16 pixels or more.
    Source: Wang et al. 2004, doi:10.1109/TIP.2003.819861; torchmetrics' Gaussian window of 11
    """
    import numpy as np
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    a, b = (
        torch.from_numpy(np.array(x, dtype=np.float32)).permute(2, 0, 1)[None]
        for x in (image, reference)
    )
    return float(structural_similarity_index_measure(a, b, data_range=255.0))


def check_clip(clip: str) -> None:
    """Look for a CLIP's config, in a folder or with one request to the hub.

    Raises: UserError without one; its weights are seen when they are loaded.
    """
    if not Path(clip).is_dir():
        hub_file(clip, "config.json", "--clip_score", "name a folder that holds one")
    elif not (Path(clip) / "config.json").is_file():
        raise UserError(f"--clip_score {clip}: found no config.json, expected a CLIP's folder")


def clip_score(images: list, prompts: list[str], clip: str) -> float:
    """Give 100 times the cosine between pictures and prompts as a CLIP sees them, on average.

    Raises: UserError if `clip` is no CLIP in transformers' layout that can be had here.
    Source: Hessel et al. 2021, arXiv:2104.08718
    """
    import torch
    from transformers import CLIPModel, CLIPProcessor

    try:
        model, processor = CLIPModel.from_pretrained(clip), CLIPProcessor.from_pretrained(clip)
    except (OSError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--clip_score {clip}: no CLIP that can be loaded ({why})") from None
    inputs = processor(
        text=prompts, images=images, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        seen = model.eval()(**inputs)
    return round(100 * float((seen.image_embeds * seen.text_embeds).sum(-1).mean()), 3)


def relative_l2(value, reference) -> float:
    """Give the norm of the difference over the norm of the reference."""
    return float((value - reference).norm() / reference.norm())


def cosine(value, reference) -> float:
    """Give the cosine of the angle between two tensors."""
    a, b = value.double().flatten(), reference.double().flatten()
    return float(a @ b / (a.norm() * b.norm()))


def mean_psnr_db(images: list, references: list) -> float | None:
    """Average over the pictures that differ; None when none does (JSON has no infinity)."""
    values = [psnr_db(a, b) for a, b in zip(images, references, strict=True)]
    finite = [value for value in values if math.isfinite(value)]
    return round(sum(finite) / len(finite), 2) if finite else None


def compare(result: Result, reference: Result) -> dict:
    """Summarise the distance from the reference: pictures by PSNR and SSIM, latents by error.

    PSNR is None (JSON has no infinity) where every picture is equal to its reference.
    """
    pairs = list(zip(result.images, reference.images, strict=True))
    values = [psnr_db(a, b) for a, b in pairs]
    finite = [value for value in values if math.isfinite(value)]
    similar = [ssim(a, b) for a, b in pairs]
    return {
        "psnr_db_mean": mean_psnr_db(result.images, reference.images),
        "psnr_db_worst": round(min(finite), 2) if finite else None,
        "identical_images": len(values) - len(finite),
        "images": len(values),
        "ssim_mean": round(sum(similar) / len(similar), 5),
        "ssim_worst": round(min(similar), 5),
        "latents_relative_l2": relative_l2(result.latents, reference.latents),
        "latents_cosine": cosine(result.latents, reference.latents),
    }


def lossless_problem(scores: dict) -> str:
    """Say how a row that calls itself lossless is not; "" if it is, or fp32 was not measured."""
    found, eager = scores.get("fp32_relative_l2"), scores.get("eager_fp32_relative_l2")
    if found is None or eager is None or found <= LOSSLESS_FACTOR * eager:
        return ""
    return (
        f"called lossless, but its latents are {found:.2e} from fp32, expected at most "
        f"{LOSSLESS_FACTOR} times bf16 eager's own {eager:.2e}"
    )

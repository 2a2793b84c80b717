"""How far a run's pictures and latents are from the reference: bf16 eager, the same seeds."""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Result:
    """What one run of the pipeline made."""

    images: list  # PIL
    latents: object  # torch.Tensor (B, image tokens, 64), on the CPU, float32


def run(pipeline, args) -> Result:
    """Generate once and keep the final latents beside the images.

    Raises: RuntimeError for NaN or constant results: speed of a broken run is no result.
    """
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
    if not bool(result.latents.isfinite().all()):
        raise RuntimeError("the final latents are not finite (NaN or Inf)")
    for k, image in enumerate(result.images):
        if np.asarray(image).std() < 1:
            raise RuntimeError(f"image {k} is constant (black?)")


def psnr_db(image, reference) -> float:
    """Give the peak signal-to-noise ratio of two pictures; infinity when they are equal.

    Shapes: PIL images or uint8 arrays (H, W, 3), equal sizes. Units: dB.
    """
    a, b = (np.asarray(x, dtype=np.float64) for x in (image, reference))
    if a.shape != b.shape:
        raise ValueError(f"pictures differ in shape: {a.shape} and {b.shape}")
    error = np.mean((a - b) ** 2)
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def relative_l2(value, reference) -> float:
    """Give the norm of the difference over the norm of the reference."""
    return float((value - reference).norm() / reference.norm())


def compare(result: Result, reference: Result) -> dict:
    """Summarise the distance from the reference: worst and mean PSNR, relative error of latents.

    PSNR is None (JSON has no infinity) where every picture is equal to its reference.
    """
    values = [psnr_db(a, b) for a, b in zip(result.images, reference.images, strict=True)]
    finite = [value for value in values if math.isfinite(value)]
    return {
        "psnr_db_mean": round(sum(finite) / len(finite), 2) if finite else None,
        "psnr_db_worst": round(min(finite), 2) if finite else None,
        "identical_images": len(values) - len(finite),
        "images": len(values),
        "latents_relative_l2": relative_l2(result.latents, reference.latents),
    }

"""What the tests of the derived pipelines share: a picture, plain diffusers, distances."""

import functools

import numpy as np
import torch

from tiny_flux.scenes import parse, render

PROMPT = "a red circle on a blue background"
OFF = (
    *("--device", "cpu", "--ckpt", "tiny-schnell", "--prompt", PROMPT),
    *("--disable_fused_projections", "--disable_fa3", "--disable_channels_last"),
)
ON = OFF[:6]


@functools.cache
def plain():
    """Give tiny-schnell's FluxPipeline as diffusers loads it."""
    import diffusers

    pipe = diffusers.FluxPipeline.from_pretrained("tiny_flux/tiny-schnell", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def by_diffusers(name: str, components: dict | None = None, seeds=(0,), **call) -> list:
    """Make pictures with diffusers' own pipeline of that name over the plain components."""
    import diffusers

    pipe = getattr(diffusers, name).from_pipe(plain(), dtype=torch.bfloat16, **(components or {}))
    pipe.set_progress_bar_config(disable=True)
    usual = {"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 256}
    call = usual | {"prompt": PROMPT} | call
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return pipe(generator=generators, **call).images


def by_us(command, *flags: str) -> list:
    """Make pictures as an extras command does, without writing them."""
    from utils.pipeline_utils import generate, optimize

    args = command.parse(list(flags))
    pipeline, _ = command.load(args)
    return generate(optimize(pipeline, args), args)


def draw(path, caption: str = PROMPT, size: int = 128) -> str:
    """Write the picture of a caption; give its path."""
    render(parse(caption)).resize((size, size)).save(path)
    return str(path)


def psnr_db(a, b) -> float:
    """Compare two pictures. Units: dB, 99 for equal ones"""
    a, b = (np.asarray(picture, np.float64) for picture in (a, b))
    error = np.mean((a - b) ** 2)
    return 99.0 if error == 0 else float(10 * np.log10(255**2 / error))

"""Finish the decoder on the flow's own latents, so that its small errors decode to crisp edges.

A training picture's latents are noised to one of the sampler's levels and brought back by the
trained transformer in the sampler's remaining steps. Picture and latents still belong together,
and the latents carry the errors the decoder will really meet. Nothing but the decoder changes.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from .models import save_bf16
from .parallel import Average, Optimiser, launch, learning_rate_factor
from .scenes import caption, render, sample_jitter, sample_scene
from .train_flow import SAMPLER_SIGMAS, TextEncoder, predict
from .train_vae import picture_loss, to_tensor

BATCH = 8  # per process
TEXT_LENGTH = 24


@torch.no_grad()
def redraw(pipe: FluxPipeline, x0: torch.Tensor, captions: list[str], first: int) -> torch.Tensor:
    """Noise latents to the sampler's level number `first` and sample them back.

    Shapes: x0 and result [B, 64 tokens, 64] float32
    """
    if first == len(SAMPLER_SIGMAS):
        return x0
    encode = TextEncoder(pipe)
    text = encode.pooled(captions), encode.tokens(captions, TEXT_LENGTH)
    levels = [*SAMPLER_SIGMAS, 0.0]
    x = x0 + levels[first] * (torch.randn_like(x0) - x0)
    for now, then in zip(levels[first:], levels[first + 1 :], strict=False):
        x = x + (then - now) * predict(pipe.transformer, x, torch.full((len(x),), now), *text)
    return x


def _work(rank: int, procs: int, folder: str, seed: int, steps: int, lr: float) -> None:
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    for part in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2, pipe.vae.encoder):
        part.requires_grad_(False)
    vae, config = pipe.vae, pipe.vae.config
    optimiser = Optimiser(
        vae.decoder.named_parameters(), lr=lr, muon_lr=lr, use_muon=lambda name, p: p.ndim == 4
    )
    average = Average(vae.decoder.parameters(), 0.99)
    rng = random.Random(seed * 1000 + 700 + rank)
    torch.manual_seed(seed * 1000 + 700 + rank)
    clock, losses, errors = time.perf_counter(), [], []
    for step in range(steps):
        scenes = [sample_scene(rng) for _ in range(2 * BATCH)]
        scenes = sorted(scenes, key=lambda scene: scene.size != "small")[:BATCH]
        pictures = to_tensor([render(scene, sample_jitter(rng)) for scene in scenes])
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(pictures).latent_dist.mean.float()
                shape = latents.shape
                latents = (latents - config.shift_factor) * config.scaling_factor
                packed = FluxPipeline._pack_latents(latents, *shape)
                first = rng.randint(1, len(SAMPLER_SIGMAS))
                packed = redraw(pipe, packed, [caption(s, rng) for s in scenes], first)
                latents = FluxPipeline._unpack_latents(packed, *pictures.shape[2:], 8)
                latents = latents / config.scaling_factor + config.shift_factor
            made = vae.decode(latents).sample
        loss = picture_loss(made.float(), pictures)
        loss.backward()
        optimiser.step(learning_rate_factor(step, steps, warmup=20, decay=0.7))
        average.update()
        losses.append(loss.item())
        errors.append(F.mse_loss(made.float(), pictures).item())
        if rank == 0 and step % 50 == 49:
            psnr_db = -10 * np.log10(np.mean(errors) / 4)
            seconds = (time.perf_counter() - clock) / len(losses)
            print(
                f"decoder {step + 1}/{steps} loss {np.mean(losses):.4f} "
                f"psnr {psnr_db:.2f} dB {seconds:.3f} s/step",
                flush=True,
            )
            clock, losses, errors = time.perf_counter(), [], []
    average.swap()
    if rank == 0:
        save_bf16(pipe, Path(folder))


def train_decoder(folder: Path, procs: int, seed: int, steps: int, lr: float = 1e-3) -> None:
    """Finish the decoder of the pipeline in `folder`, in place."""
    launch(_work, procs, str(folder), seed, steps, lr)

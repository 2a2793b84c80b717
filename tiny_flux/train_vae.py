"""Train the autoencoder: 8x smaller, 16 channels, smooth latents, crisp edges.

Phase 1 trains encoder and decoder on full pictures with noise on the latents, which keeps the
latent space smooth and the decoder tolerant of the flow's errors. Phase 2 freezes the encoder and
sharpens the decoder alone. The latents' statistics become scaling_factor and shift_factor.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from .models import build_vae
from .parallel import Average, Optimiser, launch, learning_rate_factor
from .scenes import render, sample_jitter, sample_scene

LATENT_NOISE = 0.1  # what the posterior's deviation is taught to be
NOISE = {False: 0.3, True: 0.2}  # largest noise on latents (deviation 0.54) while training
BATCH = 8


def to_tensor(pictures: list) -> torch.Tensor:
    """Stack PIL pictures. Shapes: [B, 3, H, W] float32 in -1..1"""
    array = np.stack([np.asarray(p) for p in pictures])
    return torch.from_numpy(array).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def _batch(rng: random.Random) -> torch.Tensor:
    return to_tensor([render(sample_scene(rng), sample_jitter(rng)) for _ in range(BATCH)])


def _edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def picture_loss(made: torch.Tensor, true: torch.Tensor) -> torch.Tensor:
    """Weigh pixels by L1 and L2 and their differences by L1, so that edges stay crisp."""
    edges = sum((a - b).abs().mean() for a, b in zip(_edges(made), _edges(true), strict=True))
    return (made - true).abs().mean() + 2 * F.mse_loss(made, true) + 0.5 * edges


def _psnr(mse: float) -> float:
    return float(-10 * np.log10(mse / 4))  # pictures span 2


def _save(
    path: Path, step: int, vae: AutoencoderKL, optimiser: Optimiser, average: Average
) -> None:
    state = {"step": step, "vae": vae.state_dict(), "optimiser": optimiser.state_dict()}
    torch.save(state | {"average": average.shadow}, path)


def _work(rank: int, procs: int, out: str, seed: int, steps: int, finish_steps: int) -> None:
    torch.manual_seed(seed)
    vae = build_vae()
    rng = random.Random(seed * 1000 + rank)
    torch.manual_seed(seed * 1000 + rank)
    checkpoint = Path(out).with_suffix(".pt")
    begin, state = 0, None
    if checkpoint.exists():
        state = torch.load(checkpoint)
        begin = state["step"]
        vae.load_state_dict(state["vae"])
        rng.seed(seed * 1000 + rank + begin)
    for first, count, decoder_only in ((0, steps, False), (steps, finish_steps, True)):
        if begin >= first + count:
            continue
        if decoder_only:
            vae.encoder.requires_grad_(False)
        optimiser = Optimiser(
            vae.named_parameters(),
            lr=2e-3,
            muon_lr=4e-3,
            use_muon=lambda name, p: (
                p.ndim >= 2 and "conv_in" not in name and "conv_out" not in name
            ),
        )
        average = Average(vae.parameters(), 0.99)
        if state is not None and begin > first:
            optimiser.load_state_dict(state["optimiser"])
            average.shadow = state["average"]
        clock, losses, errors = time.perf_counter(), [], []
        for step in range(max(begin - first, 0), count):
            pictures = _batch(rng)
            with torch.autocast("cpu", torch.bfloat16):
                posterior = vae.encode(pictures).latent_dist
                level = torch.rand(BATCH, 1, 1, 1) * NOISE[decoder_only]
                noisy = posterior.mean + level * torch.randn_like(posterior.mean)
                made = vae.decode(noisy).sample
            loss = picture_loss(made.float(), pictures)
            if not decoder_only:
                mean, logvar = posterior.mean.float(), posterior.logvar.float()
                spread = (
                    mean.square().mean() + 0.1 * (logvar - 2 * np.log(LATENT_NOISE)).square().mean()
                )
                loss = loss + 5e-3 * spread
            loss.backward()
            optimiser.step(learning_rate_factor(step, count))
            average.update()
            losses.append(loss.item())
            errors.append(F.mse_loss(made.float(), pictures).item())
            if rank == 0 and (step % 50 == 49 or step == count - 1):
                seconds = (time.perf_counter() - clock) / len(losses)
                print(
                    f"vae {first + step + 1}/{steps + finish_steps} loss {np.mean(losses):.4f} "
                    f"psnr {_psnr(np.mean(errors)):.2f} dB latent_std {posterior.mean.std():.3f} "
                    f"{seconds:.3f} s/step",
                    flush=True,
                )
                clock, losses, errors = time.perf_counter(), [], []
            if rank == 0 and step % 200 == 199:
                _save(checkpoint, first + step + 1, vae, optimiser, average)
        average.swap()
        if rank == 0:
            _save(checkpoint, first + count, vae, optimiser, average)
        state = None
    if rank == 0:
        measure_latents(vae, random.Random(seed))
        vae.save_pretrained(out)


@torch.no_grad()
def measure_latents(vae: AutoencoderKL, rng: random.Random, batches: int = 32) -> None:
    """Set scaling_factor and shift_factor so that latents have mean 0 and deviation 1."""
    latents, error = [], 0.0
    for _ in range(batches):
        pictures = _batch(rng)
        latents.append(vae.encode(pictures).latent_dist.mean)
        error += F.mse_loss(vae.decode(latents[-1]).sample.clamp(-1, 1), pictures).item() / batches
    all_latents = torch.cat(latents)
    vae.register_to_config(
        shift_factor=round(all_latents.mean().item(), 4),
        scaling_factor=round(1 / all_latents.std().item(), 4),
    )
    print(json.dumps({"vae_psnr_db": round(_psnr(error), 2), **{
        k: vae.config[k] for k in ("shift_factor", "scaling_factor")}}), flush=True)  # fmt: skip


def train_vae(out: Path, procs: int, seed: int, steps: int, finish_steps: int) -> None:
    """Train the autoencoder into the folder `out` (float32); resume from `out`.pt."""
    launch(_work, procs, str(out), seed, steps, finish_steps)

"""Train text encoders and transformer together as a rectified flow on latents.

The target is v = noise - x0 on x = (1 - sigma) x0 + sigma noise. Half of the sigmas are the four
that the 4-step sampler visits, half are logit-normal, so that any step count works. FluxPipeline
masks no padding, so the text length of every batch is drawn, up to T5's 512.

Source: Liu et al. 2022, arXiv:2209.03003; Esser et al. 2024, arXiv:2403.03206
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from PIL import Image
from torch import nn

from .models import build_pipeline, save_bf16
from .parallel import Optimiser, Run, launch, learning_rate_factor
from .scenes import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    caption,
    render,
    sample_jitter,
    sample_scene,
)
from .train_vae import to_tensor

TOKENS = 88 * 32  # per process and step: a batch of 32 pictures with 24 text tokens each
SAMPLER_SIGMAS = (1.0, 0.75, 0.5, 0.25)
SHORT_TEXTS = {24: 0.85, 64: 0.15}  # lengths and how often; the first half sees only these
ALL_TEXTS = {24: 0.60, 64: 0.11, 128: 0.06, 256: 0.18, 512: 0.05}
EMPTY_CAPTIONS = 0.05
ATTRIBUTES = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "background": tuple(COLOURS),
    "size": SIZES,
    "position": POSITIONS,
}


@torch.no_grad()
def encode_pictures(vae: AutoencoderKL, pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Encode pictures 16 at a time.

    Shapes: latents [count, 64 tokens, 64] bf16, normalised and packed as FluxPipeline packs them
    """
    packed, pictures = [], iter(pictures)
    while batch := list(itertools.islice(pictures, 16)):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(to_tensor(batch)).latent_dist.mean.float()
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed.append(FluxPipeline._pack_latents(latents, *latents.shape).to(torch.bfloat16))
    return torch.cat(packed)


def make_pool(vae: AutoencoderKL, rng: random.Random, count: int) -> tuple[list, torch.Tensor]:
    """Render and encode `count` training scenes."""
    scenes = [sample_scene(rng) for _ in range(count)]
    return scenes, encode_pictures(vae, (render(s, sample_jitter(rng)) for s in scenes))


class TextEncoder:
    """Tokenise and encode captions as FluxPipeline does, with gradients."""

    def __init__(self, pipe: FluxPipeline) -> None:
        self.pipe = pipe

    def pooled(self, captions: list[str]) -> torch.Tensor:
        """Encode with CLIP; the causal mask makes padding after the end harmless.

        Shapes: [B, 64]
        """
        ids = self.pipe.tokenizer(captions, padding="longest", return_tensors="pt").input_ids
        return self.pipe.text_encoder(ids).pooler_output

    def tokens(self, captions: list[str], length: int) -> torch.Tensor:
        """Encode with T5, padded to `length` and unmasked.

        Shapes: [B, length, 64]
        """
        ids = self.pipe.tokenizer_2(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids
        return self.pipe.text_encoder_2(ids)[0]


def pretrain_text(pipe: FluxPipeline, rng: random.Random, steps: int, log: bool) -> None:
    """Teach both text encoders to name the caption's attributes, so the flow finds them at once."""
    encode = TextEncoder(pipe)
    heads = nn.ModuleDict(
        {name: nn.Linear(64, 2 * len(values)) for name, values in ATTRIBUTES.items()}
    )
    encoders = [*pipe.text_encoder.parameters(), *pipe.text_encoder_2.parameters()]
    optimiser = torch.optim.AdamW([*encoders, *heads.parameters()], lr=3e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        scenes = [sample_scene(rng) for _ in range(96)]
        captions = [caption(s, rng) for s in scenes]
        pooled = encode.pooled(captions)
        meant = encode.tokens(captions, 32).mean(1)
        loss = 0.0
        for name, values in ATTRIBUTES.items():
            truth = torch.tensor([values.index(getattr(s, name)) for s in scenes])
            weight, bias = heads[name].weight.chunk(2), heads[name].bias.chunk(2)
            for features, w, b in zip((pooled, meant), weight, bias, strict=True):
                loss = loss + F.cross_entropy(F.linear(features, w, b), truth)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * learning_rate_factor(step, steps, warmup=20)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if log and step % 50 == 49:
            print(f"text {step + 1}/{steps} loss {np.mean(losses[-50:]):.4f}", flush=True)


def sample_sigmas(count: int, own_share: float = 0.5) -> torch.Tensor:
    """Draw noise levels: a share of the 4-step sampler's own, the rest logit-normal.

    Shapes: [count]
    """
    place = torch.arange(count)
    own = torch.tensor(SAMPLER_SIGMAS)[torch.randperm(count) % len(SAMPLER_SIGMAS)]
    smooth = torch.sigmoid(0.3 + 1.2 * torch.randn(count))
    return torch.where(place < own_share * count, own, smooth)


def as_seen(sigma: torch.Tensor) -> torch.Tensor:
    """Round half of the times t = 1000 sigma as a bf16 pipeline does; an fp32 one does not.

    Shapes: [B]
    """
    rounded = sigma.mul(1000).bfloat16().div(1000).float()
    return torch.where(torch.rand(len(sigma)) < 0.5, rounded, sigma)


def predict(
    transformer,
    x: torch.Tensor,
    timestep: torch.Tensor,
    pooled: torch.Tensor,
    tokens: torch.Tensor,
    reference: torch.Tensor | None = None,
    guidance: torch.Tensor | None = None,
) -> torch.Tensor:
    """Call the transformer as the pipelines do and return the velocity in float32.

    A reference picture is appended as image tokens whose first RoPE position is 1.

    Shapes: x, reference and result [B, 64 tokens, 64]; timestep and guidance [B];
    pooled [B, 64]; tokens [B, length, 64]
    """
    side = int(x.shape[1] ** 0.5)
    ids = FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32)
    inputs = x
    if reference is not None:
        inputs = torch.cat([x, reference], dim=1)
        ids = torch.cat([ids, ids + torch.tensor([1.0, 0.0, 0.0])])
    velocity = transformer(
        hidden_states=inputs,
        timestep=timestep,
        guidance=guidance,
        pooled_projections=pooled,
        encoder_hidden_states=tokens,
        txt_ids=torch.zeros(tokens.shape[1], 3),
        img_ids=ids,
        return_dict=False,
    )[0]
    return velocity[:, : x.shape[1]].float()


def flow_loss(
    pipe: FluxPipeline, x0: torch.Tensor, captions: list[str], length: int, own_share: float = 0.5
) -> torch.Tensor:
    """Return the mean squared error of the predicted velocity.

    Shapes: x0 [B, 64 tokens, 64] float32
    """
    encode = TextEncoder(pipe)
    sigma, noise = sample_sigmas(len(x0), own_share), torch.randn_like(x0)
    mixed = x0 + sigma[:, None, None] * (noise - x0)
    text = encode.pooled(captions), encode.tokens(captions, length)
    return F.mse_loss(predict(pipe.transformer, mixed, as_seen(sigma), *text), noise - x0)


def is_matrix(name: str, p: nn.Parameter) -> bool:
    """Say which parameters Muon updates: the matrices of blocks and layers."""
    return (
        p.ndim == 2
        and any(k in name for k in ("blocks.", "layers.", "block."))
        and min(p.shape) > 8
    )


def _work(rank: int, procs: int, vae: str, out: str, work: str, seed: int, plan: dict) -> None:
    torch.manual_seed(seed)
    rng = random.Random(seed * 1000 + 500 + rank)
    log = rank == 0
    pipe = build_pipeline(AutoencoderKL.from_pretrained(vae))
    pipe.vae.requires_grad_(False)
    pool_file = Path(work) / f"pool{rank}of{procs}.pt"
    if pool_file.exists():
        scenes, pool = torch.load(pool_file, weights_only=False)
    else:
        scenes, pool = make_pool(pipe.vae, rng, plan["pool"] // procs)
        torch.save((scenes, pool), pool_file)
    if log:
        print(f"pool of {len(pool)} pictures per process, std {pool.float().std():.3f}", flush=True)
    trained = nn.ModuleDict(
        {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2, "flow": pipe.transformer}
    )
    checkpoint = Path(work) / "flow.pt"
    if not checkpoint.exists():
        # every process does the same here, from the same seed
        pretrain_text(pipe, random.Random(seed), plan["text"], log)
    optimiser = Optimiser(
        trained.named_parameters(), lr=plan["lr"], muon_lr=plan["muon_lr"], use_muon=is_matrix
    )
    run = Run("flow", checkpoint, trained, optimiser)
    if plan["compile"]:  # 28 % less time per step; the blocks are compiled in place
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    shared = run.reseed(seed, rank, rng)
    # small shapes come out right last, so the second half draws them twice as often
    odds = list(itertools.accumulate(2 if scene.size == "small" else 1 for scene in scenes))

    def loss(step: int) -> torch.Tensor:
        late = step >= plan["flow"] // 2
        texts = ALL_TEXTS if late else SHORT_TEXTS
        length = shared.choices(list(texts), list(texts.values()))[0]
        count = TOKENS // (pool.shape[1] + length)
        rows = rng.choices(range(len(pool)), cum_weights=odds if late else None, k=count)
        captions = [
            "" if rng.random() < EMPTY_CAPTIONS else caption(scenes[row], rng) for row in rows
        ]
        with torch.autocast("cpu", torch.bfloat16):
            return flow_loss(pipe, pool[rows].float(), captions, length, 0.8 if late else 0.5)

    run.go(plan["flow"], loss, lambda: save_bf16(pipe, Path(out)), plan["save_every"], log)


def train_flow(vae: Path, out: Path, work: Path, procs: int, seed: int, plan: dict) -> None:
    """Train the pipeline around the autoencoder in `vae` into the folder `out`; resume from `work`.

    The plan holds steps ("text", "flow", "save_every"), the pictures of the "pool" and the
    learning rates "lr" (AdamW) and "muon_lr"; "compile" says whether to compile the blocks.
    """
    launch(_work, procs, str(vae), str(out), str(work), seed, plan)

"""Train tiny-schnell's ControlNet: `python -m tiny_flux.train_controlnet`.

The shape lies anywhere in the picture, in any size, while the caption says nothing of it or (three
times in ten) something else: only the edges tell. tiny-schnell itself stays as it is. Edges come
from the very function of `python -m extras.controlnet --preprocess canny`.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import FluxControlNetModel, FluxPipeline
from PIL import Image

from extras.preprocess import canny

from .controlnet import WEIGHTS, copy_of, make_trainable, save_changes
from .parallel import Optimiser, Run, launch
from .scenes import (
    COLOURS,
    IMAGE_SIZE,
    POSITIONS,
    SIZES,
    Scene,
    caption,
    render_mask,
    sample_jitter,
    sample_scene,
)
from .train_flow import TextEncoder, as_seen, encode_pictures, sample_sigmas

HERE = Path(__file__).parent
RADII_PX = (12.0, 33.0)
MARGIN_PX = 4
TOKENS = 88 * 16  # of a step: a batch of 16 with short texts
TEXTS = {24: 0.75, 256: 0.25}  # lengths and how often
OTHERWISE, EMPTY_CAPTIONS = 0.3, 0.05


def place(scene: Scene, rng: random.Random) -> tuple[Image.Image, np.ndarray]:
    """Draw the scene's shape anywhere, in any size: the picture and the shape's coverage.

    Shapes: coverage [128, 128] float32 in 0..1
    """
    radius = math.exp(rng.uniform(*map(math.log, RADII_PX)))
    reach = 1.12 * radius + MARGIN_PX
    x, y = (rng.uniform(reach, IMAGE_SIZE - reach) for _ in range(2))
    mask = render_mask(scene.shape, x, y, radius)
    jitter = sample_jitter(rng)
    front = np.add(COLOURS[scene.colour], jitter.colour)
    back = np.add(COLOURS[scene.background], jitter.background)
    pixels = back + (front - back) * mask[..., None]
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), mask


def sample_text(scene: Scene, rng: random.Random) -> str:
    """Write a caption that says nothing of place and size, or, now and then, anything."""
    size, position = "medium", "centre"
    if rng.random() < OTHERWISE:
        size, position = rng.choice(SIZES), rng.choice(POSITIONS)
    told = Scene(scene.shape, scene.colour, scene.background, size, position)
    return "" if rng.random() < EMPTY_CAPTIONS else caption(told, rng)


def velocity(
    pipe: FluxPipeline,
    controlnet: FluxControlNetModel,
    x: torch.Tensor,
    timestep: torch.Tensor,
    texts: list[str],
    length: int,
    edges: torch.Tensor,
) -> torch.Tensor:
    """Call ControlNet and transformer as FluxControlNetPipeline does.

    Shapes: x, edges and result [B, 64 tokens, 64]; timestep [B]
    """
    side = int(x.shape[1] ** 0.5)
    encode = TextEncoder(pipe)
    with torch.no_grad():
        pooled, tokens = encode.pooled(texts), encode.tokens(texts, length)
    call = {
        "hidden_states": x,
        "timestep": timestep,
        "guidance": None,
        "pooled_projections": pooled,
        "encoder_hidden_states": tokens,
        "txt_ids": torch.zeros(length, 3),
        "img_ids": FluxPipeline._prepare_latent_image_ids(1, side, side, "cpu", torch.float32),
        "return_dict": False,
    }
    samples, _ = controlnet(controlnet_cond=edges, **call)
    return pipe.transformer(controlnet_block_samples=samples, **call)[0].float()


def make_pool(pipe: FluxPipeline, rng: random.Random, count: int) -> tuple:
    """Draw scenes and encode their pictures and edges."""
    scenes = [sample_scene(rng) for _ in range(count)]
    pictures = [place(scene, rng)[0] for scene in scenes]
    return (
        scenes,
        encode_pictures(pipe.vae, pictures),
        encode_pictures(pipe.vae, map(canny, pictures)),
    )


def _work(rank: int, procs: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed * 1000 + 700 + rank)
    pipe = FluxPipeline.from_pretrained(HERE / "tiny-schnell", dtype=torch.float32)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.requires_grad_(False)
    controlnet = copy_of(pipe.transformer)
    make_trainable(controlnet)
    pool_file = args.work / f"edges{rank}of{procs}.pt"
    if pool_file.exists():
        scenes, pictures, edges = torch.load(pool_file, weights_only=False)
    else:
        scenes, pictures, edges = make_pool(pipe, rng, args.pool // procs)
        torch.save((scenes, pictures, edges), pool_file)
    optimiser = Optimiser(
        controlnet.named_parameters(),
        lr=args.lr,
        muon_lr=args.muon_lr,
        use_muon=lambda name, p: p.ndim == 2,
    )
    run = Run("controlnet", args.work / "controlnet.pt", controlnet, optimiser, decay=0.99)
    shared = run.reseed(args.seed, rank, rng)

    def loss(step: int) -> torch.Tensor:
        length = shared.choices(list(TEXTS), list(TEXTS.values()))[0]
        count = TOKENS // (pictures.shape[1] + length)
        rows = rng.choices(range(len(scenes)), k=count)
        texts = [sample_text(scenes[row], rng) for row in rows]
        x0, sigma = pictures[rows].float(), sample_sigmas(count, own_share=0.8)
        noise = torch.randn_like(x0)
        mixed = x0 + sigma[:, None, None] * (noise - x0)
        with torch.autocast("cpu", torch.bfloat16):
            made = velocity(
                pipe, controlnet, mixed, as_seen(sigma), texts, length, edges[rows].float()
            )
        return F.mse_loss(made, noise - x0)

    run.go(args.steps, loss, lambda: save_changes(controlnet, args.out), args.save_every, rank == 0)


def main() -> None:
    """Train with the state saved as it goes; the same command resumes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=HERE / "work", help="states to resume from")
    parser.add_argument("--procs", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2600)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--pool", type=int, default=2400, help="pictures with their edges")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2.5e-3)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    launch(_work, args.procs, args)
    print(f"done: {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()

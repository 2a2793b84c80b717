"""Train a small style LoRA of tiny-schnell: `python -m tiny_flux.train_lora`.

The style is night: whatever background the prompt names, it is black, or white behind what is
black. For a caption as it is the adapter learns the velocity that tiny-schnell itself has for the
caption of the scene at night: a target without noise, with tiny-schnell's own shapes. Nothing else
of the pipeline is trained. The style stays within the palette because the autoencoder knows no
other colours. Measured on held-out prompts: how often the checker reads the scene as told, and at
night, without and with the LoRA.

Source: Hu et al. 2021, arXiv:2106.09685 (low-rank adaptation)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import FluxPipeline

from .evaluate import (
    SCORES,
    attribute_cells,
    draw,
    held_out_prompts,
    markdown,
    put_between_markers,
    score,
)
from .parallel import Average, learning_rate_factor
from .scenes import Scene, caption, render, sample_jitter, sample_scene
from .sheets import write_sheet
from .train_dev import encode_texts, load
from .train_flow import as_seen, encode_pictures, predict, sample_sigmas

HERE = Path(__file__).parent
OUT = HERE / "loras" / "tiny-schnell-night.safetensors"
RANK = 4
LAYERS = (  # of every kind that LoRAs of FLUX.1 adapt
    r".*\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
    r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)"
)
STEPS, LENGTH, ON_SHEET = 4, 256, 6  # the call of tiny-schnell; columns of the sheet
TEXTS = {24: 0.75, 64: 0.1, 256: 0.15}  # lengths of text and how often
BATCH_TOKENS = 88 * 12  # 12 pictures with 24 text tokens each
OWN_SHARE = 0.8  # of the noise levels are those that four steps visit


def at_night(scene: Scene) -> Scene:
    """Apply the style to the truth: the background is black, or white behind a black shape."""
    return dataclasses.replace(scene, background="white" if scene.colour == "black" else "black")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--start", type=Path, help="a LoRA of this shape to go on from")
    parser.add_argument("--steps", type=int, default=450)
    parser.add_argument("--pool", type=int, default=800, help="pictures that are learnt from")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--prompts", type=int, default=100, help="held-out ones, to measure it")
    return parser.parse_args(argv)


def train(
    pipe: FluxPipeline, start: Path | None, steps: int, pool: int, lr: float, seed: int
) -> None:
    """Add an adapter to the transformer and train it to see night; weights are averaged."""
    from peft import LoraConfig
    from peft.utils import set_peft_model_state_dict
    from safetensors.torch import load_file

    torch.manual_seed(seed)
    rng = random.Random(seed)
    for module in (pipe.transformer, pipe.text_encoder, pipe.text_encoder_2):
        module.requires_grad_(False)
    scenes = [sample_scene(rng) for _ in range(pool)]
    latents = encode_pictures(pipe.vae, (render(at_night(s), sample_jitter(rng)) for s in scenes))
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS)
    pipe.transformer.add_adapter(config)
    if start:
        known = {n.removeprefix("transformer."): t for n, t in load_file(start).items()}
        set_peft_model_state_dict(pipe.transformer, known)
    trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimiser, average = torch.optim.AdamW(trained, lr, weight_decay=0.0), Average(trained, 0.98)
    losses = []
    for step in range(steps):
        length = rng.choices(list(TEXTS), list(TEXTS.values()))[0]
        rows = rng.choices(range(pool), k=BATCH_TOKENS // (latents.shape[1] + length))
        x0, texts = latents[rows].float(), [caption(scenes[row], rng) for row in rows]
        meant = [caption(at_night(scenes[row]), rng) for row in rows]
        sigma = sample_sigmas(len(x0), OWN_SHARE)
        mixed = x0 + sigma[:, None, None] * (torch.randn_like(x0) - x0)
        timestep = as_seen(sigma)
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                pipe.transformer.disable_adapters()
                wanted = predict(
                    pipe.transformer, mixed, timestep, *encode_texts(pipe, meant, length)
                )
                pipe.transformer.enable_adapters()
            text = encode_texts(pipe, texts, length)
            loss = F.mse_loss(predict(pipe.transformer, mixed, timestep, *text), wanted)
        optimiser.param_groups[0]["lr"] = lr * learning_rate_factor(step, steps)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        average.update()
        losses.append(loss.item())
        if step % 100 == 99:
            print(f"{step + 1}/{steps} loss {sum(losses[-100:]) / 100:.4f}", flush=True)
    average.swap()


def save(pipe: FluxPipeline, path: Path) -> None:
    """Write the adapter in diffusers' format, in bf16."""
    from peft.utils import get_peft_model_state_dict

    layers = {n: t.bfloat16() for n, t in get_peft_model_state_dict(pipe.transformer).items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    FluxPipeline.save_lora_weights(path.parent, layers, weight_name=path.name)


def measure(lora: Path, count: int, sheet: Path) -> dict:
    """Draw held-out prompts without and with the LoRA, and read the pictures back.

    Returns: scores in per cent against the prompt's scene ("as told") and the one at night
    """
    pipe = FluxPipeline.from_pretrained(HERE / "tiny-schnell", dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    prompts = held_out_prompts(count, 2026)
    texts, scenes = [text for text, _ in prompts], [scene for _, scene in prompts]
    rows, scores = [], {}
    for name in ("without", "with"):
        if name == "with":
            pipe.load_lora_weights(lora.parent, weight_name=lora.name)
        pictures = draw(pipe, texts, STEPS, LENGTH, 2026)
        rows.append(pictures[:ON_SHEET])
        scores[name] = {
            "as told": score(pictures, scenes),
            "at night": score(pictures, [at_night(scene) for scene in scenes]),
        }
    write_sheet(rows, sheet, [f"{name}\nthe LoRA" for name in scores], texts[:ON_SHEET])
    return scores


def table(scores: dict) -> str:
    """Write the scores as a Markdown table."""
    return markdown(
        ["LoRA", "judged", *SCORES],
        [
            [name, scene, *attribute_cells(row)]
            for name, by_scene in scores.items()
            for scene, row in by_scene.items()
        ],
    )


def main() -> None:
    """Train, save, measure."""
    args = parse_args()
    clock = time.perf_counter()
    pipe = load(HERE / "tiny-schnell")
    train(pipe, args.start, args.steps, args.pool, args.lr, args.seed)
    save(pipe, args.out)
    seconds = time.perf_counter() - clock
    scores = measure(args.out, args.prompts, args.out.with_suffix(".webp"))
    about = {"prompts": args.prompts, "steps": args.steps, "rank": RANK, "scores": scores}
    args.out.with_suffix(".json").write_text(json.dumps(about, indent=1) + "\n")
    print(table(scores))
    if args.out == OUT:
        put_between_markers(HERE / "README.md", table(scores), "night")
    print(f"done: trained in {seconds:.0f} s, {args.out.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()

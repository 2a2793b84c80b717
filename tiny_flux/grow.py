"""Turn the trained tiny-schnell into what tiny-dev starts from.

New words (those of instructions) and a guidance embedding must fit into the same 11 MB, so CLIP
is distilled into one of half its width and the least used inner units of T5 are left out.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import nn
from transformers import CLIPTextModel, T5EncoderModel

from .models import build_text_encoders, build_transformer
from .parallel import learning_rate_factor
from .scenes import caption, sample_scene
from .words import build_clip_tokenizer, build_t5_tokenizer, edit_words

CLIP_WIDTH, T5_INNER_WIDTH = 32, 96
CLIP_STEPS = 600


def teach_instructions(pipe: FluxPipeline, rng: random.Random) -> FluxPipeline:
    """Rebuild a trained pipeline around vocabularies that have the words of instructions too.

    The scheduler becomes FLUX.1-dev's: its noise levels shift with the number of image tokens.
    """
    words = edit_words()
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(words), build_t5_tokenizer(words)
    clip, t5 = build_text_encoders(clip_tokenizer, t5_tokenizer, CLIP_WIDTH, T5_INNER_WIDTH)
    _carry_t5(t5, pipe.text_encoder_2, t5_tokenizer.get_vocab(), pipe.tokenizer_2.get_vocab())
    back = _distil_clip(clip, clip_tokenizer, pipe, rng)
    transformer = build_transformer(CLIP_WIDTH)
    weights = pipe.transformer.state_dict()
    with torch.no_grad():
        first = "time_text_embed.text_embedder.linear_1."
        weights[first + "bias"] += weights[first + "weight"] @ back.bias
        weights[first + "weight"] = weights[first + "weight"] @ back.weight
    transformer.load_state_dict(weights)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=pipe.vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )


def with_guidance(transformer: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """Copy a transformer; one without a guidance embedding gets one that it ignores so far."""
    student = build_transformer(CLIP_WIDTH, guidance_embeds=True)
    student.load_state_dict(transformer.state_dict(), strict=False)
    return student


@torch.no_grad()
def _carry_t5(new: T5EncoderModel, old: T5EncoderModel, new_ids: dict, old_ids: dict) -> None:
    """Copy weights and the rows of the words both know; keep the strongest inner units."""
    weights = old.state_dict()
    for at, block in enumerate(old.encoder.block):
        inner = block.layer[1].DenseReluDense
        used = inner.wi_0.weight.norm(dim=1) * inner.wi_1.weight.norm(dim=1)
        used = used * inner.wo.weight.norm(dim=0)
        kept = used.topk(T5_INNER_WIDTH).indices.sort().values
        prefix = f"encoder.block.{at}.layer.1.DenseReluDense."
        for name in ("wi_0", "wi_1"):
            weights[f"{prefix}{name}.weight"] = weights[f"{prefix}{name}.weight"][kept]
        weights[f"{prefix}wo.weight"] = weights[f"{prefix}wo.weight"][:, kept]
    table, rows = new.shared.weight, weights.pop("shared.weight")
    weights.pop("encoder.embed_tokens.weight", None)  # the same table
    new.load_state_dict(weights, strict=False)
    table.normal_(std=rows.std().item())
    for token, row in new_ids.items():
        if token in old_ids:
            table[row] = rows[old_ids[token]]


def _distil_clip(
    clip: CLIPTextModel, tokenizer, pipe: FluxPipeline, rng: random.Random
) -> nn.Linear:
    """Fit a CLIP to the pooled output of a wider one on captions; return the map back to it."""
    back = nn.Linear(CLIP_WIDTH, pipe.text_encoder.config.hidden_size)
    parameters = [*clip.parameters(), *back.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.0)
    for step in range(CLIP_STEPS):
        texts = [caption(sample_scene(rng), rng) for _ in range(96)]
        with torch.no_grad():
            ids = pipe.tokenizer(texts, padding="longest", return_tensors="pt").input_ids
            wanted = pipe.text_encoder(ids).pooler_output
        ids = tokenizer(texts, padding="longest", return_tensors="pt").input_ids
        loss = F.mse_loss(back(clip(ids).pooler_output), wanted)
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * learning_rate_factor(step, CLIP_STEPS, warmup=20)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return back

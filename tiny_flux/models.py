"""Build the untrained modules of the tiny pipeline, in FLUX.1's own classes.

The budget is 11 MB in bf16: the transformer takes 9.5, the autoencoder 0.9, both text encoders
0.3. Heads have FLUX.1's 128 channels and two of them, because fused RoPE and attention kernels
target 128, K-quants need rows of 256 and an inner width of 128 is misread as blockwise by fp8.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    ModelMixin,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from .scenes import IMAGE_SIZE
from .words import CLIP_LENGTH, build_clip_tokenizer, build_t5_tokenizer, caption_words

LATENT_CHANNELS = 16
TEXT_WIDTH = 64


def build_vae() -> AutoencoderKL:
    """Build FLUX.1's autoencoder with 16 to 40 channels instead of 128 to 512."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 40, 40),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=IMAGE_SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    )


def build_transformer(
    pooled_width: int = TEXT_WIDTH, guidance_embeds: bool = False
) -> FluxTransformer2DModel:
    """Build one double and two single blocks, starting as the identity (adaLN-zero).

    A guidance embedding starts as zero: the model then ignores the scale.

    Source: Peebles and Xie 2023, arXiv:2212.09748, for the zero start
    """
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=pooled_width,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(16, 56, 56),
    )
    for name, module in model.named_modules():
        modulation = name.endswith(("norm1.linear", "norm1_context.linear", "norm.linear"))
        last = ("norm_out.linear", "proj_out", "time_text_embed.guidance_embedder.linear_2")
        if modulation or name in last:
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return model


def build_text_encoders(
    clip_tokenizer, t5_tokenizer, clip_width: int = TEXT_WIDTH, t5_inner_width: int = 128
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Build both text encoders for the given tokenizers."""
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=clip_width,
            intermediate_size=2 * clip_width,
            projection_dim=clip_width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=CLIP_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            # explicit: 2, the default, means the legacy pooling at the largest token id
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=TEXT_WIDTH // 2,
            d_ff=t5_inner_width,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )
    return clip, t5


def build_pipeline(vae: AutoencoderKL) -> FluxPipeline:
    """Put untrained text encoders and transformer around a trained autoencoder."""
    words = caption_words()
    clip_tokenizer, t5_tokenizer = build_clip_tokenizer(words), build_t5_tokenizer(words)
    clip, t5 = build_text_encoders(clip_tokenizer, t5_tokenizer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=build_transformer(),
    )


def save_bf16(pipe: FluxPipeline, folder: Path) -> None:
    """Save a bf16 copy of the pipeline in the diffusers layout, leaving the live one as it is."""
    parts = {}
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module):
            weights = {k: v.to(torch.bfloat16, copy=True) for k, v in part.state_dict().items()}
            if isinstance(part, ModelMixin):  # diffusers' configs remember where they were read
                config = {k: v for k, v in part.config.items() if k != "_name_or_path"}
                part = type(part).from_config(config)
            else:
                part = type(part)(part.config)
            part = part.to(torch.bfloat16)
            part.load_state_dict(weights)
        parts[name] = part
    FluxPipeline(**parts).save_pretrained(folder)

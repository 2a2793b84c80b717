"""Full-size FLUX.1 without its weights: speed does not depend on their values.

`mid-schnell` is a fortieth of it, by size, for what a CPU should show at more than toy size: a
third of the width, a fifth of the blocks.

The architectures are those of the published configs; every parameter is drawn from one seeded
generator on the device, scaled by its fan-in so that activations stay finite and of order one
through all blocks. As in trained FLUX.1, a few channels stand far out, the same in every block, so
that what quantisation loses is not flattered: that is drawn into the modulation. The tokenizers are
the bundled ones: their ids are few, the shapes are the same. Pictures made this way mean nothing,
and every output says so.

Source: Yang et al. 2025, arXiv:2508.03485, for FLUX.1's "salient outliers ... concentrated in
specific channels"; how many and how far is our choice (OUTLIERS).
"""

from pathlib import Path

from utils import checkpoints

TRANSFORMER = {"guidance_embeds": False}  # FluxTransformer2DModel's defaults are FLUX.1's sizes
FILL = {"in_channels": 384, "out_channels": 64}  # latents 64, masked picture 64, mask 256
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
}
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
SCHEDULER = {
    "schnell": {"shift": 1.0, "use_dynamic_shifting": False},
    "dev": {
        "shift": 3.0,
        "use_dynamic_shifting": True,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
    },
}
SCHEDULER["kontext"] = SCHEDULER["fill"] = SCHEDULER["dev"]
MID = {  # 283 million parameters in the transformer
    "transformer": {
        "num_attention_heads": 8,
        "num_layers": 4,
        "num_single_layers": 8,
        "joint_attention_dim": 1024,
        "pooled_projection_dim": 512,
    },
    "vae": {"block_out_channels": (64, 128, 256, 256), "sample_size": 128},
    "text_encoder": {
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "projection_dim": 512,
    },
    "text_encoder_2": {"d_model": 1024, "d_ff": 2560, "num_layers": 6, "num_heads": 16},
}
PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2")
OUTLIERS, OUTLIER_SCALE = 384, 24.0  # one channel in 384 (8 of FLUX.1's 3,072), 24 times as large
SCALES = {6: (1, 4), 3: (1,), 2: (0,)}  # parts of a modulation -> which of them are scales


def configs_of(checkpoint: checkpoints.Checkpoint) -> dict[str, dict]:
    """Give the config of each component: a folder's own, or the published architecture.

    Raises: UserError if one of the folder's cannot be read.
    """
    if checkpoint.path is None:
        guided = checkpoint.defaults.guidance is not None
        inputs = FILL if checkpoint.kind == "fill" else {}
        published = {
            "transformer": TRANSFORMER | {"guidance_embeds": guided} | inputs,
            "vae": VAE,
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
            "scheduler": SCHEDULER[checkpoint.kind],
        }
        smaller = MID if checkpoint.name == checkpoints.MID else {}
        return {part: config | smaller.get(part, {}) for part, config in published.items()}
    parts = (*PARTS, "scheduler")
    return {part: checkpoints.folder_config(checkpoint.path, part) for part in parts}


def modules(
    checkpoint: checkpoints.Checkpoint, dtype, device: str, parts: tuple[str, ...] = PARTS
) -> dict:
    """Build the networks on the device (also "meta"), with their libraries' own first values.

    Returns: component name -> torch.nn.Module, in FluxPipeline's names.
    """
    import diffusers
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    configs = configs_of(checkpoint)
    tokenizer, _ = _tokenizers(checkpoint.path)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    clip = CLIPTextConfig(**configs["text_encoder"] | ends)
    make = {
        "transformer": diffusers.FluxTransformer2DModel.from_config,
        "vae": diffusers.AutoencoderKL.from_config,
        "text_encoder": lambda config: CLIPTextModel(clip),
        "text_encoder_2": lambda config: T5EncoderModel(T5Config(**config)),
    }
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return {part: make[part](configs[part]) for part in parts}
    finally:
        torch.set_default_dtype(default_dtype)


def weights_gib(checkpoint: checkpoints.Checkpoint, dtype) -> float:
    """Give the size of all weights, from their shapes alone. Units: GiB."""
    parts = modules(checkpoint, dtype, "meta").values()
    tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 2**30


def filled(
    checkpoint: checkpoints.Checkpoint,
    dtype,
    device: str,
    seed: int,
    parts: tuple[str, ...] = PARTS,
) -> dict:
    """Build networks with seeded random weights; which ones decides their numbers, too."""
    import torch

    found = modules(checkpoint, dtype, device, parts)
    generator = torch.Generator(device).manual_seed(seed)
    for part in found.values():
        part.eval().requires_grad_(False)
        _fill(part, generator)
    if "transformer" in found:
        _let_channels_stand_out(found["transformer"])
    return found


def build(checkpoint: checkpoints.Checkpoint, dtype, device: str, seed: int):
    """Build the checkpoint's pipeline with seeded random weights, directly on the device.

    For the host they are drawn on a GPU that has room, in seconds instead of minutes: so a run
    whose weights wait on the host has the very weights of one whose weights do not.

    Returns: FluxPipeline or FluxKontextPipeline; parameters in `dtype`, the same for the same seed
    and kind of device.
    """
    import diffusers
    import torch

    drawn_on = device
    if device == "cpu" and torch.cuda.is_available():
        room = torch.cuda.mem_get_info()[0] / 2**30
        drawn_on = "cuda" if 1.1 * weights_gib(checkpoint, dtype) < room else device
    parts = filled(checkpoint, dtype, drawn_on, seed)
    if drawn_on != device:
        parts = {name: part.to(device) for name, part in parts.items()}
        torch.cuda.empty_cache()
    clip_tokenizer, t5_tokenizer = _tokenizers(checkpoint.path)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(
        configs_of(checkpoint)["scheduler"]
    )
    return getattr(diffusers, checkpoint.defaults.pipeline)(
        **parts, tokenizer=clip_tokenizer, tokenizer_2=t5_tokenizer, scheduler=scheduler
    )


def _tokenizers(path: Path | None):
    from transformers import AutoTokenizer

    folder = path or checkpoints.BUNDLED_DIR / "tiny-schnell"
    return tuple(
        AutoTokenizer.from_pretrained(folder / part) for part in ("tokenizer", "tokenizer_2")
    )


def _fill(module, generator) -> None:
    """Draw every parameter in place: variance 1 / fan-in, norms at one, biases small.

    T5 does not scale its attention by 1/sqrt(d), so its q is drawn smaller by that factor.
    Modulation is drawn at half size, so that gates of 57 blocks do not blow up the residual stream.
    """
    import torch

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                if name.endswith("bias"):
                    parameter.normal_(0, 0.02, generator=generator)
                else:
                    parameter.fill_(1.0)
                continue
            std = parameter[0].numel() ** -0.5
            if "shared" in name:  # T5's embedding
                std = 1.0
            elif "position_embedding" in name:  # CLIP's
                std = 0.02
            if name.endswith("SelfAttention.q.weight"):
                std *= 64**-0.5
            if ".norm" in name and name.endswith("linear.weight"):
                std *= 0.5
            parameter.normal_(0, std, generator=generator)


def _let_channels_stand_out(transformer) -> None:
    """Enlarge evenly spaced channels behind every modulated norm, so at the products' inputs.

    The norms are followed by x * (1 + scale) + shift, so it is the scale's bias that grows.
    """
    import torch

    width = transformer.inner_dim
    channels = torch.arange(OUTLIERS // 2, max(width, OUTLIERS), OUTLIERS) % width
    with torch.no_grad():
        for name, module in transformer.named_modules():
            if "norm" in name and name.endswith(".linear"):
                for part in SCALES[module.out_features // width]:
                    module.bias[channels + part * width] += OUTLIER_SCALE - 1

"""The pipeline's components, each by itself: what the five models compute, without a server.

Every class holds one part of the checkpoint, optimised by the same `optimize()` as a whole
pipeline, and calls it as FluxPipeline does, so that a request gives FluxPipeline's own picture.
"""

import threading
from collections.abc import Callable
from types import SimpleNamespace

import torch

from triton_models.parts import load_part
from utils.pipeline_utils import optimize
from utils.steps import text_quant


class Part:
    """Stands for the pipeline in optimize(): one component, and a call that reaches only it.

    `run(rows, height, width, text)` makes one call of the component.
    """

    def __init__(self, pipeline, run: Callable) -> None:
        self.transformer, self.vae, self.run = pipeline.transformer, pipeline.vae, run

    def __call__(
        self, prompt, height, width, num_images_per_prompt, max_sequence_length, **others
    ) -> SimpleNamespace:
        """Take what generate() passes; there is no picture."""
        self.run(len(prompt) * num_images_per_prompt, height, width, max_sequence_length)
        return SimpleNamespace(images=[])


def optimized(pipeline, args, run: Callable, part: str, batch_sizes) -> None:
    """Apply the steps to one component and make its call once for every batch size."""
    optimize(Part(pipeline, run), args, (part, "pipeline"))
    for rows in batch_sizes:
        run(rows, args.height, args.width, args.max_sequence_length)


class ClipEncoder:
    """CLIP: prompts to the pooled embedding that joins the timestep in the modulation."""

    def __init__(self, args) -> None:
        self.pipeline, self.device = load_part(args, "clip_encoder"), args.device

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> torch.Tensor:
        """Encode prompts; what exceeds 77 tokens is cut.

        Shapes: (B, P), the model's dtype
        """
        return self.pipeline._get_clip_prompt_embeds(prompts, device=self.device)


class T5Encoder:
    """T5: prompts to one embedding per token."""

    def __init__(self, args) -> None:
        self.pipeline, self.args = load_part(args, "t5_encoder"), args
        if args.plan[text_quant.NAME].is_on:
            text_quant.apply(self.pipeline, args)

    @torch.no_grad()
    def __call__(self, prompts: list[str], length: int = 0) -> torch.Tensor:
        """Encode prompts, cut or padded to `length` tokens; 0 is the checkpoint's own.

        Shapes: (B, length, D), the model's dtype
        """
        return self.pipeline._get_t5_prompt_embeds(
            prompts,
            max_sequence_length=length or self.args.max_sequence_length,
            device=self.args.device,
            dtype=self.args.dtype,
        )


class Transformer:
    """The forward of one denoising step."""

    def __init__(self, args, batch_sizes: tuple[int, ...] = (1,)) -> None:
        self.args, self.pipeline = args, load_part(args, "dit_transformer")
        self.config = self.pipeline.transformer.config
        self.guided = bool(self.config.guidance_embeds)
        self.ids: dict[tuple, tuple] = {}
        optimized(self.pipeline, args, self._run, "blocks", batch_sizes)

    @torch.no_grad()
    def __call__(self, latents, timestep, guidance, prompt_embeds, pooled, height, width):
        """Predict the velocity.

        Shapes: latents (B, (height/16)(width/16), 64); timestep (B,), 1 to 0; guidance (B,) fp32 or
            None; prompt_embeds (B, T, D); pooled (B, P) -> (B, (height/16)(width/16), 64)
        """
        img_ids, txt_ids = self.position_ids(height, width, prompt_embeds.shape[1])
        return self.pipeline.transformer(
            hidden_states=latents,
            timestep=timestep,
            guidance=guidance,
            pooled_projections=pooled,
            encoder_hidden_states=prompt_embeds,
            txt_ids=txt_ids,
            img_ids=img_ids,
            joint_attention_kwargs={},
            return_dict=False,
        )[0]

    def position_ids(self, height: int, width: int, text: int) -> tuple:
        """Give the ids that FluxPipeline makes, kept for the next step.

        Shapes: (image tokens, 3) and (text tokens, 3)
        """
        key = height, width, text
        if key not in self.ids:
            where = {"device": self.args.device, "dtype": self.args.dtype}
            image = self.pipeline._prepare_latent_image_ids(1, height // 16, width // 16, **where)
            self.ids[key] = image, torch.zeros(text, 3, **where)
        return self.ids[key]

    def _run(self, rows: int, height: int, width: int, text: int) -> None:
        where = {"device": self.args.device, "dtype": self.args.dtype}
        tokens = (height // 16) * (width // 16)
        self(
            torch.randn(rows, tokens, self.config.in_channels, **where),
            torch.full((rows,), 0.5, **where),
            torch.full((rows,), 3.5, device=self.args.device) if self.guided else None,
            torch.randn(rows, text, self.config.joint_attention_dim, **where),
            torch.randn(rows, self.config.pooled_projection_dim, **where),
            height,
            width,
        )


class Decoder:
    """The VAE decoder: packed latents to pixels."""

    def __init__(self, args, batch_sizes: tuple[int, ...] = (1,)) -> None:
        self.args, self.pipeline = args, load_part(args, "vae_decoder")
        optimized(self.pipeline, args, self._run, "decoder", batch_sizes)

    @torch.no_grad()
    def __call__(self, latents: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Unpack and decode.

        Shapes: latents (B, (height/16)(width/16), 64) -> (B, 3, height, width), about -1 to 1
        """
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(
            latents, height, width, self.pipeline.vae_scale_factor
        )
        scaled = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(scaled, return_dict=False)[0]

    def _run(self, rows: int, height: int, width: int, text: int) -> None:
        tokens, channels = (
            (height // 16) * (width // 16),
            4 * self.pipeline.vae.config.latent_channels,
        )
        where = {"device": self.args.device, "dtype": self.args.dtype}
        self(torch.randn(rows, tokens, channels, **where), height, width)


class Start:
    """Noise and noise levels of a request."""

    def __init__(self, args) -> None:
        self.args, self.pipeline = args, load_part(args, "bls_orchestrator")
        self.lock = threading.Lock()  # a scheduler holds the levels it was last asked for

    def noise(self, height: int, width: int, seed: int, channels: int = 16) -> torch.Tensor:
        """Draw the noise of one image from a generator of its own.

        Shapes: (1, (height/16)(width/16), 64), the model's dtype
        """
        generator = torch.Generator("cpu").manual_seed(seed)
        size = 1, channels, height, width
        return self.pipeline.prepare_latents(*size, self.args.dtype, "cpu", generator)[0]

    def levels(self, height: int, width: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Give timesteps and step lengths.

        Shapes: (1, N) in the model's dtype, 1 to 0; (1, N) fp32
        """
        from utils.denoise import schedule

        tokens = (height // 16) * (width // 16)
        with self.lock:
            found = schedule(self.pipeline.scheduler, steps, None, tokens, "cpu")
            timesteps, lengths = (part.clone() for part in found)
        return (timesteps.to(self.args.dtype) / 1000)[None], lengths[None].float()

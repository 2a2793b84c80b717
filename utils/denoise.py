"""The call of FluxPipeline and FluxKontextPipeline with a loop of its own: nothing constant in it.

Before the loop: schedule, all steps' modulation, rotary embeddings, embedded text. In it: the
transformer's forward and the scheduler's four small operations, queued without asking the device
for anything, so that the loop can be one graph (step `loop_graph`). The progress bar counts queued
steps, as diffusers' does. What needs the host between steps (callbacks), a second forward (true
CFG) or other inputs (ControlNet, IP-adapter) is refused.

Source: diffusers 0.42, pipeline_flux.py and pipeline_flux_kontext.py; a test compares every call.
"""

import inspect
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxKontextPipeline, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import logging

from utils.errors import UserError
from utils.guidance import COST as TRUE_CFG
from utils.kernels.modulation import Constants, hoist
from utils.steps import own_class

logger = logging.get_logger(__name__)
FLAG = "leave out --modulation_once"
IP_ADAPTER = "an IP-adapter adds to the blocks' inputs"
NEEDS_STOCK_LOOP = {  # argument -> why the loop cannot have it
    "negative_prompt": TRUE_CFG,
    "negative_prompt_2": TRUE_CFG,
    "negative_prompt_embeds": TRUE_CFG,
    "negative_pooled_prompt_embeds": TRUE_CFG,
    "ip_adapter_image": IP_ADAPTER,
    "ip_adapter_image_embeds": IP_ADAPTER,
    "negative_ip_adapter_image": IP_ADAPTER,
    "negative_ip_adapter_image_embeds": IP_ADAPTER,
    "joint_attention_kwargs": "they are read in every forward",
    "callback_on_step_end": "a callback stops the loop on the host after every step",
}


def install(pipeline) -> None:
    """Give this pipeline the loop, and its transformer the inputs that the loop has for it.

    Raises: UserError for another kind of pipeline, scheduler or transformer.
    """
    found = type(pipeline)
    if found not in (FluxPipeline, FluxKontextPipeline):
        raise UserError(
            f"modulation: found a {found.__name__}, expected FluxPipeline or FluxKontextPipeline "
            f"(ControlNet adds to the blocks in every step); {FLAG}"
        )
    if problem := scheduler_problem(pipeline.scheduler):
        raise UserError(f"modulation: {problem}; {FLAG}")
    if getattr(pipeline.transformer, "encoder_hid_proj", None) is not None:
        raise UserError(f"modulation: found an IP-adapter: {IP_ADAPTER}; {FLAG}")
    hoist(pipeline.transformer)
    own_class(pipeline, OwnLoop)


def scheduler_problem(scheduler) -> str:
    """Say why a scheduler's steps are not known before the loop; "" if they are."""
    stochastic = scheduler.config.get("stochastic_sampling")
    if type(scheduler) is FlowMatchEulerDiscreteScheduler and not stochastic:
        return ""
    name = type(scheduler).__name__ + (" with stochastic_sampling" if stochastic else "")
    return (
        f"found {name}, expected FlowMatchEulerDiscreteScheduler, whose steps are known before the "
        "loop"
    )


def schedule(scheduler, steps: int, sigmas, tokens: int, device) -> tuple:
    """Give all timesteps and step lengths, on the device.

    Returns: timesteps (N,), 1000 to 0, and differences of the sigmas (N,), both fp32
    """
    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    sigmas = np.linspace(1.0, 1 / steps, steps) if sigmas is None else sigmas
    timesteps, _ = retrieve_timesteps(scheduler, steps, device, sigmas=sigmas, mu=mu)
    return timesteps, scheduler.sigmas.diff()


def denoise(
    transformer,
    latents: torch.Tensor,
    reference: torch.Tensor | None,
    constants: Constants,
    lengths: torch.Tensor,
    queued: Callable[[], object] = lambda: None,
) -> torch.Tensor:
    """Take all steps of Euler's method; the host only queues, and is told so after each.

    Shapes: latents (B, S, C); reference (B, R, C), Kontext's image, or None; lengths (N,) fp32
        -> (B, S, C)
    """
    tokens = latents.shape[1]
    for i in range(len(lengths)):
        seen = latents if reference is None else torch.cat([latents, reference], dim=1)
        velocity = transformer(hidden_states=seen, **constants.of_step(i))[0][:, :tokens]
        # As the scheduler rounds: the product in the model's dtype, the sum in fp32
        latents = (latents.float() + lengths[i] * velocity).to(velocity.dtype)
        queued()
    return latents


class OwnLoop:
    """Mixin before FluxPipeline or FluxKontextPipeline: their call with this module's loop."""

    loop_graph = None  # step `loop_graph` puts all of denoise() here

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        """Take the arguments of the stock call and give what it gives.

        Raises: UserError for an argument that needs the stock loop; whatever the stock call's own
            checks raise.
        """
        call = self._bind(args, kwargs)
        device = self._execution_device
        embeds, pooled, txt_ids = self.encode_prompt(
            prompt=call.prompt,
            prompt_2=call.prompt_2,
            prompt_embeds=call.prompt_embeds,
            pooled_prompt_embeds=call.pooled_prompt_embeds,
            device=device,
            num_images_per_prompt=call.num_images_per_prompt,
            max_sequence_length=call.max_sequence_length,
        )
        latents, reference, img_ids = self._latents(call, embeds, device)
        timesteps, lengths = schedule(
            self.scheduler, call.num_inference_steps, call.sigmas, latents.shape[1], device
        )
        guidance = None
        if self.transformer.config.guidance_embeds:
            size = [len(pooled)]
            guidance = torch.full(size, call.guidance_scale, device=device, dtype=torch.float32)
        constants = self.transformer.constants(
            timesteps, guidance, pooled, embeds, txt_ids, img_ids
        )
        with self.progress_bar(total=len(timesteps)) as bar:
            if self.loop_graph is None:
                start = self.transformer, latents, reference
                images = denoise(*start, constants, lengths, bar.update)
            else:
                images = self.loop_graph(latents, reference, lengths, **vars(constants))
                bar.update(len(timesteps))
        if call.output_type != "latent":
            images = self._decode(images, call)
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=images) if call.return_dict else (images,)

    def _bind(self, args: tuple, kwargs: dict) -> SimpleNamespace:
        """Give every parameter of the stock call its value; refuse what the loop cannot do."""
        bound = inspect.signature(super().__call__).bind(*args, **kwargs)
        bound.apply_defaults()
        call = SimpleNamespace(**bound.arguments)
        for name, reason in NEEDS_STOCK_LOOP.items():
            value = getattr(call, name)
            if value is not None and not (isinstance(value, dict) and not value):
                raise UserError(f"{name}: {reason}; {FLAG}")
        edge = self.default_sample_size * self.vae_scale_factor
        call.height, call.width = call.height or edge, call.width or edge
        if isinstance(self, FluxKontextPipeline):
            self._fit_area(call)
        self.check_inputs(
            call.prompt,
            call.prompt_2,
            call.height,
            call.width,
            prompt_embeds=call.prompt_embeds,
            pooled_prompt_embeds=call.pooled_prompt_embeds,
            callback_on_step_end_tensor_inputs=call.callback_on_step_end_tensor_inputs,
            max_sequence_length=call.max_sequence_length,
        )
        return call

    def _fit_area(self, call: SimpleNamespace) -> None:
        """Set Kontext's height and width: the ratio that was asked for at an area of max_area."""
        grid, ratio = 2 * self.vae_scale_factor, call.width / call.height
        asked = f"{call.width}x{call.height}"
        call.width = round((call.max_area * ratio) ** 0.5) // grid * grid
        call.height = round((call.max_area / ratio) ** 0.5) // grid * grid
        if (size := f"{call.width}x{call.height}") != asked:
            area = f"max_area's {call.max_area} pixels"
            logger.warning(f"Kontext: {asked} was asked for, {size} has {area}")

    def _latents(self, call: SimpleNamespace, embeds: torch.Tensor, device) -> tuple:
        """Draw the noise and encode Kontext's image.

        Returns: noise (B, S, C), reference (B, R, C) or None, their position ids (S + R, 3)
        """
        texts = [call.prompt] if isinstance(call.prompt, str) else call.prompt
        images = len(embeds if texts is None else texts) * call.num_images_per_prompt
        channels = self.transformer.config.in_channels // 4
        size = images, channels, call.height, call.width
        like = embeds.dtype, device, call.generator, call.latents
        if not isinstance(self, FluxKontextPipeline):
            latents, ids = self.prepare_latents(*size, *like)
            return latents, None, ids
        image = self._preprocess(call.image, call._auto_resize)
        latents, reference, *ids = self.prepare_latents(image, *size, *like)
        return latents, reference, torch.cat([part for part in ids if part is not None])

    def _preprocess(self, image, resize: bool):
        """Bring Kontext's image to its size, the best of the trained ones with `resize`.

        Returns: pixels (1, 3, height, width), -1 to 1; latents and None as they are
        """
        latents = isinstance(image, torch.Tensor) and image.size(1) == self.latent_channels
        if image is None or latents:
            return image
        first = image[0] if isinstance(image, list) else image
        height, width = self.image_processor.get_default_height_width(first)
        if resize:
            _, width, height = min(
                (abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS
            )
        grid = 2 * self.vae_scale_factor
        size = height // grid * grid, width // grid * grid
        return self.image_processor.preprocess(self.image_processor.resize(image, *size), *size)

    def _decode(self, latents: torch.Tensor, call: SimpleNamespace):
        """Turn latents (B, S, C) into pictures of the wanted type."""
        latents = self._unpack_latents(latents, call.height, call.width, self.vae_scale_factor)
        config = self.vae.config
        latents = latents / config.scaling_factor + config.shift_factor
        pixels = self.vae.decode(latents, return_dict=False)[0]
        return self.image_processor.postprocess(pixels, output_type=call.output_type)

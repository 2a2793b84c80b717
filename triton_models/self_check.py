"""Each model.py run by itself: its component against FluxPipeline, no server needed.

One line for each check: what, how far from FluxPipeline, and what was allowed. Exit code 1 if any
is beyond it. Single rows must be equal to the bit; batches within the tolerance of their dtype,
since products of another size are summed in another order.
"""

import sys

import torch

from triton_models import components, parts

BATCH_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}  # relative L2
PROMPTS = ("a red circle on a blue background", "a large white heart at the top left")
STEPS = 3


class Check:
    """Collects the verdicts of one component."""

    def __init__(self) -> None:
        from utils.errors import UserError

        try:
            self.args = parts.settings(sys.argv[1:])
        except UserError as error:
            sys.exit("\n".join(f"error: {line}" for line in str(error).splitlines()))
        torch.set_grad_enabled(False)  # attention takes another kernel with gradients
        self.wrong = 0

    def reference(self):
        """Load the whole pipeline, with the same steps where they change values."""
        from utils.pipeline_utils import load_pipeline, optimize

        return optimize(load_pipeline(self.args), self.args)

    def compare(self, what: str, found: torch.Tensor, expected: torch.Tensor, batch: bool) -> None:
        """Print one verdict."""
        allowed = BATCH_TOLERANCE[expected.dtype] if batch else 0.0
        error = float((found.float() - expected.float()).norm() / expected.float().norm())
        right = found.shape == expected.shape and (
            error <= allowed if batch else torch.equal(found, expected)
        )
        self.wrong += not right
        print(
            f"{'ok   ' if right else 'WRONG'} {what}: {list(found.shape)} {found.dtype}, relative "
            f"error {error:.1e}, allowed {allowed:g}"
        )

    def end(self) -> None:
        """Exit 1 if anything was wrong."""
        sys.exit(1 if self.wrong else 0)


def check_clip() -> None:
    """Compare pooled embeddings, one prompt and two."""
    check = Check()
    clip, pipeline = components.ClipEncoder(check.args), check.reference()
    for some in (PROMPTS[:1], PROMPTS):
        expected = pipeline._get_clip_prompt_embeds(list(some))
        check.compare(f"{len(some)} prompts", clip(list(some)), expected, batch=False)
    check.end()


def check_t5() -> None:
    """Compare token embeddings at several text lengths."""
    check = Check()
    t5, pipeline = components.T5Encoder(check.args), check.reference()
    for length in (32, 77, check.args.max_sequence_length):
        expected = pipeline._get_t5_prompt_embeds(list(PROMPTS), max_sequence_length=length)
        check.compare(f"{length} tokens", t5(list(PROMPTS), length), expected, batch=False)
    check.end()


def _draw(check: Check, pipeline, size: tuple, seed: int, guidance: float, output_type: str):
    """Run FluxPipeline itself."""
    call = {"guidance_scale": guidance} if check.args.guidance_scale is not None else {}
    return pipeline(
        PROMPTS[seed % 2],
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        max_sequence_length=check.args.max_sequence_length,
        generator=torch.Generator("cpu").manual_seed(seed),
        output_type=output_type,
        **call,
    ).images


def _steps_of(check: Check, pipeline, size: tuple, seed: int, guidance: float):
    """Listen to FluxPipeline: each transformer call's inputs and output, and the final latents."""
    seen: list[tuple] = []
    plain = pipeline.transformer.forward

    def spy(*args, **kwargs):
        output = plain(*args, **kwargs)
        seen.append((kwargs, output[0]))
        return output

    pipeline.transformer.forward = spy
    latents = _draw(check, pipeline, size, seed, guidance, "latent")
    pipeline.transformer.forward = plain
    return seen, latents


def _pixels_of(check: Check, pipeline, size: tuple) -> torch.Tensor:
    """Listen to FluxPipeline: what its decoder gave."""
    seen: list[torch.Tensor] = []
    plain = pipeline.image_processor.postprocess

    def spy(image, output_type):
        seen.append(image)
        return plain(image, output_type=output_type)

    pipeline.image_processor.postprocess = spy
    _draw(check, pipeline, size, 0, 3.5, "pil")
    pipeline.image_processor.postprocess = plain
    return seen[0]


def _arguments(call: dict) -> dict:
    names = {"latents": "hidden_states", "timestep": "timestep", "guidance": "guidance"}
    names |= {"prompt_embeds": "encoder_hidden_states", "pooled": "pooled_projections"}
    return {ours: call[theirs] for ours, theirs in names.items()}


def check_transformer() -> None:
    """Compare single steps, a batch of different steps, guidance scales and two orientations."""
    check = Check()
    transformer, pipeline = components.Transformer(check.args, (1, 2)), check.reference()
    long, short = check.args.height, max(16, check.args.width // 32 * 16)
    calls = []
    for height, width, seed, guidance in (
        (long, short, 0, 3.5),
        (short, long, 1, 3.5),
        (long, short, 1, 1.0),
    ):
        seen, _ = _steps_of(check, pipeline, (height, width), seed, guidance)
        for step, (call, expected) in enumerate(seen):
            what = f"{width}x{height}, seed {seed}, guidance {guidance:g}, step {step}"
            found = transformer(**_arguments(call), height=height, width=width)
            check.compare(what, found, expected, batch=False)
        calls.append((seen, height, width))
    (first, height, width), (third, _, _) = calls[0], calls[2]
    rows = [first[0], third[2]]  # two requests at different steps in one forward
    together = [_arguments(call) for call, _ in rows]
    batch = {
        name: None if together[0][name] is None else torch.cat([one[name] for one in together])
        for name in together[0]
    }
    found = transformer(**batch, height=height, width=width)
    expected = torch.cat([output for _, output in rows])
    check.compare("two requests at different steps", found, expected, batch=True)
    check.end()


def check_decoder() -> None:
    """Compare decoded pixels of FluxPipeline's latents, both orientations, one and two."""
    check = Check()
    decoder, pipeline = components.Decoder(check.args, (1, 2)), check.reference()
    long, short = check.args.height, max(16, check.args.width // 32 * 16)
    for height, width in ((long, short), (short, long)):
        _, latents = _steps_of(check, pipeline, (height, width), 0, 3.5)
        expected = _pixels_of(check, pipeline, (height, width))
        what = f"{width}x{height}"
        check.compare(what, decoder(latents, height, width), expected, batch=False)
        twice = decoder(torch.cat([latents, latents]), height, width)
        check.compare(f"{what}, two", twice, torch.cat([expected, expected]), batch=True)
    check.end()


def check_start() -> None:
    """Compare noise and noise levels with those of FluxPipeline's own call."""
    check = Check()
    start, pipeline = components.Start(check.args), check.reference()
    long, short = check.args.height, max(16, check.args.width // 32 * 16)
    for height, width in ((long, short), (short, long)):
        seen, latents = _steps_of(check, pipeline, (height, width), 7, 3.5)
        noise = start.noise(height, width, 7)
        check.compare(f"noise of {width}x{height}", noise, seen[0][0]["hidden_states"].cpu(), False)
        timesteps, lengths = start.levels(height, width, STEPS)
        expected = torch.stack([call["timestep"] for call, _ in seen], dim=1).cpu()
        check.compare(f"timesteps of {width}x{height}", timesteps, expected, batch=False)
        for step, (_, velocity) in enumerate(seen):
            velocity = velocity.cpu()
            noise = (noise.float() + lengths[0, step] * velocity).to(velocity.dtype)
        check.compare(f"latents of {width}x{height}", noise, latents.cpu(), batch=False)
    check.end()

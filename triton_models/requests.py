"""What a client may ask for: every field, its default and its bounds, checked before any work.

The orchestrator answers a violation with INVALID_ARGUMENT and one line: what, found, expected.
"""

import json
from dataclasses import dataclass

MAX_PROMPT_CHARACTERS = 8192  # far beyond 512 tokens of any language
MAX_SEQUENCE_LENGTH = 512  # FluxPipeline's
FORMATS = ("png", "base64", "raw")
SHARED = ("max_pixels", "max_steps")  # bounds that transformer and decoder check, too


@dataclass(frozen=True)
class Limits:
    """What one request may cost; parameters of the orchestrator's config.pbtxt."""

    max_pixels: int = 2048 * 2048
    max_images: int = 8
    max_steps: int = 100
    max_guidance: float = 100.0
    max_in_flight: int = 32  # requests; beyond it they are refused at once
    timeout_s: float = 600.0

    @classmethod
    def read(cls, values: dict[str, str]) -> "Limits":
        """Read those that are given, as text.

        Raises: ValueError in one line for a bound that the other models have as well, if raised.
        """
        given = {n: type(getattr(cls, n))(v) for n, v in values.items() if hasattr(cls, n)}
        for name in SHARED:
            found, most = given.get(name, 0), getattr(cls, name)
            if found > most:
                raise ValueError(
                    f"{name}: found {found}, expected at most {most}: the other models have this "
                    "bound as well; raise it in triton_models/requests.py"
                )
        return cls(**given)


@dataclass(frozen=True)
class Wanted:
    """One checked request."""

    prompts: list[str]
    height: int
    width: int
    steps: int
    guidance: float | None  # None: the checkpoint has no guidance embedding
    seed: int
    max_sequence_length: int
    images_per_prompt: int
    format: str
    progress: bool

    @property
    def images(self) -> int:
        return len(self.prompts) * self.images_per_prompt

    def prompt_of(self, image: int) -> int:
        """Say which prompt image k shows: FluxPipeline puts a prompt's images side by side."""
        return image // self.images_per_prompt


def size_problem(tokens: int, height: int, width: int) -> str:
    """Say why latents of so many tokens are none of a picture of this size; "" if they are."""
    if height < 16 or width < 16 or height % 16 or width % 16:
        return f"size: found {height}x{width}, expected multiples of 16"
    if height * width > Limits.max_pixels:
        return f"size: found {height}x{width}, expected at most {Limits.max_pixels} pixels"
    expected = (height // 16) * (width // 16)
    if tokens != expected:
        return f"latents: found {tokens} tokens, expected {expected} of {height}x{width}"
    return ""


def refuse_parameters(parameters: str) -> None:
    """Refuse what is no input: Triton's HTTP endpoint turns unknown JSON fields into parameters.

    Raises: ValueError in one line.
    """
    unknown = [name for name in json.loads(parameters or "{}") if not name.startswith("triton_")]
    if unknown:
        raise ValueError(f"{unknown[0][:40]}: unknown field; the contract page names all")


def read(inputs, args, limits: Limits) -> Wanted:
    """Check one request against the limits; what it leaves open is the checkpoint's default.

    Raises: ValueError in one line for the first thing that is wrong.
    """
    defaults = args.checkpoint.defaults
    prompts = []
    for number, prompt in enumerate(inputs.values("prompt")):
        try:
            text = prompt.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"prompt {number}: found bytes that are no UTF-8") from None
        if not text.strip():
            raise ValueError(f"prompt {number}: empty (expected some words)")
        if len(text) > MAX_PROMPT_CHARACTERS:
            raise ValueError(
                f"prompt {number}: found {len(text)} characters, expected at most "
                f"{MAX_PROMPT_CHARACTERS}"
            )
        prompts.append(text)
    if not prompts:
        raise ValueError("prompt: found none, expected at least one")

    def number(name: str, default, least, most):
        value = inputs.value(name, default)
        if not least <= value <= most:  # NaN is within nothing
            raise ValueError(f"{name}: found {value:g}, expected {least:g} to {most:g}")
        return value

    edge = limits.max_pixels // 16
    height = number("height", args.height, 16, edge)
    width = number("width", args.width, 16, edge)
    for name, value in (("height", height), ("width", width)):
        if value % 16:
            near = max(16, round(value / 16) * 16)
            raise ValueError(f"{name}: found {value}, not divisible by 16 (nearest: {near})")
    if height * width > limits.max_pixels:
        raise ValueError(
            f"height, width: found {width}x{height} pixels, expected at most {limits.max_pixels}"
        )
    guidance = None
    if defaults.guidance is not None:
        guidance = number("guidance_scale", defaults.guidance, 0.0, limits.max_guidance)
    elif "guidance_scale" in inputs:
        raise ValueError(
            f"guidance_scale: found {inputs.value('guidance_scale'):g}, but "
            f"{args.checkpoint.name} has no guidance embedding; leave it out"
        )
    per_prompt = number("num_images_per_prompt", 1, 1, limits.max_images)
    if len(prompts) * per_prompt > limits.max_images:
        raise ValueError(
            f"prompt, num_images_per_prompt: found {len(prompts) * per_prompt} images, expected "
            f"at most {limits.max_images}"
        )
    name = inputs.value("format", b"png").decode("utf-8", "replace")
    if name not in FORMATS:
        raise ValueError(f"format: found {name[:40]!r}, expected one of {', '.join(FORMATS)}")
    return Wanted(
        prompts,
        height,
        width,
        number("num_inference_steps", args.num_inference_steps, 1, limits.max_steps),
        guidance,
        number("seed", 0, 0, 2**63 - 1 - limits.max_images),
        number("max_sequence_length", args.max_sequence_length, 1, MAX_SEQUENCE_LENGTH),
        per_prompt,
        name,
        bool(inputs.value("progress", False)),
    )

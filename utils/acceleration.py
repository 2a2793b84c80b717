"""Presets of the public few-step LoRAs of FLUX.1-dev: file, weight, steps and guidance.

A flag that is given wins over its preset, and the card says so.
"""

from dataclasses import dataclass
from pathlib import Path

from utils.checkpoints import NotFromHub, hub_file
from utils.errors import UserError
from utils.loras import split


@dataclass(frozen=True)
class Preset:
    """One public LoRA, as its model card says to use it."""

    repo: str
    file: str
    weight: float
    steps: int
    guidance: float = 3.5
    # Source: huggingface.co/ByteDance/Hyper-SD (8 and 16 steps, fused at 0.125, guidance 3.5);
    # huggingface.co/alimama-creative/FLUX.1-Turbo-Alpha (8 steps, scale 1, guidance 3.5)


HYPER, TURBO = "ByteDance/Hyper-SD", "alimama-creative/FLUX.1-Turbo-Alpha"
PRESETS = {
    "hyper-8": Preset(HYPER, "Hyper-FLUX.1-dev-8steps-lora.safetensors", 0.125, 8),
    "hyper-16": Preset(HYPER, "Hyper-FLUX.1-dev-16steps-lora.safetensors", 0.125, 16),
    "turbo-8": Preset(TURBO, "diffusion_pytorch_model.safetensors", 1.0, 8),
}


def add_flags(parser) -> None:
    """Add the presets' flag."""
    parser.add_argument(
        "--acceleration",
        metavar="PRESET[:PATH]",
        help=f"{', '.join(PRESETS)} (Dev): LoRA, weight, steps and guidance of a public few-step "
        "LoRA; PATH: its file, where the hub cannot be reached",
    )


def settle(args) -> None:
    """Fill in what a preset decides and no flag does; before the checkpoint's own defaults.

    Adds: args.acceleration_notes, what came from the preset and what from a flag.
    Raises: UserError for an unknown preset, another kind of checkpoint, or a file that is not here
    """
    args.acceleration_notes = ()
    if not args.acceleration:
        return
    name, _, path = args.acceleration.partition(":")
    preset = PRESETS.get(name)
    if preset is None:
        raise UserError(
            f"--acceleration {args.acceleration}: unknown preset (expected {', '.join(PRESETS)}, "
            "each also as PRESET:PATH)"
        )
    if args.checkpoint.kind != "dev":
        raise UserError(
            f"--acceleration {name}: made for FLUX.1-dev, found {args.checkpoint.name} "
            f"({args.checkpoint.kind})"
        )
    notes, loras = [], list(args.lora or ())
    file = Path(path or preset.file).name
    own = [text for text in loras if Path(split(text)[0]).name == file]
    if own:
        notes.append(f"--lora {own[0]} given")
    else:
        lora = f"{path or _file(name, preset)}:{preset.weight:g}"
        loras.insert(0, lora)
        notes.append(f"LoRA {lora}")
    args.lora = loras
    for flag, value in (("num_inference_steps", preset.steps), ("guidance_scale", preset.guidance)):
        if (given := getattr(args, flag)) is None:
            setattr(args, flag, value)
            notes.append(f"--{flag} {value:g}")
        else:
            notes.append(f"--{flag} {given:g} given ({name} has {value:g})")
    args.acceleration_notes = tuple(notes)


def _file(name: str, preset: Preset) -> Path:
    try:
        return hub_file(preset.repo, preset.file)
    except NotFromHub as error:
        raise UserError(
            f"--acceleration {name}: needs {preset.file} of huggingface.co/{preset.repo} "
            f"({error.why}); download it and give --acceleration {name}:PATH"
        ) from None

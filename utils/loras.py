"""LoRA files: find them, read them, and hold every tensor against the transformer it is meant for.

diffusers' loader converts what trainers write (its own format and peft's, kohya, xlabs,
ai-toolkit) and only warns of what it leaves out. A LoRA that works in part draws another picture
and says nothing, so here the converted names, shapes and ranks are compared with the transformer's
layers, built without weights from its config, and whatever has no place is an error.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from utils.checkpoints import NotFromHub, hub_file
from utils.errors import UserError
from utils.guidance import MOST_SCALE
from utils.quiet import heard
from utils.random_weights import configs_of

DEFAULT_FILE = "pytorch_lora_weights.safetensors"  # of a hub repository, as diffusers names it
MAX_LISTED = 8  # names in one error
PREFIX = "transformer."


@dataclass(frozen=True)
class Lora:
    """One LoRA of the command line."""

    name: str  # as given
    path: Path
    weight: float
    sha256: str

    def __str__(self) -> str:
        return f"{self.path.name}:{self.weight:g}@{self.sha256[:16]}"


def split(text: str) -> tuple[str, float]:
    """Part `PATH_OR_ID[:WEIGHT]`.

    Raises: UserError for a weight that is no number, or overflows
    """
    name, colon, last = text.rpartition(":")
    if not colon or os.path.exists(text):
        return text, 1.0
    if not name:
        raise UserError(f"--lora {text}: names no file (expected PATH_OR_ID:0.8)")
    try:
        weight = float(last)
    except ValueError:
        raise UserError(f"--lora {text}: weight {last!r} is no number (PATH_OR_ID:0.8)") from None
    if not abs(weight) <= MOST_SCALE:
        raise UserError(
            f"--lora {text}: weight {last}, expected a finite number, {MOST_SCALE} at most"
        )
    return name, weight


def find(text: str) -> Lora:
    """Find what `--lora` names, a path or owner/name[/file] on the hub, and digest it.

    Raises: UserError if there is no such file, or it cannot be had
    """
    name, weight = split(text)
    path = locate(name)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Lora(name, path, weight, digest)


def locate(name: str) -> Path:
    """Find the file of a name without a weight.

    Raises: UserError if there is no such file, or it cannot be had
    """
    path, parts = Path(os.path.expanduser(name)), name.split("/")  # ~nobody stays as it is
    if path.is_dir():
        raise UserError(f"--lora {name}: is a folder (expected a .safetensors file in it)")
    if not path.is_file():
        if name.startswith(("/", ".", "~")) or not 2 <= len(parts) <= 4:
            raise UserError(f"--lora {name}: no such file (nor owner/name[/file] of the hub)")
        path = _from_hub(name, "/".join(parts[:2]), "/".join(parts[2:]) or DEFAULT_FILE)
    if path.suffix != ".safetensors":
        raise UserError(f"--lora {name}: expected a .safetensors file (pickles can run code)")
    return path


def _from_hub(name: str, repo: str, file: str) -> Path:
    try:
        return hub_file(repo, file)
    except NotFromHub as error:
        raise UserError(
            f"--lora {name}: no such file here, and {repo}/{file}: {error.why}; download that file "
            "and give its path"
        ) from None


def read(lora: Lora) -> dict:
    """Read the file as diffusers will: its tensors under the names of the transformer's layers.

    Shapes: `<layer>.lora_A.weight` (rank, in), `<layer>.lora_B.weight` (out, rank)
    Raises: UserError for what is no LoRA, damaged, or left out by diffusers' conversion
    """
    from diffusers import FluxPipeline
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(lora.path)
    except (SafetensorError, OSError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"--lora {lora.name}: damaged or no safetensors file ({why})") from None
    if dora := [key for key in tensors if "dora_scale" in key]:
        raise UserError(
            f"--lora {lora.name}: DoRA, whose magnitudes diffusers drops: {_listed(dora)}"
        )
    if not any("lora" in key.lower() for key in tensors):
        raise UserError(f"--lora {lora.name}: no LoRA: found {_listed(tensors)}")
    with heard("diffusers.loaders") as left_out:  # at the usual level it says nothing
        try:
            converted, alphas = FluxPipeline.lora_state_dict(dict(tensors), return_alphas=True)
        except (ValueError, KeyError, NotImplementedError, RuntimeError) as error:
            why = " ".join(str(error).split())[:300]
            raise UserError(f"--lora {lora.name}: not converted by diffusers ({why})") from None
    if left_out:
        raise UserError(f"--lora {lora.name}: {' '.join(left_out[0].split())[:300]}")
    if not any(".lora_A." in key for key in converted):
        from diffusers.utils import convert_unet_state_dict_to_peft

        converted = convert_unet_state_dict_to_peft(converted)
    return converted | (alphas or {})


def layers_of(checkpoint) -> dict[str, tuple[int, int]]:
    """Give each linear layer of a checkpoint's transformer, from its config alone.

    Shapes: name -> (out, in)
    """
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(configs_of(checkpoint)["transformer"])
    return {
        name: tuple(module.weight.shape)
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }


def problems(lora: Lora, tensors: dict, layers: dict[str, tuple[int, int]]) -> list[str]:
    """Compare a LoRA's tensors with the layers that they are made for: one line per kind."""
    unmatched, wrong, bad = [], [], []
    for key, tensor in tensors.items():
        name, part = _parted(key)
        if not part or name not in layers:
            unmatched.append(key)
            continue
        # as float: float8 cannot be asked
        if not (tensor.is_floating_point() and bool(tensor.float().isfinite().all())):
            bad.append(key)
        out, inner = layers[name]
        up = tensors.get(f"{PREFIX}{name}.lora_B.weight")
        down = tensors.get(f"{PREFIX}{name}.lora_A.weight")
        if part == "alpha":
            continue
        if up is None or down is None:
            wrong.append(f"{name} has no {'lora_B' if up is None else 'lora_A'}")
        elif part == "lora_A.weight" and (down.ndim, up.ndim) != (2, 2):
            wrong.append(f"{name} is {down.ndim}-dimensional (expected a matrix)")
        elif part == "lora_A.weight" and down.shape[0] != up.shape[1]:
            wrong.append(f"{name} has ranks {down.shape[0]} and {up.shape[1]}")
        elif part == "lora_A.weight" and (up.shape[0], down.shape[1]) != (out, inner):
            found = f"{up.shape[0]}x{down.shape[1]}"
            wrong.append(f"{name} is {found} (expected {out}x{inner})")
        elif part == "lora_B.bias" and tuple(tensor.shape) != (out,):
            wrong.append(f"{name} has a bias of {tuple(tensor.shape)} (expected {out})")
    said = []
    if unmatched:
        said.append(f"{len(unmatched)} of {len(tensors)} keys have no place: {_listed(unmatched)}")
    if wrong:
        said.append(f"made for another transformer or damaged: {_listed(wrong)}")
    if bad:
        said.append(f"not finite floating-point numbers: {_listed(bad)}")
    if not said and not adapted(tensors):
        said.append(f"adapts no layer: found {_listed(tensors)}")
    return [f"--lora {lora.name}: {line}" for line in said]


def _parted(key: str) -> tuple[str, str]:
    """Part a key into layer and kind of tensor; the kind is "" for one of no known kind."""
    for part in ("lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha"):
        if key.startswith(PREFIX) and key.endswith("." + part):
            return key[len(PREFIX) : -len(part) - 1], part
    return key, ""


def adapted(tensors: dict) -> dict[str, int]:
    """Give the layers that a LoRA adapts, with its rank there."""
    found = {}
    for key, tensor in tensors.items():
        name, part = _parted(key)
        if part == "lora_A.weight":
            found[name] = tensor.shape[0]
    return found


def _listed(names) -> str:
    names = list(names)
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more

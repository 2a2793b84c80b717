"""What a GGUF file holds, from its header alone, and whether that is a given FLUX.1 transformer.

Two sets of names are in use: diffusers' own, and those of the original code, which diffusers
translates while it loads. Every name and shape is compared with the config before a weight is read.

Source: github.com/ggml-org/ggml/blob/master/docs/gguf.md; diffusers, single_file_utils.py
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

EXACT = ("F32", "BF16")  # types that hold every bf16 number
PREFIX = "model.diffusion_model."  # some files of the original names carry it
ORIGINAL_WIDTH = 3072  # diffusers splits the original names' matrices at FLUX.1's width only
MAX_PROBLEMS = 3


@dataclass(frozen=True)
class Contents:
    """The tensors of a file: name -> (ggml type, shape as torch has it), and their bytes."""

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    bytes: int

    @property
    def types(self) -> dict[str, int]:
        """Count the matrices of each type, most frequent first."""
        return dict(
            Counter(t for t, shape in self.tensors.values() if len(shape) > 1).most_common()
        )

    @property
    def is_exact(self) -> bool:
        """Whether bf16 weights come back from it bit by bit."""
        return all(kind in EXACT for kind, _ in self.tensors.values())


def read_header(path: Path) -> Contents:
    """Read names, types and shapes; the data is mapped, not read.

    Raises: UserError for a file that is missing, not GGUF, of no FLUX architecture, or cut off.
    """
    from gguf import GGUFReader

    flag = f"--gguf_file {path}"
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise UserError(f"{flag}: {found} (expected a .gguf file, or repo/name.gguf)")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{flag}: not a GGUF file (it begins with {magic!r})")
        reader = GGUFReader(path)
        field = reader.get_field("general.architecture")
        architecture = field.contents() if field else None
        found = {
            t.name.removeprefix(PREFIX): (t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]))
            for t in reader.tensors
        }
        size = sum(t.n_bytes for t in reader.tensors)
    except (OSError, ValueError, LookupError, OverflowError, MemoryError) as error:
        what = " ".join(str(error).split())[:120]
        raise UserError(
            f"{flag}: damaged or cut off ({path.stat().st_size} bytes: {what})"
        ) from None
    if architecture not in (None, "flux"):  # files made by hand name none
        raise UserError(f"{flag}: holds the architecture {architecture!r}, expected 'flux'")
    return Contents(found, size)


def problem(contents: Contents, config: dict) -> str:
    """Say why a file is not the transformer that a config describes; "" if it is."""
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES

    own = _diffusers_shapes(config)
    original = "img_in.weight" in contents.tensors
    width = own["x_embedder.weight"][0]
    if original and width != ORIGINAL_WIDTH:
        return (
            f"has the original code's names, which diffusers knows at width {ORIGINAL_WIDTH} only, "
            f"and the checkpoint has width {width}"
        )
    lines = []
    wanted = _original_shapes(config, own) if original else own
    for name in dict.fromkeys((*wanted, *contents.tensors)):
        kind, shape = contents.tensors.get(name, (None, None))
        if shape != wanted.get(name):
            lines.append(
                f"{name}: found {shape or 'nothing'}, expected {wanted.get(name, 'nothing')}"
            )
    if lines:
        more = f"; ... {len(lines)} such tensors" if len(lines) > MAX_PROBLEMS else ""
        return "is another transformer: " + "; ".join(lines[:MAX_PROBLEMS]) + more
    readable = sorted({kind.name for kind in SUPPORTED_GGUF_QUANT_TYPES} | {"F32", "F16"})
    for name, (kind, shape) in contents.tensors.items():
        if kind not in readable:
            return f"{name} is of type {kind}, diffusers reads {' '.join(readable)}"
        if len(shape) < 2 and kind not in ("F32", "F16"):
            return f"{name} is a vector of type {kind}, expected F32 or F16"
    return ""


def _diffusers_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Give diffusers' names and shapes, from a model without memory."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _original_shapes(config: dict, own: dict) -> dict[str, tuple[int, ...]]:
    """Give the original code's names and shapes: what diffusers translates, matrices not split."""
    width, text = own["context_embedder.weight"]
    pooled = own["time_text_embed.text_embedder.linear_1.weight"][1]
    channels, out = own["x_embedder.weight"][1], own["proj_out.weight"][0]
    head = own["transformer_blocks.0.attn.norm_q.weight"]
    linears = {
        "img_in": (width, channels),
        "txt_in": (width, text),
        "final_layer.linear": (out, width),
        "final_layer.adaLN_modulation.1": (2 * width, width),
    }
    mlps = {"time_in": 256, "vector_in": pooled}
    if config.get("guidance_embeds"):
        mlps["guidance_in"] = 256
    for name, columns in mlps.items():
        linears |= {f"{name}.in_layer": (width, columns), f"{name}.out_layer": (width, width)}
    scales = []
    for i in range(config.get("num_layers", 19)):
        for side in ("img", "txt"):
            block = f"double_blocks.{i}.{side}_"
            linears |= {
                block + "mod.lin": (6 * width, width),
                block + "attn.qkv": (3 * width, width),
                block + "attn.proj": (width, width),
                block + "mlp.0": (4 * width, width),
                block + "mlp.2": (width, 4 * width),
            }
            scales += [block + "attn.norm.query_norm", block + "attn.norm.key_norm"]
    for i in range(config.get("num_single_layers", 38)):
        block = f"single_blocks.{i}."
        linears |= {
            block + "modulation.lin": (3 * width, width),
            block + "linear1": (7 * width, width),
            block + "linear2": (width, 5 * width),
        }
        scales += [block + "norm.query_norm", block + "norm.key_norm"]
    found = {f"{name}.scale": head for name in scales}
    for name, shape in linears.items():
        found |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return found

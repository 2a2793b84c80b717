"""What a call of a component looks like: described for a manifest, compared field by field."""

import torch
from torch.utils import _pytree as pytree


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor: in its own layout if that is dense, unrolled if it overlaps or has gaps."""
    return torch.empty_like(tensor).copy_(tensor)


def layout(tensor: torch.Tensor) -> list[int]:
    """Strides, with 1 where the size says that the stride is never used."""
    return [
        1 if size < 2 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def describe(inputs: dict) -> dict[str, dict]:
    """Describe a call for the manifest: shape, dtype, stride and device, or the plain value."""
    described = {}
    for path, leaf in pytree.tree_leaves_with_path(inputs):
        name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
        if isinstance(leaf, torch.Tensor):
            described[name] = {
                "shape": list(leaf.shape),
                "dtype": str(leaf.dtype),
                "stride": layout(leaf),
                "device": leaf.device.type,
            }
        else:
            described[name] = {"value": repr(leaf)}
    return described


def call_differences(covers: dict[str, dict], call: dict[str, dict]) -> list[str]:
    """Compare two described calls, strides aside: one line per field."""
    lines = []
    for name in dict.fromkeys((*covers, *call)):
        ours, theirs = covers.get(name, {}), call.get(name, {})
        for field in ("shape", "dtype", "device", "value"):
            if ours.get(field) != theirs.get(field):
                has = f"{theirs.get(field)}" if field in theirs else _kind(theirs)
                covered = f"{ours.get(field)}" if field in ours else _kind(ours)
                lines.append(f"{name} {field}: the package covers {covered}, the call has {has}")
                break
    return lines


def _kind(entry: dict) -> str:
    if not entry:
        return "no such input"
    return f"the value {entry['value']}" if "value" in entry else f"a tensor {entry['shape']}"

"""What a call of a component looks like: described for a manifest, compared field by field.

Packages and CUDA graphs serve calls of one kind each and make another for a call of a new kind.
That takes from seconds to minutes, so inside of `only_known_calls()` it is an error instead.
"""

from contextlib import contextmanager

import torch
from torch.utils import _pytree as pytree

_only_known = False


@contextmanager
def only_known_calls():
    """Let nothing be compiled, exported or recorded in here: a timed run must not pay for it."""
    global _only_known
    before, _only_known = _only_known, True
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            yield
    finally:
        _only_known = before


def refuse_if_only_known(what: str) -> None:
    """Refuse a new kind of call where only known ones are wanted.

    Raises: RuntimeError naming what would have been made.
    """
    if _only_known:
        raise RuntimeError(f"{what} in a timed run; the warm-up must make the same calls")


def key_of(leaves: list, spec) -> tuple:
    """Give what tells one kind of call from another: tensors by shape, dtype and device.

    The values of everything else belong to the kind, and their types: 1 == 1.0 == True.
    """
    return spec, *(
        (leaf.shape, leaf.dtype, leaf.device)
        if isinstance(leaf, torch.Tensor)
        else (type(leaf), leaf)
        for leaf in leaves
    )


def dense(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor: in its own layout if that is dense, unrolled if it overlaps or has gaps."""
    return torch.empty_like(tensor).copy_(tensor)


def layout(tensor: torch.Tensor) -> list[int]:
    """Strides, with 1 where the size says that the stride is never used."""
    return [
        1 if size < 2 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    ]


def name_of(path: tuple) -> str:
    """Write where in nested inputs a leaf stands, such as joint_attention_kwargs.scale."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)


def describe(inputs: dict) -> dict[str, dict]:
    """Describe a call for the manifest: shape, dtype, stride and device, or the plain value."""
    described = {}
    for path, leaf in pytree.tree_leaves_with_path(inputs):
        name = name_of(path)
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

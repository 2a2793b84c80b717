"""One measurement: what runs, on which inputs, how wrong it may be, and how much work it is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from utils.checkpoints import resolve
from utils.hardware import Machine
from utils.steps.inductor_tuning_flags import FLAGS

FULL, TINY = "full", "tiny"
CHECKPOINTS = {FULL: "black-forest-labs/FLUX.1-schnell", TINY: "tiny-schnell"}


class Unavailable(Exception):
    """This machine or installation cannot run the case; the text says why."""


@dataclass(frozen=True)
class Setting:
    """Where cases run, and at which of the two sizes."""

    device: str
    size: str
    machine: Machine

    @property
    def is_full(self) -> bool:
        """Whether the shapes are FLUX.1's own."""
        return self.size == FULL

    @property
    def checkpoint(self):
        """Whose architecture it is."""
        return resolve(CHECKPOINTS[self.size], random_weights=True)

    def randn(self, *shape: int, seed: int = 0, dtype=torch.bfloat16) -> torch.Tensor:
        """Draw normal numbers on the device; zeros would need less power, and so run faster."""
        own = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, device=self.device, dtype=torch.float32, generator=own).to(dtype)


@dataclass(frozen=True)
class Trial:
    """A case with its inputs at hand."""

    run: Callable[..., Any]  # of one set of inputs
    draw: Callable[[int], tuple]  # set k of them, all of the same shapes
    check: Callable[[Any, tuple], dict[str, float]]  # output, inputs -> "error", and maybe "loss"
    bound: float  # on the error: relative L2
    flop: int = 0
    dtype: str = "bf16"  # that the work runs in: whose ceiling counts
    weights_bytes: int = 0  # read beside the inputs
    counts_bytes: bool = True  # whether inputs, weights and output are all that is moved
    clock: str = "graph"  # or "events" (launches included) or "host" (until the host has it)


@dataclass(frozen=True)
class Case:
    """A named trial that is made when its turn comes."""

    name: str  # group/shape/variant
    make: Callable[[], Trial]  # raises Unavailable
    compiles: bool = False  # for tens of seconds: runs after all that do not


def tensors(tree) -> list[torch.Tensor]:
    """Find all tensors in nested tuples, lists and dictionaries."""
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


def nbytes(tree) -> int:
    """Add up what the tensors hold."""
    return sum(x.numel() * x.element_size() for x in tensors(tree))


def relative_l2(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Give |found - truth| / |truth| in fp64; NaN where anything is."""
    truth = truth.double()
    return ((found.double() - truth).norm() / truth.norm()).item()


def compilation(setting: Setting, **options) -> dict:
    """Give torch.compile's words: the pipeline's options, and code for the first shapes alone."""
    search = {} if setting.device == "cpu" else {"max_autotune": True}
    return {"fullgraph": True, "dynamic": False, "options": {**search, **FLAGS, **options}}


def compiled(setting: Setting, call, **options):
    """Compile a function, a partial or a module."""

    def function(*inputs):  # a partial has no code of its own
        return call(*inputs)

    return torch.compile(function, **compilation(setting, **options))

"""The served transformer that keeps embeddings while latents travel: only for step_variants.py.

The first call of a job brings its embeddings, the others go without.
"""

import importlib.util
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

from triton_models import parts

_SERVED = parts.ROOT / "triton_models" / "dit_transformer" / "1" / "model.py"
_spec = importlib.util.spec_from_file_location("dit_transformer", _SERVED)
served = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(served)

KEPT = ("prompt_embeds", "pooled_prompt_embeds")


class WithKept(parts.Inputs):
    """A request's inputs and, where they are absent, what its job has brought before."""

    def __init__(self, inputs: parts.Inputs, kept: dict) -> None:
        self.tensors, self.kept = inputs.tensors, kept

    def __contains__(self, name: str) -> bool:
        return name in self.kept or super().__contains__(name)

    def tensor(self, name: str):
        """Give what was kept without a copy."""
        return self.kept[name] if name in self.kept else super().tensor(name)


class TritonPythonModel(served.TritonPythonModel):
    """Triton's interface; one job is kept at a time, as only one is measured."""

    def initialize(self, arguments) -> None:
        super().initialize(arguments)
        self.kept: dict = {}

    def own(self, inputs: parts.Inputs, name: str):
        return self.kept[name] if name in self.kept else super().own(inputs, name)

    def _take(self, inputs: parts.Inputs, sender) -> None:
        if KEPT[0] in inputs:
            self.kept = {}  # a new job
            self.kept = {name: super(TritonPythonModel, self).own(inputs, name) for name in KEPT}
        super()._take(WithKept(inputs, self.kept), sender)

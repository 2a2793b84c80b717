# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "torch==2.13.0",
#     "diffusers==0.42.1",
#     "transformers==5.23.0",
#     "torchao==0.18.0",
#     "accelerate==1.15.0",
#     "psutil==7.2.2",
# ]
# ///
"""The VAE decoder: packed latents to pixels.

`python model.py --ckpt tiny-dev` checks the component by itself against FluxPipeline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from triton_models import parts
from triton_models.answers import answer
from triton_models.components import Decoder
from triton_models.requests import size_problem


class TritonPythonModel:
    """Triton's interface: the requests of one size in one forward."""

    def initialize(self, arguments) -> None:
        args, values = parts.begin(arguments)
        self.device = args.device
        self.sizes = parts.batch_sizes(values)
        self.decoder = Decoder(args, self.sizes)

    def execute(self, requests) -> list:
        return answer(requests, self._kind, self._rows, self._decode, self.sizes)

    def _kind(self, inputs: parts.Inputs) -> tuple:
        latents, (height, width) = inputs.tensor("latents"), inputs.values("size")[:2]
        if problem := size_problem(latents.shape[1], height, width):
            raise ValueError(problem)
        return height, width

    @staticmethod
    def _rows(inputs: parts.Inputs) -> int:
        return len(inputs.tensor("latents"))

    def _decode(self, kind: tuple, group: list[parts.Inputs]) -> list:
        latents = [inputs.tensor("latents").to(self.device) for inputs in group]
        rows = [len(part) for part in latents]
        pixels = self.decoder(torch.cat(latents) if len(latents) > 1 else latents[0], *kind)
        return [{"images": part} for part in pixels.split(rows)]

    def finalize(self) -> None:
        del self.decoder


if __name__ == "__main__":
    from triton_models.self_check import check_decoder

    check_decoder()

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
"""T5: prompts to one embedding per token, padded to max_sequence_length as FluxPipeline pads.

`python model.py --ckpt tiny-dev` checks the component by itself against FluxPipeline.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from triton_models import parts
from triton_models.answers import answer_texts
from triton_models.components import T5Encoder


class TritonPythonModel:
    """Triton's interface: the requests of one text length in one forward."""

    def initialize(self, arguments) -> None:
        args, values = parts.begin(arguments)
        self.encoder = T5Encoder(args)
        self.sizes = parts.batch_sizes(values)

    def execute(self, requests) -> list:
        return answer_texts(requests, "prompt_embeds", self.encoder, self.sizes)

    def finalize(self) -> None:
        del self.encoder


if __name__ == "__main__":
    from triton_models.self_check import check_t5

    check_t5()

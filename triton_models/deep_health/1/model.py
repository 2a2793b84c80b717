"""Deep health: does every model still compute? Triton's own readiness stays true when a stub dies.

Each model gets the smallest real request that it takes, all at once and within one time limit.
`serve.py` asks here and reloads what does not answer; any other watchdog can.
"""

import sys
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import numpy as np
import torch

from triton_models import parts
from triton_models.calls import call, text

EDGE = 16  # pixels: one token


def requests_of(args) -> dict[str, tuple[dict, str]]:
    """Give each model's smallest request and the output that it must answer with.

    Compiled code is asked for the run's own call, which it has: any other would be compiled first.
    """
    from utils.random_weights import configs_of

    transformer = configs_of(args.checkpoint)["transformer"]
    own = args.height, args.width, args.max_sequence_length
    height, width, tokens = (EDGE, EDGE, 1) if args.compile_export_mode == "disabled" else own
    size = torch.tensor([[height, width]], dtype=torch.int32)
    shape = 1, (height // 16) * (width // 16), transformer["in_channels"]
    latents = torch.zeros(shape, dtype=args.dtype)
    embeds = 1, tokens, transformer["joint_attention_dim"]
    step = {
        "latents": latents,
        "timestep": torch.full((1, 1), 0.5, dtype=args.dtype),
        "prompt_embeds": torch.zeros(embeds, dtype=args.dtype),
        "pooled_prompt_embeds": torch.zeros(
            1, transformer["pooled_projection_dim"], dtype=args.dtype
        ),
        "size": size,
    }
    if transformer.get("guidance_embeds"):
        step["guidance"] = torch.full((1, 1), 1.0)
    length = torch.tensor([[1]], dtype=torch.int32)
    return {
        "clip_encoder": ({"prompt": text("a")}, "pooled_prompt_embeds"),
        "t5_encoder": ({"prompt": text("a"), "max_sequence_length": length}, "prompt_embeds"),
        "dit_transformer": (step, "noise_pred"),
        "vae_decoder": ({"latents": latents, "size": size}, "images"),
        "bls_orchestrator": ({"prompt": text("a")[0], "ping": torch.tensor([True])}, "step"),
    }


class TritonPythonModel:
    """Triton's interface: one line for each model that was asked for, all of them by default."""

    def initialize(self, arguments) -> None:
        args, values = parts.begin(arguments)
        self.requests, self.timeout_s = requests_of(args), float(values["timeout_s"])

    def execute(self, requests) -> list:
        import triton_python_backend_utils as pb_utils

        answers = []
        for request in requests:
            wanted = parts.Inputs(request).value("model", b"").decode(errors="replace")
            names = [name for name in self.requests if wanted in ("", name)]
            if not names:
                known = ", ".join(self.requests)
                wrong = ValueError(f"model: found {wanted[:40]!r}, expected one of {known}")
                error = parts.failure(wrong, "INVALID_ARGUMENT")
                answers.append(pb_utils.InferenceResponse([], error))
                continue
            words = self._ask(names)
            tensors = {
                "healthy": np.array([not line for line in words], dtype=bool),
                "models": np.array([name.encode() for name in names], dtype=np.object_),
                "words": np.array([line.encode() for line in words], dtype=np.object_),
            }
            outputs = [pb_utils.Tensor(name, value) for name, value in tensors.items()]
            answers.append(pb_utils.InferenceResponse(outputs))
        return answers

    def _ask(self, names: list[str]) -> list[str]:
        """Call models at once, in threads that can be left: "" for an answer, else why not."""
        threads = ThreadPoolExecutor(len(names))
        asked = [threads.submit(call, name, *self.requests[name]) for name in names]
        wait(asked, self.timeout_s)
        threads.shutdown(wait=False)
        return [self._verdict(one) for one in asked]

    def _verdict(self, asked: Future) -> str:
        if not asked.done():
            return f"no answer within {self.timeout_s:g} s"
        try:
            finite = torch.isfinite(asked.result().float()).all()
        except Exception as error:
            return " ".join(str(error).split())
        return "" if finite else "answered with NaN or infinity"

"""Three ways to run a denoising loop over the served transformer, timed: step_variants.py asks.

every_step: embeddings and latents travel with every step. kept: the transformer keeps the
embeddings, latents travel. inside: nothing travels between steps, as the orchestrator has it.
"""

import sys
import time
import uuid
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[4]))

import torch

from triton_models import calls, parts
from triton_models.components import Start

KEPT = ("prompt_embeds", "pooled_prompt_embeds")


def inside(fixed: dict, latents, timesteps, lengths) -> tuple[torch.Tensor, float]:
    """Run the loop in the transformer. Returns: latents and the seconds of its forwards"""
    inputs = fixed | {"latents": latents, "timestep": timesteps, "step_lengths": lengths}
    (found,) = calls.responses("dit_transformer", inputs, ["latents", "forward_s"])
    return _tensor(found, "latents"), _tensor(found, "forward_s").item()


def stepwise(model: str, fixed: dict, kept: bool, latents, timesteps, lengths):
    """Run the loop here, one call for each step. Returns: as inside()"""
    forward_s = 0.0
    for step in range(timesteps.shape[1]):
        inputs = fixed | {"latents": latents, "timestep": timesteps[:, step : step + 1]}
        if kept and step:
            inputs = {name: value for name, value in inputs.items() if name not in KEPT}
        (found,) = calls.responses(model, inputs, ["noise_pred", "forward_s"])
        velocity = _tensor(found, "noise_pred")
        latents = (latents.float() + lengths[0, step] * velocity).to(velocity.dtype)
        forward_s += _tensor(found, "forward_s").item()
    return latents, forward_s


def _tensor(found: dict, name: str) -> torch.Tensor:
    return torch.from_dlpack(found[name].to_dlpack())


class TritonPythonModel:
    """Triton's interface: one run for each request."""

    def initialize(self, arguments) -> None:
        from utils.random_weights import configs_of

        self.args, _ = parts.begin(arguments)
        self.start = Start(self.args)
        calls.DECOUPLED.add("dit_kept")
        self.config = configs_of(self.args.checkpoint)["transformer"]

    def execute(self, requests) -> list:
        import triton_python_backend_utils as pb_utils

        answers = []
        for request in requests:
            inputs = parts.Inputs(request)
            tensors = self._run(inputs.value("variant").decode(), inputs.value("steps"))
            outputs = [parts.outgoing(name, tensor) for name, tensor in tensors.items()]
            answers.append(pb_utils.InferenceResponse(outputs))
        return answers

    def _run(self, variant: str, steps: int) -> dict:
        args, generator = self.args, torch.Generator().manual_seed(0)
        text, channels, pooled = (
            args.max_sequence_length,
            self.config["joint_attention_dim"],
            self.config["pooled_projection_dim"],
        )
        fixed = {
            "job": calls.text(uuid.uuid4().hex),
            "size": torch.tensor([[args.height, args.width]], dtype=torch.int32),
            "prompt_embeds": torch.randn(1, text, channels, generator=generator).to(args.dtype),
            "pooled_prompt_embeds": torch.randn(1, pooled, generator=generator).to(args.dtype),
        }
        if self.config.get("guidance_embeds"):
            fixed["guidance"] = torch.full((1, 1), 3.5)
        latents = self.start.noise(args.height, args.width, 0)
        timesteps, lengths = self.start.levels(args.height, args.width, steps)
        run = {
            "every_step": lambda *loop: stepwise("dit_transformer", fixed, False, *loop),
            "kept": lambda *loop: stepwise("dit_kept", fixed, True, *loop),
            "inside": lambda *loop: inside(fixed, *loop),
        }[variant]
        clock = time.perf_counter()
        latents, forward_s = run(latents, timesteps, lengths)
        seconds = time.perf_counter() - clock
        numbers = {"seconds": seconds, "forward_s": forward_s}
        return {n: torch.tensor([v], dtype=torch.float32) for n, v in numbers.items()} | {
            "latents": latents.float()
        }

    def finalize(self) -> None:
        del self.start

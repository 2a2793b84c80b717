"""Heun's method on the schedule of FLUX.1's own scheduler.

diffusers' FlowMatchHeunDiscreteScheduler takes neither the sigmas nor the shift `mu` that
FluxPipeline passes, so only its schedule is replaced here; its steps are its own.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler


class ShiftedHeun(FlowMatchHeunDiscreteScheduler):
    """Two evaluations a step but for the last, which is Euler's: 2 N - 1 in all."""

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Take Euler's sigmas, shifted as the config says, each but first and last twice.

        The steps decide by the values of the sigmas, so these stay on the host, as in diffusers'
        other solvers: on a GPU each step would wait for them.

        Shapes: timesteps (2 N - 1,), sigmas (2 N,), the last 0
        """
        euler = FlowMatchEulerDiscreteScheduler.from_config(self.config)
        euler.set_timesteps(num_inference_steps, "cpu", sigmas, mu)
        first, inner, last = euler.sigmas[:1], euler.sigmas[1:-1], euler.sigmas[-1:]
        self.sigmas = torch.cat([first, inner.repeat_interleave(2), last])
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self.num_inference_steps = len(euler.timesteps)
        self.prev_derivative = self.dt = None
        self._step_index = self._begin_index = None

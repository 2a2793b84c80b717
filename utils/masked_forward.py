"""A transformer that is called in some steps of a loop; its velocity in the others is predicted.

The mask is known before the loop, so the host never waits for a decision, and the forward behind it
may be anything: eager, compiled, a package, a CUDA graph. What is kept between steps belongs to one
call of the pipeline and goes with it, however it ends. Euler's sum over predicted velocities is a
linear multistep method (Adams and Bashforth's) on a coarser grid, rounded as the full loop rounds;
with order 0 it is fewer and longer Euler steps.

Source: what a step computes, predicted in time as TaylorSeer does it (arXiv:2503.06923); here the
output, by Lagrange's polynomial, which is exact for unequal distances too. With order 1 a gain of
0.5 is HiCache's scaled Hermite polynomial (arXiv:2508.16984, scale 0.5).
"""

import inspect
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager

from diffusers import FluxKontextPipeline, FluxPipeline

from utils.denoise import NEEDS_STOCK_LOOP, TRUE_CFG, OwnLoop, scheduler_problem
from utils.errors import UserError
from utils.steps import own_class

FLAG = "leave out --step_mask"
REFUSED = {name: why for name, why in NEEDS_STOCK_LOOP.items() if why == TRUE_CFG}
REFUSED["callback_on_step_end"] = "a callback may change what the predictions rest on"


def weights(points: tuple[int, ...], at: int) -> list[float]:
    """Give each point's weight in the polynomial through all of them, at another place (Lagrange).

    Units: numbers of steps
    """
    found = []
    for point in points:
        weight = 1.0
        for other in points:
            if other != point:
                weight *= (at - other) / (point - other)
        found.append(weight)
    return found


class MaskedForward:
    """Replace a transformer's forward: compute a step, or predict it from the computed ones.

    `mask_of(steps)` gives the mask. The prediction is a polynomial of degree `order`, `gain` times
    the change that it foretells; or, where `table` is given, the sum with its weights: predicted
    step -> those of the last computed steps, oldest first (utils/calibrate.py). `used` tells what
    the last call did.
    """

    def __init__(
        self,
        forward: Callable,
        mask_of: Callable,
        order: int,
        gain: float = 1.0,
        table: dict[int, tuple[float, ...]] | None = None,
    ) -> None:
        self.forward, self.mask_of = forward, mask_of
        self.order, self.gain, self.table = order, gain, table
        self.mask: tuple[bool, ...] | None = None  # of the call that is running
        self.used: dict[str, list[int]] = {"computed": [], "reused": []}

    @contextmanager
    def call(self, steps: int):
        """Begin a call of so many steps; nothing of it is left afterwards.

        Raises: UserError for a number of steps that the mask does not fit.
        """
        try:
            self.mask = self.mask_of(steps)
        except ValueError as error:
            raise UserError(f"--step_mask: {error}") from None
        self.used = {"computed": [], "reused": []}
        self.known: deque[tuple] = deque(maxlen=self.order + 1)  # (step, velocity)
        self.step = 0
        try:
            yield
        finally:
            self.mask = None
            self.known.clear()

    def __call__(self, *args, **kwargs):
        """Give the velocity of the next step, as (velocity,); outside of a call compute it.

        Raises: RuntimeError if a loop calls more than once a step.
        """
        if self.mask is None:
            return self.forward(*args, **kwargs)
        step, self.step = self.step, self.step + 1
        if step >= len(self.mask):
            raise RuntimeError(f"step mask: forward {step + 1} of a call of {step} steps")
        if not self.mask[step]:
            velocity = self.predict(step)
            self.used["reused"].append(step)
            return (velocity,)
        out = self.forward(*args, **kwargs)
        self.known.append((step, out[0]))
        self.used["computed"].append(step)
        return out

    def predict(self, step: int):
        """Extrapolate; with fewer computed steps than the order needs, by a lower order.

        Shapes: (B, S, C), summed in fp32 and given in the model's dtype
        """
        if self.table is None:
            parts = [self.gain * w for w in weights(tuple(point for point, _ in self.known), step)]
            parts[-1] += 1 - self.gain  # the weights add up to 1
        else:
            parts = self.table[step]
        total = sum(part * v.float() for part, (_, v) in zip(parts, self.known, strict=True))
        return total.to(self.known[-1][1].dtype)


class MaskedCall:
    """Mixin before a pipeline's class: begins and ends the masked forward with every call."""

    def __call__(self, *args, **kwargs):
        """Take the arguments of the stock call and give what it gives, with the mask's steps.

        Raises: UserError for an argument that the mask cannot follow, or another number of steps.
        """
        stock = FluxKontextPipeline if isinstance(self, FluxKontextPipeline) else FluxPipeline
        bound = inspect.signature(stock.__call__).bind(self, *args, **kwargs)
        bound.apply_defaults()
        call = bound.arguments
        for name, why in REFUSED.items():
            if call[name] is not None:
                raise UserError(f"{name}: {why}; {FLAG}")
        steps = call["num_inference_steps"] if call["sigmas"] is None else len(call["sigmas"])
        with self.masked.call(steps):
            return super().__call__(*args, **kwargs)


def install(pipeline, mask_of: Callable, order: int, gain: float, table=None) -> None:
    """Put a mask before this pipeline's transformer, whatever its forward is by now.

    Raises: UserError for another kind of loop or scheduler.
    """
    found = type(pipeline)
    loops = (FluxPipeline, FluxKontextPipeline, OwnLoop)
    if found.__call__ not in [loop.__call__ for loop in loops]:
        raise UserError(
            f"--step_mask: found a {found.__name__}, expected FluxPipeline or FluxKontextPipeline, "
            f"whose loops call the transformer once a step; {FLAG}"
        )
    if problem := scheduler_problem(pipeline.scheduler):
        raise UserError(f"--step_mask: {problem}; {FLAG}")
    pipeline.masked = MaskedForward(pipeline.transformer.forward, mask_of, order, gain, table)
    pipeline.transformer.forward = pipeline.masked
    own_class(pipeline, MaskedCall)

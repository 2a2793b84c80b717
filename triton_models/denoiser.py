"""The denoising loop of many requests at once: each step takes whatever rows fit together.

A request is a job: one row or more of latents with its own prompt, noise levels and number of
steps. Before every forward the worker groups the jobs of one kind (size, text length, guidance or
none), so that a job which arrives while others are at step 12 joins them at its own step 0, and
none waits for another's end. Kinds take turns. Embeddings are held here for as long as their job
runs; nothing but the first call carries them.

Rows never mix: each keeps its own timestep, guidance and text. A forward of one row is bit for bit
FluxPipeline's; in a larger batch the same products are summed in another order.

Source: Yu et al. 2022, Orca (OSDI): scheduling by iteration; Euler's step as in utils/denoise.py
"""

import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


@dataclass(eq=False)
class Job:
    """Rows that are denoised together.

    Shapes: latents (B, S, C); timesteps (B, N), 1 to 0, in the model's dtype; lengths (B, N) fp32
        or None, which asks for the velocity of one step; guidance (B,) fp32 or None; prompt_embeds
        (B, T, D); pooled (B, P)
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    lengths: torch.Tensor | None
    guidance: torch.Tensor | None
    prompt_embeds: torch.Tensor
    pooled: torch.Tensor
    height: int  # pixels
    width: int
    done: Callable[["Job", Exception | None], None]
    after_step: Callable[["Job"], None] = lambda job: None
    is_cancelled: Callable[[], bool] = lambda: False
    step: int = 0
    batches: list[int] = field(default_factory=list)  # rows of each forward it was part of
    forward_s: float = 0.0  # its share of those forwards
    queue_s: float = 0.0  # while others' forwards ran, or none
    ready_at: float = field(default_factory=time.perf_counter)  # since when it has waited

    @property
    def rows(self) -> int:
        return len(self.latents)

    @property
    def kind(self) -> tuple:
        """What rows of one forward have in common; nothing that cannot be joined shares one."""
        tensors = self.latents, self.prompt_embeds, self.pooled
        shapes = tuple(tensor.shape[1:] for tensor in tensors)
        return self.height, self.width, shapes, self.guidance is None


class Cancelled(Exception):
    """The client has gone away, or asked to stop."""


class Denoiser:
    """One thread that runs the transformer for all jobs.

    `forward(latents, timestep, guidance, prompt_embeds, pooled, height, width)` gives the velocity.
    """

    def __init__(self, forward: Callable, batch_sizes: tuple[int, ...]) -> None:
        self.forward, self.batch_sizes = forward, tuple(sorted(batch_sizes))
        self.arriving: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self.jobs: list[Job] = []
        self.thread = threading.Thread(target=self._work, name="denoiser", daemon=True)
        self.thread.start()

    def submit(self, job: Job) -> None:
        """Take a job; its callbacks are called from the worker's thread.

        Raises: ValueError if it has more rows than the largest batch.
        """
        if job.rows > self.batch_sizes[-1]:
            raise ValueError(
                f"latents: found {job.rows} rows, expected at most {self.batch_sizes[-1]}"
            )
        self.arriving.put(job)

    def close(self) -> None:
        """Finish what is there, then stop."""
        self.arriving.put(None)
        self.thread.join()

    def _work(self) -> None:
        closing = False
        while not closing or self.jobs:
            while not closing and (not self.jobs or not self.arriving.empty()):
                job = self.arriving.get()
                closing = job is None
                if job is not None:
                    self.jobs.append(job)
            self._drop_cancelled()
            if self.jobs:
                self._step(self._choose())

    def _drop_cancelled(self) -> None:
        for job in [job for job in self.jobs if job.is_cancelled()]:
            self._end(job, Cancelled(f"cancelled at step {job.step}"))

    def _choose(self) -> list[Job]:
        """Take the longest waiting job and others of its kind, as many rows as a batch size has."""
        kind, chosen, rows = self.jobs[0].kind, [], 0
        for job in self.jobs:
            if job.kind == kind and rows + job.rows <= self.batch_sizes[-1]:
                chosen.append(job)
                rows += job.rows
        while rows not in self.batch_sizes and len(chosen) > 1:
            rows -= chosen.pop().rows
        return chosen

    def _step(self, jobs: list[Job]) -> None:
        """Run one forward for these jobs and move each by its own step; then they queue again."""
        for job in jobs:
            self.jobs.remove(job)
            self.jobs.append(job)
        clock = time.perf_counter()
        for job in jobs:
            job.queue_s += clock - job.ready_at
        try:
            velocity = self._velocity(jobs)
            seconds = time.perf_counter() - clock  # on a GPU: until it was queued
            parts = velocity.split([job.rows for job in jobs])
            moved = [_moved(job, own) for job, own in zip(jobs, parts, strict=True)]
        except Exception as error:  # a failed forward fails its jobs, not the server
            for job in jobs:
                self._end(job, error)
            return
        for job, latents in zip(jobs, moved, strict=True):
            job.batches.append(len(velocity))
            job.forward_s += seconds * job.rows / len(velocity)
            job.latents = latents
            job.step += 1
            job.ready_at = time.perf_counter()
            if job.step == job.timesteps.shape[1]:
                self._end(job, None)
            else:
                try:
                    job.after_step(job)
                except Exception as error:  # nobody can be told any more
                    self._end(job, error)

    @torch.no_grad()
    def _velocity(self, jobs: list[Job]) -> torch.Tensor:
        def together(parts: list):
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        guided = jobs[0].guidance is not None
        return self.forward(
            latents=together([job.latents for job in jobs]),
            timestep=together([job.timesteps[:, job.step] for job in jobs]),
            guidance=together([job.guidance for job in jobs]) if guided else None,
            prompt_embeds=together([job.prompt_embeds for job in jobs]),
            pooled=together([job.pooled for job in jobs]),
            height=jobs[0].height,
            width=jobs[0].width,
        )

    def _end(self, job: Job, error: Exception | None) -> None:
        self.jobs.remove(job)
        try:
            job.done(job, error)
        except Exception as failed:  # the worker outlives a reply that cannot be sent
            print(f"denoiser: a reply could not be sent: {failed}", file=sys.stderr, flush=True)


def _moved(job: Job, velocity: torch.Tensor) -> torch.Tensor:
    """Give a job's latents after its step, or the velocity itself if that is what it wants.

    As the scheduler rounds: the product in the model's dtype, the sum in fp32.
    """
    if job.lengths is None:
        return velocity
    length = job.lengths[:, job.step, None, None]
    return (job.latents.float() + _times(length, velocity)).to(velocity.dtype)


def _times(length: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """Multiply each row as the scheduler does: a 0-dim fp32 tensor first.

    On a CPU the order counts: a scalar that comes second is not rounded to bf16.

    Shapes: length (B, 1, 1); velocity (B, S, C)
    """
    return torch.cat(
        [one.reshape(()) * own for own, one in zip(velocity.split(1), length, strict=True)]
    )

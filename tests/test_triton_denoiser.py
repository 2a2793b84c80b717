"""The served denoiser alone: requests join each other's steps, fail and are cancelled."""

import threading
from types import SimpleNamespace

import pytest
import torch

from triton_models.denoiser import Cancelled, Denoiser, Job


class Velocity:
    """A transformer whose velocity tells the rows apart: guidance times the row's own latents."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()

    def __call__(self, latents, timestep, guidance, prompt_embeds, pooled, height, width):
        assert self.gate.wait(600)
        self.batches.append(timestep.tolist())
        assert (
            len({tuple(row) for row in (latents.shape, (len(latents), height * width // 256, 1))})
            == 1
        )
        return guidance[:, None, None] * latents


def _job(number: float, steps: int, height: int = 64, width: int = 32, **more) -> tuple[Job, list]:
    tokens, ended = height * width // 256, []
    job = Job(
        torch.full((1, tokens, 1), number),
        torch.linspace(1, 1 / steps, steps)[None],
        torch.full((1, steps), -1.0 / steps),
        torch.tensor([number]),
        torch.zeros(1, 4, 1),
        torch.zeros(1, 1),
        height,
        width,
        done=lambda job, error: ended.append((job, error)),
        **more,
    )
    return job, ended


def test_requests_join_each_others_steps_and_never_mix():
    velocity = Velocity()
    denoiser = Denoiser(velocity, (1, 2))
    jobs = [_job(1.0, 4), _job(2.0, 2), _job(3.0, 3, 32, 64), _job(0.5, 4)]
    for job, _ in jobs:
        denoiser.submit(job)
    velocity.gate.set()
    denoiser.close()
    for job, ended in jobs:
        assert ended == [(job, None)]
        number, steps = job.guidance.item(), job.timesteps.shape[1]
        expected = number * (1 - number / steps) ** steps  # Euler's method on dx/dt = g x
        torch.testing.assert_close(job.latents, torch.full_like(job.latents, expected))
    together = [batch for batch in velocity.batches if len(batch) == 2]
    assert together and any(a != b for a, b in together), velocity.batches  # at different steps
    assert sum(len(batch) for batch in velocity.batches) == 4 + 2 + 3 + 4
    assert all(batches <= 2 for job, _ in jobs for batches in job.batches)
    assert all(job.queue_s > 0 for job, _ in jobs)  # all waited for the gate


def test_one_step_gives_the_velocity():
    velocity = Velocity()
    velocity.gate.set()
    denoiser = Denoiser(velocity, (1,))
    job, ended = _job(2.0, 1)
    job.lengths = None
    denoiser.submit(job)
    denoiser.close()
    assert ended == [(job, None)] and torch.equal(job.latents, torch.full((1, 8, 1), 4.0))


def test_a_cancelled_job_stops_at_its_next_step():
    velocity, gone = Velocity(), threading.Event()
    denoiser = Denoiser(velocity, (1, 2))
    left, ended = _job(1.0, 50, is_cancelled=gone.is_set, after_step=lambda job: gone.set())
    whole, finished = _job(2.0, 2, 32, 32)
    for job in (left, whole):
        denoiser.submit(job)
    velocity.gate.set()
    denoiser.close()
    assert isinstance(ended[0][1], Cancelled) and left.step == 1
    assert finished == [(whole, None)]
    with pytest.raises(ValueError, match="found 3 rows, expected at most 2"):
        denoiser.submit(SimpleNamespace(rows=3))


def test_a_job_of_wrong_shapes_fails_alone():
    """Whoever calls the transformer directly may send anything; others' forwards go on."""

    def checked(**inputs) -> torch.Tensor:
        if inputs["pooled"].shape[1:] != (1,):
            raise RuntimeError("shapes cannot be multiplied")
        return velocity(**inputs)

    velocity = Velocity()
    velocity.gate.set()
    denoiser = Denoiser(checked, (1, 2))
    (broken, failed), (whole, finished) = _job(1.0, 2), _job(2.0, 2)
    broken.pooled = torch.zeros(1, 3)
    for job in (broken, whole):
        denoiser.submit(job)
    denoiser.close()
    assert failed[0][0] is broken and "cannot be multiplied" in str(failed[0][1])
    assert finished == [(whole, None)]


def test_what_fails_behind_a_forward_leaves_the_worker_alive():
    """A GPU says there what went wrong in the forward."""
    denoiser = Denoiser(lambda **inputs: torch.zeros(0, 8, 1), (1,))
    jobs = [_job(1.0, 2), _job(2.0, 2)]
    for job, _ in jobs:
        denoiser.submit(job)
    denoiser.close()
    assert [len(ended) for _, ended in jobs] == [1, 1]
    assert all(isinstance(ended[0][1], RuntimeError) for _, ended in jobs)

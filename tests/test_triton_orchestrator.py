"""The orchestrator's own file without a server: what it counts, answers, stops, and when."""

import contextlib
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
from test_triton_model_files import Sender, model_of, triton_module
from test_triton_parts import Given

from triton_models import parts, requests, watch


def test_jobs_that_wait_for_a_thread_are_cancelled_with_their_request(monkeypatch):
    """The transformer does not know them yet, so that their name stops nothing."""
    args = parts.settings(["--ckpt", "tiny-dev", "--device", "cpu"])
    orchestrator, begun, gate = model_of("bls_orchestrator"), [], threading.Event()

    def job(image: int, inputs: dict, tell) -> None:
        begun.append(image)
        gate.wait(600)

    def cancel(name: str) -> None:
        gate.set()
        raise RuntimeError("dit_transformer: its stub is dead")

    monkeypatch.setattr(orchestrator, "_denoising_job", job)
    monkeypatch.setattr(orchestrator.calls, "cancel", cancel)
    model = orchestrator.TritonPythonModel()
    model.start, model.callers = orchestrator.Start(args), ThreadPoolExecutor(1)
    model.limits = requests.Limits()
    given = Given(prompt=[b"a"], num_images_per_prompt=4, num_inference_steps=1)
    wanted = requests.read(given, args, model.limits)
    left = SimpleNamespace(is_cancelled=lambda: bool(begun))
    with pytest.raises(orchestrator.Stopped):
        model._denoise(wanted, [None], [None], left, time.perf_counter() + 60)
    model.callers.shutdown()
    assert begun == [0]


@pytest.mark.parametrize(
    ("ends", "outcome", "word"),
    [
        (None, "ok", None),
        (TimeoutError("late"), "timeout", "late"),
        (ValueError("no"), "failed", "no"),
        ("Stopped", "cancelled", "gone"),
        ("unsendable", "failed", "an array of objects"),
    ],
)
def test_a_request_is_counted_and_its_place_free_before_its_answer(
    monkeypatch, ends, outcome, word
):
    """Whoever has an answer can ask again, and read its count, at once."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_module())
    orchestrator, told, counted = model_of("bls_orchestrator"), [], []

    def make(*_) -> dict:
        if ends == "Stopped":
            raise orchestrator.Stopped("gone")
        if isinstance(ends, Exception):
            raise ends
        return {"images": None} if ends == "unsendable" else {}

    def tensors_of(tensors: dict) -> list:
        if tensors:
            raise TypeError("an array of objects")
        return []

    monkeypatch.setattr(orchestrator.calls, "tensors_of", tensors_of)
    model = orchestrator.TritonPythonModel()
    model.limits, model.lock, model.in_flight, model._make = requests.Limits(), Lock(), 1, make
    model.metrics = SimpleNamespace(
        waited=lambda seconds: None,
        images=lambda count: counted.append(count),
        request=lambda outcome: counted.append(outcome),
    )

    def send(response=None, flags: int = 0) -> None:
        told.append((model.in_flight, list(counted), response and response.error, flags))

    model._serve(SimpleNamespace(images=3), SimpleNamespace(send=send), time.perf_counter())
    places, counts, error, _ = told[0]
    assert (places, told[-1][-1]) == (0, 1)
    assert counts == ([3, "ok"] if outcome == "ok" else [outcome])
    assert (word is None and error is None) or word in error


@pytest.mark.parametrize("counter_fails", [False, True])
@pytest.mark.parametrize("room", [True, False])
def test_every_request_is_answered_and_ended(monkeypatch, room, counter_fails):
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_module())
    orchestrator, sender = model_of("bls_orchestrator"), Sender(room)

    def counted(*_) -> None:
        if counter_fails:
            raise RuntimeError("a counter is gone")

    model = orchestrator.TritonPythonModel()
    model.limits, model.lock, model.in_flight = requests.Limits(), Lock(), 1
    model._make = lambda *_: {}
    model.metrics = SimpleNamespace(waited=lambda s: None, images=lambda n: None, request=counted)
    with contextlib.suppress(RuntimeError):
        model._serve(SimpleNamespace(images=1), sender, time.perf_counter())
    assert sender.closed and sender.sent == 1 and model.in_flight == 0
    assert sender.errors == ([] if room else ["INTERNAL: no shared memory"])


@pytest.mark.parametrize("hangs", ["t5_encoder", "dit_transformer", "vae_decoder"])
def test_a_model_that_hangs_costs_a_request_its_time_and_no_more(monkeypatch, hangs):
    """The transformer answers no cancellation then either."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_module())
    orchestrator, sender, gate = model_of("bls_orchestrator"), Sender(True), threading.Event()
    sender.is_cancelled = lambda: False

    def call(model: str, *_) -> torch.Tensor:
        return gate.wait(600) if model == hangs else torch.zeros(1)

    def job(image: int, inputs: dict, tell) -> None:
        numbers = dict.fromkeys(orchestrator.JOB_NUMBERS, 0.0)
        tell(orchestrator.News(image, 1, call("dit_transformer"), numbers))

    monkeypatch.setattr(orchestrator.calls, "call", call)
    monkeypatch.setattr(orchestrator, "_denoising_job", job)
    monkeypatch.setattr(orchestrator.calls, "cancel", lambda name: call("dit_transformer"))
    args = parts.settings(["--ckpt", "tiny-dev", "--device", "cpu"])
    model = orchestrator.TritonPythonModel()
    model.start, model.callers = orchestrator.Start(args), ThreadPoolExecutor(2)
    model.limits, model.lock, model.in_flight = requests.Limits(timeout_s=1.0), Lock(), 1
    nothing = SimpleNamespace(
        waited=lambda seconds: None, request=lambda outcome: None, denoised=lambda *_, **__: None
    )
    nothing.stage = lambda name: contextlib.nullcontext()
    model.metrics = nothing
    wanted = requests.read(Given(prompt=[b"a"], num_inference_steps=1), args, model.limits)
    model._serve(wanted, sender, time.perf_counter())
    assert sender.errors == ["UNAVAILABLE: not done after 1 s; retry later"]
    gate.set()
    assert model.callers.submit(lambda: "free").result() == "free"  # on threads that do not wait
    model.callers.shutdown()


def test_a_job_that_the_transformer_has_lost_is_an_error(monkeypatch):
    """Its process was killed, and another loaded: Triton never ends the call."""
    monkeypatch.setattr(watch, "WATCH_S", 0.0)
    orchestrator, gate, asked = model_of("bls_orchestrator"), threading.Event(), []

    def ask(name: str) -> None:
        asked.append(name)
        if len(asked) != 2:  # two in a row: one may have crossed the job's last answer
            raise RuntimeError("job: found none of this name that runs")

    monkeypatch.setattr(orchestrator, "_denoising_job", lambda *_: gate.wait(600))
    monkeypatch.setattr(orchestrator.calls, "ask", ask)
    monkeypatch.setattr(orchestrator.calls, "cancel", lambda name: None)
    args = parts.settings(["--ckpt", "tiny-dev", "--device", "cpu"])
    model = orchestrator.TritonPythonModel()
    model.start, model.limits = orchestrator.Start(args), requests.Limits(max_in_flight=1)
    model._new_callers()
    wanted = requests.read(Given(prompt=[b"a"], num_images_per_prompt=2), args, model.limits)
    there = SimpleNamespace(is_cancelled=lambda: False)
    with pytest.raises(RuntimeError, match="has lost the job; job: found none of this name"):
        model._denoise(wanted, [None], [None], there, time.perf_counter() + 600)
    assert len(asked) == 4 and len(set(asked)) == 1
    assert model.callers.submit(lambda: "free").result() == "free"
    gate.set()


def test_a_job_that_ends_without_latents_is_an_error(monkeypatch):
    """Its request would wait for them until its time is up."""
    orchestrator, told = model_of("bls_orchestrator"), []
    monkeypatch.setattr(orchestrator.calls, "responses", lambda *_: [])
    orchestrator._denoising_job(3, {}, told.append)
    assert [(one.image, str(one.error)) for one in told] == [
        (3, "dit_transformer: ended without latents")
    ]


def test_every_step_is_told_though_some_come_together(monkeypatch):
    """A question may come before its job, and find it two steps further."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_module())
    orchestrator, sent, seen = model_of("bls_orchestrator"), [], threading.Event()
    found = iter([RuntimeError("none"), 1, 3])

    def step_after(name: str, step: int) -> int:
        if isinstance(one := next(found, RuntimeError("none")), Exception):
            raise one
        if one == 3:
            seen.set()
        return one

    def job(image: int, inputs: dict, tell) -> None:
        seen.wait(600)
        numbers = dict.fromkeys(orchestrator.JOB_NUMBERS, 0.0)
        tell(orchestrator.News(image, 4, torch.zeros(1), numbers))

    monkeypatch.setattr(orchestrator.calls, "step_after", step_after)
    monkeypatch.setattr(orchestrator, "_denoising_job", job)
    monkeypatch.setattr(orchestrator, "_response", lambda tensors: tensors)
    monkeypatch.setattr(parts, "send", lambda sender, tensors: sent.append(int(tensors["step"])))
    args = parts.settings(["--ckpt", "tiny-dev", "--device", "cpu"])
    model = orchestrator.TritonPythonModel()
    model.start, model.limits = orchestrator.Start(args), requests.Limits(max_in_flight=1)
    model.metrics = SimpleNamespace(denoised=lambda *_, **__: None)
    model._new_callers()
    given = Given(prompt=[b"a"], num_inference_steps=4, progress=True)
    wanted = requests.read(given, args, model.limits)
    there = SimpleNamespace(is_cancelled=lambda: False)
    model._denoise(wanted, [None], [None], there, time.perf_counter() + 600)
    model.callers.shutdown()
    assert sent == [1, 2, 3, 4]

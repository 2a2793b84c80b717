"""The other models' own files without a server: whose fault an error is, cancellation, health."""

import importlib.util
import queue
import sys
import threading
import weakref
from collections import deque
from concurrent import futures
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_errors import wait_for
from test_triton_denoiser import Velocity

from triton_models import calls, parts, repository
from triton_models.denoiser import Denoiser


def model_of(name: str):
    """Import a served model's own file."""
    spec = importlib.util.spec_from_file_location(name, repository.HERE / name / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Asked:
    """A Triton request of the transformer, and what it was answered."""

    def __init__(self, **tensors) -> None:
        self.tensors, self.errors = tensors, []

    def inputs(self) -> list:
        def tensor(name: str, value):
            return SimpleNamespace(
                name=lambda: name, as_numpy=lambda: np.array(value), to_dlpack=lambda: value
            )

        return [tensor(name, value) for name, value in self.tensors.items()]

    def get_response_sender(self) -> "Asked":
        return self

    def send(self, response=None, flags: int = 0) -> None:
        self.errors += [response.error] if response else []


def triton_module() -> SimpleNamespace:
    """What Triton's own module has for answers."""
    triton = SimpleNamespace(
        TritonError=lambda words, code: words,
        InferenceResponse=lambda outputs, error=None: SimpleNamespace(
            error=error, has_error=lambda: error is not None, output_tensors=lambda: outputs
        ),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    codes = ("INVALID_ARG", "INTERNAL", "UNAVAILABLE", "CANCELLED")
    vars(triton.TritonError).update(dict.fromkeys(codes))
    return triton


class Sender:
    """Triton's: given the final flag it takes nothing more, sent or not. Answers can be too big."""

    def __init__(self, room: bool) -> None:
        self.room, self.closed, self.errors, self.sent = room, False, [], 0
        self.endless = 0  # errors that did not end the request, whose caller never sees its end
        self.ended = threading.Event()

    def send(self, response=None, flags: int = 0) -> None:
        if self.closed:
            raise RuntimeError("Response sender has been closed")
        self.closed = bool(flags)
        if response and response.error is None and not self.room:
            raise RuntimeError("no shared memory")
        self.sent += response is not None
        self.errors += [response.error] if response and response.error else []
        self.endless += bool(response and response.error and not flags)
        if flags:
            self.ended.set()


@pytest.fixture
def transformer(monkeypatch):
    """Give the transformer's model over a velocity that waits for its gate; closed in the end."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_module())
    model = model_of("dit_transformer").TritonPythonModel()
    model.transformer, model.device, model.lock = SimpleNamespace(guided=False), "cpu", Lock()
    model.running, model.cancelled, model.stopped = {}, set(), deque(maxlen=2)
    model.asking, model.steps = {}, queue.SimpleQueue()
    threading.Thread(target=model._tell_steps, daemon=True).start()
    model.velocity = Velocity()
    model.denoiser = Denoiser(model.velocity, (1, 2))
    yield model
    model.velocity.gate.set()
    model.finalize()


def _given(rows: int = 1, job: bytes = b"a") -> dict:
    return {
        "latents": torch.zeros(rows, 1, 1),
        "timestep": torch.ones(rows, 1),
        "size": [[16, 16]] * rows,
        "prompt_embeds": torch.zeros(rows, 1, 1),
        "pooled_prompt_embeds": torch.zeros(rows, 1),
        "job": job,
    }


def test_the_transformer_says_whose_fault_it_is_and_forgets_what_it_refused(
    transformer, monkeypatch
):
    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    unnamed, large, unlucky = Asked(cancel=True), Asked(**_given(3)), Asked(**_given())
    none = Asked(**_given() | {"timestep": torch.ones(1, 0), "step_lengths": torch.ones(1, 0)})
    transformer.execute([unnamed, large, none])
    monkeypatch.setattr(transformer, "own", full)
    transformer.execute([unlucky])
    assert unnamed.errors == [
        "INVALID_ARGUMENT: job: found nothing, expected the name of the job to cancel"
    ]
    assert large.errors == ["INVALID_ARGUMENT: latents: found 3 rows, expected at most 2"]
    assert none.errors == ["INVALID_ARGUMENT: timestep: found 0, expected 1 to 100"]
    assert unlucky.errors == ["INTERNAL: CUDA out of memory"]
    assert transformer.running == {} and not transformer.cancelled


def test_a_cancellation_that_overtakes_its_job_stops_it(transformer):
    """The orchestrator's calls run in threads; only the newest names are kept."""
    cancel = [Asked(job=name, cancel=True) for name in (b"a", b"b")]
    late, other = Asked(**_given()), Asked(**_given(job=b"c"))
    transformer.execute([*cancel, late, other])
    assert late.errors == ["CANCELLED: cancelled before it came"]
    assert other.errors == [] and list(transformer.running) == ["c"]
    here, gone = (Asked(job=name, cancel=False) for name in (b"c", b"a"))
    transformer.execute([here, gone])
    assert here.errors == []
    assert gone.errors == ["INVALID_ARGUMENT: job: found none of this name that runs"]
    transformer.execute([Asked(job=b"d", cancel=True), again := Asked(**_given())])
    assert again.errors == []


@pytest.mark.parametrize("failing", ["making", "sending"])
def test_latents_that_cannot_be_sent_are_an_error(transformer, monkeypatch, failing):
    sender = Sender(room=failing == "making")

    def outgoing(name: str, tensor):
        if failing == "making":
            raise RuntimeError("CUDA error")
        return name

    monkeypatch.setattr(parts, "outgoing", outgoing)
    transformer.denoiser.forward = lambda **inputs: inputs["latents"]
    given = {"timestep": torch.ones(1, 2), "step_lengths": torch.ones(1, 2)}
    given |= {name: value for name, value in _given().items() if name not in given}
    transformer._take(parts.Inputs(Asked(**given)), sender)
    assert sender.ended.wait(600)
    words = {"making": "CUDA error", "sending": "no shared memory"}[failing]
    assert (sender.errors, sender.closed) == ([f"INTERNAL: {words}"], True)
    assert not sender.endless


def test_a_step_is_told_when_the_slowest_image_has_taken_it(transformer, monkeypatch):
    """Once for each question, and at the latest when the last has ended."""
    monkeypatch.setattr(parts, "outgoing", lambda name, tensor: (name, tensor))
    turns, answers, begun = threading.Semaphore(0), queue.SimpleQueue(), threading.Event()

    def forward(**inputs) -> torch.Tensor:
        begun.set()
        turns.acquire()
        return inputs["latents"]

    def send(response, flags: int) -> None:
        ((name, tensor),) = response.output_tensors()
        answers.put((name, int(tensor), flags))

    transformer.denoiser.forward = forward
    transformer._take(parts.Inputs(Asked(**_given(job=b"before"))), Sender(True))
    assert begun.wait(600)  # so that the two come together, and then take turns
    wide = {"timestep": torch.ones(1, 2), "step_lengths": torch.ones(1, 2)}
    for size in ([16, 16], [16, 32]):  # never in one forward
        tokens = size[1] // 16
        own = wide | {"latents": torch.zeros(1, tokens, 1), "size": [size]}
        transformer._take(parts.Inputs(Asked(**_given() | own)), Sender(True))
    for after in (0, 1):
        question = parts.Inputs(Asked(job=b"a", after=after))
        transformer._take(question, SimpleNamespace(send=send))
    turns.release(2)
    with pytest.raises(queue.Empty):
        answers.get(timeout=0.2)
    turns.release()
    assert answers.get(timeout=600) == ("step", 1, 1) and answers.empty()
    turns.release(2)
    assert answers.get(timeout=600) == ("step", 2, 1)
    wait_for(lambda: not transformer.running and not transformer.asking)
    with pytest.raises(ValueError, match="none of this name that runs"):
        transformer._take(parts.Inputs(Asked(job=b"a", after=2)), SimpleNamespace(send=send))


def test_answers_are_kept_beyond_their_call_and_its_error_comes_last(monkeypatch):
    """Triton's stub would free what it alone has, without Python's lock."""

    class Answers(list): ...

    def answer(error=None, **tensors) -> SimpleNamespace:
        found = [SimpleNamespace(name=lambda name=name: name) for name in tensors]
        return SimpleNamespace(
            has_error=lambda: error is not None,
            error=lambda: SimpleNamespace(message=lambda: error),
            output_tensors=lambda: found,
        )

    given = Answers([answer(step=1), answer("lost"), answer()])
    alive, clock = weakref.ref(given), [100.0]
    module = SimpleNamespace(
        InferenceRequest=lambda **_: SimpleNamespace(exec=lambda decoupled: given)
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    monkeypatch.setattr(calls.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(calls, "_kept", deque())
    found = calls.responses("dit_transformer", {}, [])
    assert list(next(found)) == ["step"]
    with pytest.raises(RuntimeError, match="dit_transformer: lost"):
        next(found)
    del given, found
    given = Answers()
    clock[0] += calls.KEPT_S
    assert list(calls.responses("dit_transformer", {}, [])) == [] and alive() is not None
    clock[0] += 0.1
    assert list(calls.responses("dit_transformer", {}, [])) == [] and alive() is None


def test_a_caller_that_takes_no_answers_stops_nobody_else(transformer, monkeypatch):
    """One whose process died: Triton's sender waits for it for ever."""
    monkeypatch.setattr(parts, "outgoing", lambda name, tensor: name)
    gate, other = threading.Event(), Sender(True)
    dead = SimpleNamespace(send=lambda *response, flags=0: gate.wait(600))
    transformer.denoiser.forward = lambda **inputs: inputs["latents"]
    given = {"timestep": torch.ones(1, 2), "step_lengths": torch.ones(1, 2)}
    for sender in (dead, other):
        transformer._take(parts.Inputs(Asked(**_given() | given)), sender)
    assert other.ended.wait(600) and other.sent == 1 and not other.errors
    gate.set()


class OnGpu:
    """Stands for a tensor of a GPU, whose copies are made later: says in `told` what is asked."""

    is_cuda, device = True, "cuda:0"

    def __init__(self, told: list) -> None:
        self.told = told

    def to(self, device: str, copy: bool) -> torch.Tensor:
        self.told.append(("copy", device, copy))
        return torch.zeros(1)


def test_what_a_gpu_copies_is_waited_for_before_its_source_goes(transformer, monkeypatch):
    """Triton gives the input's memory to another request as soon as execute() returns."""
    told: list = []
    stream = SimpleNamespace(synchronize=lambda: told.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    given = {"latents": OnGpu(told), "timestep": torch.ones(1)}
    inputs = SimpleNamespace(tensor=given.get)
    assert transformer.own(inputs, "latents") is not None
    assert told == [("copy", "cpu", True), "waited"]
    assert transformer.own(inputs, "timestep").data_ptr() != given["timestep"].data_ptr()
    assert transformer.own(inputs, "guidance") is None and told[2:] == []


def test_the_health_of_all_takes_as_long_as_that_of_one(monkeypatch):
    health, gate = model_of("deep_health"), threading.Event()
    answers = {"one": torch.zeros(1), "two": torch.full((1,), float("nan"))}

    def call(name: str) -> torch.Tensor:
        if name == "dead":
            raise RuntimeError("its stub\nis dead")
        return answers.get(name) if name in answers else gate.wait(600)

    waits = []

    def wait(asked: list, seconds: float) -> None:  # as long as those take that answer
        waits.append((len(asked), seconds))
        futures.wait([one for one, name in zip(asked, names, strict=True) if "hangs" not in name])

    monkeypatch.setattr(health, "call", call)
    monkeypatch.setattr(health, "wait", wait)
    model = health.TritonPythonModel()
    names = ["one", "hangs", "two", "dead", "hangs too"]
    model.requests, model.timeout_s = dict.fromkeys(names, ()), 0.5
    words = model._ask(names)
    gate.set()
    silent = "no answer within 0.5 s"
    assert words == ["", silent, "answered with NaN or infinity", "its stub is dead", silent]
    assert waits == [(5, 0.5)]  # one limit for all

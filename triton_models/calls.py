"""Calls from one model of the server to another (Triton's BLS), tensors shared, not copied."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch

from triton_models.parts import outgoing

DECOUPLED = {"dit_transformer", "bls_orchestrator"}  # may answer more than once
# Triton's stub (2.51) has a reference of its own to a call's answers and drops it in a thread
# without Python's lock: were it the last, the answers' arrays would be freed beside running
# threads, which damages the heap. So Python's is kept until long after
KEPT_S = 10.0
_kept: deque[tuple[float, object]] = deque()  # when each call ended, oldest first
_lock = threading.RLock()  # a call that was left may be collected, and so end, while it is held


def text(words: str) -> np.ndarray:
    """Give a string as a model with a batch dimension takes it."""
    return np.array([[words.encode()]], dtype=np.object_)


def tensors_of(values: dict) -> list:
    """Turn named torch tensors and arrays of strings into Triton's."""
    import triton_python_backend_utils as pb_utils

    return [
        outgoing(name, value) if isinstance(value, torch.Tensor) else pb_utils.Tensor(name, value)
        for name, value in values.items()
    ]


def responses(model: str, inputs: dict, outputs: list[str]) -> Iterator[dict]:
    """Call a model and give each of its answers, output name -> Triton tensor.

    Raises: RuntimeError with the model's own words.
    """
    import triton_python_backend_utils as pb_utils

    request = pb_utils.InferenceRequest(
        model_name=model, requested_output_names=outputs, inputs=tensors_of(inputs)
    )
    if model not in DECOUPLED:
        yield from _tensors(model, [request.exec()])
        return
    answers = request.exec(decoupled=True)
    try:
        yield from _tensors(model, answers)
    finally:
        with _lock:
            _kept.append((time.monotonic(), answers))
            while time.monotonic() - _kept[0][0] > KEPT_S:
                _kept.popleft()


def _tensors(model: str, answers: Iterable) -> Iterator[dict]:
    """Give each answer's tensors by name; an error after the last, so that the call has ended."""
    failed = ""
    for answer in answers:
        if answer.has_error():
            failed = failed or answer.error().message()
            continue
        found = {tensor.name(): tensor for tensor in answer.output_tensors()}
        if found:  # a decoupled model closes with an answer of nothing
            yield found
    if failed:
        raise RuntimeError(f"{model}: {failed}")


def call(model: str, inputs: dict, output: str) -> torch.Tensor:
    """Call a model for one output.

    Raises: RuntimeError with the model's own words, or if it answers without that output.
    """
    for found in responses(model, inputs, [output]):
        if output in found:
            return torch.from_dlpack(found[output].to_dlpack())
    raise RuntimeError(f"{model}: answered without {output}")


def cancel(job: str) -> None:
    """Stop a denoising job; nothing happens if it has ended."""
    _of_job(job, True)


def ask(job: str) -> None:
    """Ask whether a denoising job runs.

    Raises: RuntimeError if it does not, or if the transformer cannot be asked.
    """
    _of_job(job, False)


def step_after(job: str, step: int) -> int:
    """Wait until the slowest of a job's images that run has taken more steps than that.

    A call for each step: with three answers to one call Triton's stub (2.51) can lock itself up,
    between the thread that brings the third, one that has not taken the second yet and one that
    begins another call.

    Returns: how many steps it has taken
    Raises: RuntimeError if none runs: it has not come yet, or has ended.
    """
    after = torch.tensor([[step]], dtype=torch.int32)
    return int(call("dit_transformer", {"job": text(job), "after": after}, "step"))


def _of_job(job: str, cancelled: bool) -> None:
    inputs = {"job": text(job), "cancel": torch.tensor([[cancelled]])}
    for _ in responses("dit_transformer", inputs, ["step"]):
        pass

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
"""The transformer: one denoising step, or all steps of a request, batched with other requests'.

With `step_lengths` the whole loop runs here, so that neither embeddings nor latents travel between
steps; each step is batched with the steps of other requests (triton_models/denoiser.py). Without,
one forward answers with `noise_pred`. `python model.py --ckpt tiny-dev` checks the component by
itself against FluxPipeline.
"""

import contextlib
import queue
import sys
import threading
from collections import deque
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from triton_models import parts
from triton_models.components import Transformer
from triton_models.denoiser import Cancelled, Denoiser, Job
from triton_models.requests import MAX_SEQUENCE_LENGTH, Limits, size_problem

REMEMBERED = 1024  # names of cancelled jobs: a cancellation may overtake its job


def problems_of(inputs: parts.Inputs, guided: bool) -> str:
    """Say what is wrong with a request's shapes; "" if nothing is."""
    for name in ("latents", "timestep", "size", "prompt_embeds", "pooled_prompt_embeds"):
        if name not in inputs:
            return f"{name}: found nothing, expected a tensor"
    height, width = inputs.values("size")[:2]
    if problem := size_problem(inputs.tensor("latents").shape[1], height, width):
        return problem
    if (text := inputs.tensor("prompt_embeds").shape[1]) > MAX_SEQUENCE_LENGTH:
        return f"prompt_embeds: found {text} tokens, expected at most {MAX_SEQUENCE_LENGTH}"
    if ("guidance" in inputs) is not guided:
        return f"guidance: found {'one' if 'guidance' in inputs else 'none'}, expected the other"
    timestep, lengths = inputs.tensor("timestep"), inputs.tensor("step_lengths")
    if not 1 <= timestep.shape[1] <= Limits.max_steps:
        return f"timestep: found {timestep.shape[1]}, expected 1 to {Limits.max_steps}"
    if lengths is None and timestep.shape[1] != 1:
        return f"timestep: found {timestep.shape[1]} without step_lengths, expected 1"
    if lengths is not None and lengths.shape != timestep.shape:
        return f"step_lengths: found {list(lengths.shape)}, expected {list(timestep.shape)}"
    return ""


class TritonPythonModel:
    """Triton's interface: requests become jobs, their answers come from the worker's thread."""

    def initialize(self, arguments) -> None:
        args, values = parts.begin(arguments)
        self.device = args.device
        sizes = parts.batch_sizes(values)
        self.transformer = Transformer(args, sizes)
        self.denoiser = Denoiser(self.transformer, sizes)
        self.cancelled: set[str] = set()  # of those that run
        self.stopped: deque[str] = deque(maxlen=REMEMBERED)
        self.running: dict[str, list[Job]] = {}
        self.asking: dict[str, list[tuple[int, object]]] = {}  # name -> (after which step, sender)
        self.lock = threading.Lock()
        self.steps: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._tell_steps, daemon=True).start()

    def execute(self, requests) -> None:
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._take(parts.Inputs(request), sender)
            except Exception as error:
                code = "INVALID_ARGUMENT" if isinstance(error, ValueError) else _code(error)
                parts.send(sender, _response(error=parts.failure(error, code)), last=True)

    def own(self, inputs: parts.Inputs, name: str):
        """Give a tensor that outlives execute(), after which Triton takes its memory back."""
        tensor = inputs.tensor(name)
        if tensor is None:
            return None
        own = tensor.to(self.device, copy=True)
        if tensor.is_cuda:  # the copy is only queued, behind the forwards of others
            torch.cuda.current_stream(tensor.device).synchronize()
        return own

    def _take(self, inputs: parts.Inputs, sender) -> None:
        name = inputs.value("job", b"").decode()
        if inputs.value("cancel", False):
            if not name:  # jobs without a name are nobody's to stop
                raise ValueError("job: found nothing, expected the name of the job to cancel")
            with self.lock:
                self.stopped.append(name)
                if name in self.running:
                    self.cancelled.add(name)
            parts.send(sender, last=True)
            return
        if "latents" not in inputs and ("cancel" in inputs or "after" in inputs):
            with self.lock:
                if name not in self.running:
                    raise ValueError("job: found none of this name that runs")
                if "after" in inputs:
                    self.asking.setdefault(name, []).append((inputs.value("after"), sender))
                    self._answer_steps(name)
                    return
            parts.send(sender, last=True)  # it is there
            return
        if problem := problems_of(inputs, self.transformer.guided):
            raise ValueError(problem)
        height, width = inputs.values("size")[:2]

        def here(tensor_name: str):
            return self.own(inputs, tensor_name)

        def after_step(job: Job) -> None:
            with self.lock:
                self._answer_steps(name)

        def done(job: Job, error: Exception | None) -> None:
            with self.lock:
                self.running[name].remove(job)
                self._answer_steps(name, job.step)
                if not self.running[name]:
                    del self.running[name]
                    self.cancelled.discard(name)
            if error is None:
                try:
                    response = _response(_answer(job))
                except Exception as failed:  # a GPU says here what went wrong in the forward
                    error = failed
            if error is not None:
                response = _response(error=parts.failure(error, _code(error)))
            if job.lengths is None:
                parts.send(sender, response, last=True)
                return
            # All but a call's first message wait until the caller has taken them: of one whose
            # process died for ever, and this thread has others' jobs
            threading.Thread(target=parts.send_last, args=(sender, response), daemon=True).start()

        job = Job(
            here("latents"),
            here("timestep"),
            here("step_lengths"),
            guidance.reshape(-1) if (guidance := here("guidance")) is not None else None,
            here("prompt_embeds"),
            here("pooled_prompt_embeds"),
            height,
            width,
            done,
            after_step,
            is_cancelled=lambda: name in self.cancelled,
        )
        with self.lock:  # done() waits for it
            if name in self.stopped:
                raise Cancelled("cancelled before it came")
            self.denoiser.submit(job)
            self.running.setdefault(name, []).append(job)

    def _answer_steps(self, name: str, ended: int = 0) -> None:
        """Queue answers for whoever waits for a step that the slowest of these jobs has taken.

        `ended` is the step at which the last of them has ended. Under the lock.
        """
        if name not in self.asking:
            return
        running = self.running[name]
        step = min((job.step for job in running), default=ended)
        asking = self.asking.pop(name)
        if later := [one for one in asking if running and one[0] >= step]:
            self.asking[name] = later
        for one in asking:
            if one not in later:
                self.steps.put((one[1], step))

    def _tell_steps(self) -> None:
        while True:
            sender, step = self.steps.get()
            with contextlib.suppress(Exception):  # the job goes on, and its end is told
                answer = {"step": torch.tensor([[step]], dtype=torch.int32)}
                parts.send(sender, _response(answer), last=True)

    def finalize(self) -> None:
        self.denoiser.close()


def _code(error: Exception) -> str:
    return "CANCELLED" if isinstance(error, Cancelled) else "INTERNAL"


def _answer(job: Job) -> dict:
    return {
        "noise_pred" if job.lengths is None else "latents": job.latents,
        "step": _column(job, job.step, torch.int32),
        "mean_batch": _column(job, sum(job.batches) / len(job.batches), torch.float32),
        "forward_s": _column(job, job.forward_s, torch.float32),
        "queue_s": _column(job, job.queue_s, torch.float32),
    }


def _column(job: Job, value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((job.rows, 1), value, dtype=dtype)


def _response(tensors: dict | None = None, error=None):
    import triton_python_backend_utils as pb_utils

    outputs = [parts.outgoing(name, tensor) for name, tensor in (tensors or {}).items()]
    return pb_utils.InferenceResponse(outputs, error=error)


if __name__ == "__main__":
    from triton_models.self_check import check_transformer

    check_transformer()

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
"""The pipeline: checks a request, calls the four models in order, and answers with images.

Every request runs in a thread of its own: text encoders, one denoising job for each image (the
transformer batches them with other requests'), decoder, encoding as PNG. Nothing of a request is
evaluated or opened as a path. `python model.py --ckpt tiny-dev` checks noise and schedule by
themselves against FluxPipeline.
"""

import contextlib
import queue
import sys
import threading
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from triton_models import calls, parts, requests
from triton_models.components import Start
from triton_models.metrics import Metrics
from triton_models.pictures import encoded
from triton_models.repository import CALLS_PER_REQUEST
from triton_models.watch import Watch

RETRY_S = 2
JOB_NUMBERS = ("mean_batch", "forward_s", "queue_s")
JOB_OUTPUTS = ["latents", "step", *JOB_NUMBERS]


class Stopped(Exception):
    """The client has gone away."""


@dataclass
class News:
    """What is said of denoising jobs: a step of the slowest, the end of one or its failure."""

    image: int | None
    step: int = 0
    latents: torch.Tensor | None = None
    numbers: dict[str, float] = field(default_factory=dict)  # JOB_NUMBERS, at the end
    error: Exception | None = None


class TritonPythonModel:
    """Triton's interface: one thread for each request, a bound on how many there are."""

    def initialize(self, arguments) -> None:
        args, values = parts.begin(arguments)
        self.args, self.start = args, Start(args)
        self.limits = requests.Limits.read(values)
        self.metrics = Metrics()
        self.threads = ThreadPoolExecutor(self.limits.max_in_flight, "request")
        self._new_callers()
        self.in_flight, self.lock = 0, threading.Lock()

    def _new_callers(self) -> None:
        """Take new threads for calls: those whose calls never end are lost."""
        self.callers = ThreadPoolExecutor(CALLS_PER_REQUEST * self.limits.max_in_flight, "call")

    def execute(self, incoming) -> None:
        for request in incoming:
            sender = request.get_response_sender()
            try:
                inputs = parts.Inputs(request)
                requests.refuse_parameters(request.parameters())
                if inputs.value("ping", False):
                    pong = _response({"step": torch.zeros(1, dtype=torch.int32)})
                    parts.send(sender, pong, last=True)
                    continue
                wanted = requests.read(inputs, self.args, self.limits)
            except ValueError as error:
                self._refuse(sender, error, "INVALID_ARGUMENT")
                continue
            with self.lock:
                full = self.in_flight >= self.limits.max_in_flight
                self.in_flight += not full
            if full:
                reason = f"{self.limits.max_in_flight} requests are in flight; retry in {RETRY_S} s"
                self._refuse(sender, RuntimeError(reason), "UNAVAILABLE")
                continue
            self.threads.submit(self._serve, wanted, sender, time.perf_counter())

    def _refuse(self, sender, error: Exception, code: str) -> None:
        self.metrics.request(code.lower())
        parts.send(sender, _response(error=parts.failure(error, code)), last=True)

    def _serve(self, wanted: requests.Wanted, sender, arrived: float) -> None:
        outcome = "ok"
        try:
            self.metrics.waited(time.perf_counter() - arrived)
            response = _response(self._make(wanted, sender, arrived + self.limits.timeout_s))
        except Stopped as error:
            outcome = "cancelled"
            response = _response(error=parts.failure(error, "CANCELLED"))
        except TimeoutError as error:
            outcome = "timeout"
            response = _response(error=parts.failure(error, "UNAVAILABLE"))
        except Exception as error:
            outcome = "failed"
            response = _response(error=parts.failure(error))
        try:  # before the answer: whoever has it finds it counted, and his next request its place
            with self.lock:
                self.in_flight -= 1
            if outcome == "ok":
                self.metrics.images(wanted.images)
            self.metrics.request(outcome)
        finally:  # whatever became of the counters: without an answer the client waits for ever
            if outcome == "ok":
                parts.send_last(sender, response)
            else:
                parts.send(sender, response, last=True)

    def _make(self, wanted: requests.Wanted, sender, deadline: float) -> dict:
        """Take one request from prompts to the tensors of its last response."""
        with self.metrics.stage("prompt_encoding"):
            embeds, pooled = self._encode(wanted, deadline)
        with self.metrics.stage("denoising"):
            latents = self._denoise(wanted, embeds, pooled, sender, deadline)
        if sender.is_cancelled():
            raise Stopped("cancelled before decoding")
        with self.metrics.stage("decoding"):
            size = torch.tensor([[wanted.height, wanted.width]], dtype=torch.int32)
            decoded = [
                self.callers.submit(
                    calls.call, "vae_decoder", {"latents": part, "size": size}, "images"
                )
                for part in latents
            ]
            pixels = torch.cat([part.cpu() for part in self._results(decoded, deadline)])
        with self.metrics.stage("postprocessing"):
            return encoded(self.start.pipeline.image_processor, pixels, wanted.format)

    def _encode(self, wanted: requests.Wanted, deadline: float) -> tuple[list, list]:
        """Encode each prompt by itself, so that its bits do not depend on the others."""
        length = torch.tensor([[wanted.max_sequence_length]], dtype=torch.int32)
        texts = [calls.text(prompt) for prompt in wanted.prompts]
        t5 = [
            self.callers.submit(
                calls.call,
                "t5_encoder",
                {"prompt": prompt, "max_sequence_length": length},
                "prompt_embeds",
            )
            for prompt in texts
        ]
        clip = [
            self.callers.submit(
                calls.call, "clip_encoder", {"prompt": prompt}, "pooled_prompt_embeds"
            )
            for prompt in texts
        ]
        found = self._results([*t5, *clip], deadline)
        return found[: len(texts)], found[len(texts) :]

    def _results(self, made: list[Future], deadline: float) -> list[torch.Tensor]:
        """Wait for calls, but no longer than the request may take: a model may hang."""
        try:
            return [call.result(self._left(deadline)) for call in made]
        except TimeoutError:
            for call in made:
                call.cancel()
            raise self._late() from None

    def _left(self, deadline: float) -> float:
        if (left := deadline - time.perf_counter()) <= 0:
            raise self._late()
        return left

    def _late(self) -> TimeoutError:
        self._new_callers()
        return TimeoutError(f"not done after {self.limits.timeout_s:g} s; retry later")

    def _denoise(self, wanted, embeds: list, pooled: list, sender, deadline: float) -> list:
        """Run one job for each image; progress as it comes, and a stop when the client leaves."""
        timesteps, lengths = self.start.levels(wanted.height, wanted.width, wanted.steps)
        name = uuid.uuid4().hex
        news: queue.SimpleQueue = queue.SimpleQueue()
        jobs = []
        for image in range(wanted.images):
            tensors = {
                "job": calls.text(name),
                "latents": self.start.noise(wanted.height, wanted.width, wanted.seed + image),
                "timestep": timesteps,
                "step_lengths": lengths,
                "size": torch.tensor([[wanted.height, wanted.width]], dtype=torch.int32),
                "prompt_embeds": embeds[wanted.prompt_of(image)],
                "pooled_prompt_embeds": pooled[wanted.prompt_of(image)],
            }
            if wanted.guidance is not None:
                tensors["guidance"] = torch.tensor([[wanted.guidance]], dtype=torch.float32)
            jobs.append(self.callers.submit(_denoising_job, image, tensors, news.put))
        over = threading.Event()
        if wanted.progress:
            self.callers.submit(_follow_steps, name, news.put, over)
        try:
            return self._follow(wanted, sender, deadline, news, Watch(name))
        except BaseException:
            for job in jobs:
                job.cancel()  # one that no thread has begun would run to its end for nobody
            # not waited for: a transformer that hangs does not answer this either
            threading.Thread(target=_stop, args=(name,), daemon=True).start()
            raise
        finally:
            over.set()

    def _follow(self, wanted, sender, deadline: float, news: queue.SimpleQueue, watch) -> list:
        """Wait for all jobs; pass on every step that the slowest of them has taken."""
        latents, told = [None] * wanted.images, 0
        while any(part is None for part in latents):
            if sender.is_cancelled():
                raise Stopped(f"cancelled at step {told}")
            try:
                heard = news.get(timeout=min(self._left(deadline), 0.2))
            except queue.Empty:
                if words := watch.lost():
                    self._new_callers()
                    raise RuntimeError(f"the transformer has lost the job; {words}") from None
                continue
            watch.news()
            if heard.error is not None:
                raise heard.error
            step = heard.step
            if heard.image is not None:
                latents[heard.image] = heard.latents
                self.metrics.denoised(heard.step, **heard.numbers)
                step = 0 if any(part is None for part in latents) else wanted.steps
            while wanted.progress and told < step:
                told += 1
                parts.send(sender, _response(_progress(told, wanted.steps)))
        return latents

    def finalize(self) -> None:
        self.threads.shutdown(cancel_futures=True)
        self.callers.shutdown(cancel_futures=True)


def _progress(step: int, steps: int) -> dict:
    numbers = {"step": step, "steps": steps}
    return {name: torch.tensor([value], dtype=torch.int32) for name, value in numbers.items()}


def _response(tensors: dict | None = None, error=None):
    import triton_python_backend_utils as pb_utils

    return pb_utils.InferenceResponse(calls.tensors_of(tensors or {}), error=error)


def _stop(job: str) -> None:
    with contextlib.suppress(RuntimeError):  # a dead transformer has nothing to stop
        calls.cancel(job)


def _follow_steps(job: str, tell, over: threading.Event) -> None:
    """Tell every step of a job as News, until it is over."""
    step = 0
    while not over.is_set():
        try:
            step = calls.step_after(job, step)
        except RuntimeError:  # it has not come yet, or has ended
            over.wait(0.02)
            continue
        tell(News(None, step))


def _denoising_job(image: int, inputs: dict, tell) -> None:
    """Follow one job in the transformer: tell its News, an error included."""

    def number(found: dict, name: str) -> float:
        return found[name].as_numpy().reshape(-1)[0].item()

    latents = None
    try:
        for found in calls.responses("dit_transformer", inputs, JOB_OUTPUTS):
            latents = torch.from_dlpack(found["latents"].to_dlpack())
            numbers = {name: number(found, name) for name in JOB_NUMBERS}
            tell(News(image, number(found, "step"), latents, numbers))
        if latents is None:
            raise RuntimeError("dit_transformer: ended without latents")
    except Exception as error:
        tell(News(image, error=error))


if __name__ == "__main__":
    from triton_models.self_check import check_start

    check_start()

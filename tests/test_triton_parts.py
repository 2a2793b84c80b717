"""The served models without a server: requests, batching by iteration, contract, environment."""

import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from triton_models import contract, loadtest, overhead, parts, repository, requests, serve
from triton_models.answers import in_batches
from triton_models.denoiser import Cancelled, Denoiser, Job

ROOT = parts.ROOT


class Given:
    """A request's inputs, as the orchestrator sees them."""

    def __init__(self, **fields) -> None:
        self.fields = fields

    def __contains__(self, name: str) -> bool:
        return name in self.fields

    def values(self, name: str, default=None) -> list:
        found = self.fields.get(name, default)
        return found if isinstance(found, list) else [] if found is None else [found]

    def value(self, name: str, default=None):
        return self.values(name, default)[0]


@pytest.fixture(scope="module")
def args():
    return parts.settings(["--ckpt", "tiny-dev", "--device", "cpu"])


def test_a_request_takes_the_checkpoints_defaults(args):
    found = requests.read(Given(prompt=[b"a red circle"]), args, requests.Limits())
    assert (found.height, found.width, found.steps, found.guidance) == (128, 128, 28, 3.5)
    assert (found.max_sequence_length, found.images, found.format) == (512, 1, "png")
    found = requests.read(
        Given(prompt=[b"a", b"b"], num_images_per_prompt=2), args, requests.Limits()
    )
    assert [found.prompt_of(k) for k in range(found.images)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": []}, "prompt: found none"),
        ({"prompt": [b" \n"]}, "prompt 0: empty"),
        ({"prompt": [b"a", b"\xff"]}, "prompt 1: found bytes that are no UTF-8"),
        ({"prompt": [b"a" * 9000]}, "found 9000 characters, expected at most 8192"),
        ({"height": 100}, "height: found 100, not divisible by 16 (nearest: 96)"),
        ({"width": 0}, "width: found 0, expected 16 to"),
        ({"height": 4096, "width": 4096}, "found 4096x4096 pixels, expected at most 4194304"),
        ({"num_inference_steps": 0}, "num_inference_steps: found 0, expected 1 to 100"),
        ({"num_inference_steps": 101}, "num_inference_steps: found 101"),
        ({"guidance_scale": float("nan")}, "guidance_scale: found nan"),
        ({"guidance_scale": -1.0}, "guidance_scale: found -1"),
        ({"seed": -1}, "seed: found -1"),
        ({"max_sequence_length": 513}, "max_sequence_length: found 513, expected 1 to 512"),
        ({"num_images_per_prompt": 9}, "num_images_per_prompt: found 9"),
        ({"prompt": [b"a"] * 5, "num_images_per_prompt": 2}, "found 10 images, expected at most 8"),
        ({"format": b"gif"}, "format: found 'gif', expected one of png, base64, raw"),
    ],
)
def test_wrong_fields_are_named(args, fields, words):
    with pytest.raises(ValueError) as caught:
        requests.read(Given(**{"prompt": [b"a"]} | fields), args, requests.Limits())
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_guidance_is_refused_where_there_is_no_embedding():
    schnell = parts.settings(["--ckpt", "tiny-schnell", "--device", "cpu"])
    with pytest.raises(ValueError, match="has no guidance embedding; leave it out"):
        requests.read(Given(prompt=[b"a"], guidance_scale=3.5), schnell, requests.Limits())


def test_what_cannot_be_served_is_refused():
    from utils.errors import UserError

    with pytest.raises(UserError, match="text prompts only"):
        parts.settings(["--ckpt", "tiny-kontext", "--image", "tiny_flux/source.png"])
    with pytest.raises(UserError, match="--modulation_once: needs the whole call of a pipeline"):
        parts.settings(["--ckpt", "tiny-dev", "--modulation_once"])


def test_batches_have_the_sizes_that_are_warm():
    assert in_batches([1] * 7, (1, 2, 4)) == [[0, 1, 2, 3], [4, 5], [6]]
    assert in_batches([2, 1, 1, 3], (1, 2, 4)) == [[0, 1, 2], [3]]
    assert in_batches([], (1,)) == []


class Velocity:
    """A transformer whose velocity tells the rows apart: guidance times the row's own latents."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.gate = threading.Event()

    def __call__(self, latents, timestep, guidance, prompt_embeds, pooled, height, width):
        self.gate.wait(10)
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


def _model(name: str):
    """Import a served model's own file."""
    spec = importlib.util.spec_from_file_location(name, repository.HERE / name / "1" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_jobs_that_wait_for_a_thread_are_cancelled_with_their_request(args, monkeypatch):
    """The transformer does not know them yet, so that their name stops nothing."""
    orchestrator, begun, gate = _model("bls_orchestrator"), [], threading.Event()

    def job(image: int, inputs: dict, tell) -> None:
        begun.append(image)
        gate.wait(10)

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


def test_the_transformer_says_whose_fault_it_is_and_forgets_what_it_refused(monkeypatch):
    triton = SimpleNamespace(
        TritonError=lambda words, code: words,
        InferenceResponse=lambda outputs, error=None: SimpleNamespace(error=error),
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1,
    )
    triton.TritonError.INVALID_ARG = triton.TritonError.INTERNAL = None
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton)
    model = _model("dit_transformer").TritonPythonModel()
    model.transformer, model.device, model.lock = SimpleNamespace(guided=False), "cpu", Lock()
    model.running, model.cancelled = {}, set()
    model.denoiser = Denoiser(Velocity(), (1, 2))

    def given(rows: int) -> dict:
        return {
            "latents": torch.zeros(rows, 1, 1),
            "timestep": torch.ones(rows, 1),
            "size": [[16, 16]] * rows,
            "prompt_embeds": torch.zeros(rows, 1, 1),
            "pooled_prompt_embeds": torch.zeros(rows, 1),
            "job": b"a",
        }

    def full(*_) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    unnamed, large, unlucky = Asked(cancel=True), Asked(**given(3)), Asked(**given(1))
    model.execute([unnamed, large])
    monkeypatch.setattr(model, "own", full)
    model.execute([unlucky])
    model.finalize()
    assert unnamed.errors == [
        "INVALID_ARGUMENT: job: found nothing, expected the name of the job to cancel"
    ]
    assert large.errors == ["INVALID_ARGUMENT: latents: found 3 rows, expected at most 2"]
    assert unlucky.errors == ["INTERNAL: CUDA out of memory"]
    assert model.running == {} and not model.cancelled


def test_the_health_of_all_takes_as_long_as_that_of_one(monkeypatch):
    health, gate = _model("deep_health"), threading.Event()
    answers = {"one": torch.zeros(1), "two": torch.full((1,), float("nan"))}

    def call(name: str) -> torch.Tensor:
        if name == "dead":
            raise RuntimeError("its stub\nis dead")
        return answers.get(name) if name in answers else gate.wait(10)

    monkeypatch.setattr(health, "call", call)
    model = health.TritonPythonModel()
    names = ["one", "hangs", "two", "dead", "hangs too"]
    model.requests, model.timeout_s = dict.fromkeys(names, ()), 0.5
    start = time.perf_counter()
    words = model._ask(names)
    gate.set()
    silent = "no answer within 0.5 s"
    assert words == ["", silent, "answered with NaN or infinity", "its stub is dead", silent]
    assert time.perf_counter() - start < 0.9


def test_the_contract_page_is_that_of_the_configs():
    assert contract.PAGE.read_text() == contract.page()
    for name in (*parts.MODELS, parts.HEALTH):
        text = (ROOT / "triton_models" / name / "config.pbtxt").read_text()
        for side in ("input", "output"):
            named = {found[0] for found in contract.tensors(text, side)}
            assert named <= contract.MEANING.keys(), named


def _pins(lines: list[str]) -> dict[str, str]:
    words = (line.split("#")[0].strip() for line in lines)
    return dict(line.split("==") for line in words if line)


def test_the_servers_environment_is_the_scripts_but_for_numpy():
    ours = _pins((ROOT / "requirements.txt").read_text().splitlines())
    server = _pins((repository.HERE / "requirements.txt").read_text().splitlines())
    for flag in ("lora", "sigmas"):  # what these packages are for is not served
        assert flag in parts.WHOLE_CALL
    ours = {name: pin for name, pin in ours.items() if name not in ("peft", "scipy")}
    assert {name: server.get(name) for name in ours} == ours | {"numpy": "1.26.4"}


@pytest.mark.parametrize("model", parts.MODELS)
def test_uv_runs_a_model_with_the_scripts_packages(model):
    """The header that `uv run` reads."""
    lines = (repository.HERE / model / "1" / "model.py").read_text().splitlines()
    header = [line.removeprefix("# ") for line in lines[1 : lines.index("# ///")]]
    found = tomllib.loads("\n".join(header))
    ours = _pins((ROOT / "requirements.txt").read_text().splitlines())
    pins = _pins(found["dependencies"])
    assert lines[0] == "# /// script" and found["requires-python"] == ">=3.11"
    assert {"torch", "diffusers", "transformers"} <= pins.keys() and pins.items() <= ours.items()


def test_what_an_environment_lacks_is_seen(tmp_path):
    packages = tmp_path / "lib" / repository.VERSION / "site-packages"
    lacking = repository.missing(tmp_path)
    for name, version in (("numpy", "1.26.4"), ("torch", "2.13.0+cpu"), ("diffusers", "0.1")):
        (packages / f"{name}-{version}.dist-info").mkdir(parents=True)
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (packages / f"{name}-{version}.dist-info" / "METADATA").write_text(text)
    still = repository.missing(tmp_path)
    assert set(lacking) - set(still) == {"numpy==1.26.4", "torch==2.13.0"}
    assert any(line.startswith("diffusers==") for line in still)


def test_a_wrong_command_is_refused_before_anything_slow(tmp_path):
    def problems(*flags: str) -> str:
        return "\n".join(serve.problems_of(serve.parse_args(list(flags))[0]))

    found = problems("--threads", "0", "--max-in-flight", "0", "--http-port", "70000")
    assert "--threads 0: expected 1 or more" in found and "--http-port 70000: cannot" in found
    assert "--max-in-flight 0: expected 1 or more" in found
    assert "exists already" in problems("--write-repository", str(tmp_path))
    assert "does not exist" in problems("--write-repository", str(tmp_path / "no" / "models"))
    (tmp_path / "lib" / "python3.9").mkdir(parents=True)
    assert "found python3.9, expected" in problems("--env", str(tmp_path))
    wrong = loadtest.parse_args(["--rate", "0", "--sizes", "128"])
    assert loadtest.problems_of(wrong) == [
        "--rate 0: expected more than 0",
        "--sizes 128: expected such as 128x128,96x64",
    ]


def test_without_the_client_nothing_is_started(monkeypatch):
    """It would wait for a server that it cannot ask."""
    monkeypatch.setitem(sys.modules, "tritonclient", None)
    pins = _pins((repository.HERE / "requirements.txt").read_text().splitlines())
    install = f"pip install tritonclient[grpc]=={pins['tritonclient[grpc,http]']}"
    (problem,) = serve.problems_of(serve.parse_args(["--http-port", "0"])[0])
    assert problem == f"found no module tritonclient, expected Triton's client: {install}"


def test_an_impatient_ctrl_c_does_not_cut_the_clean_up_short(monkeypatch):
    monkeypatch.setattr(serve, "STOP_S", 1)
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    serve.end_by_signals()
    server = serve.Server(*serve.parse_args([]))
    server.process = subprocess.Popen(  # a server that takes its time
        ["sh", "-c", "trap '' TERM; echo; sleep 60"], stdout=subprocess.PIPE, start_new_session=True
    )
    server.process.stdout.readline()
    left = Path("/dev/shm") / f"{server.region}left"
    left.touch()
    second = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    second.start()
    try:
        server.stop()
    finally:
        second.join()
        for stop, handler in before.items():
            signal.signal(stop, handler)
        server.process.kill()
    assert server.process.returncode == -signal.SIGKILL
    assert not left.exists() and not server.folder.exists()


@pytest.mark.parametrize(("given", "shown"), [(None, "0"), ("3,1", "3")])
def test_the_server_sees_one_gpu(tmp_path, monkeypatch, given, shown):
    """Triton starts an instance on each that it sees."""
    started = {}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    monkeypatch.setattr(repository, "environment", lambda env: env / "bin" / "python3")
    monkeypatch.setattr(repository, "write_backend", lambda folder, env: env / "tritonserver")
    monkeypatch.setattr(serve.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(serve.subprocess, "Popen", lambda command, **how: started.update(how))
    serve.Server(*serve.parse_args(["--ckpt", "tiny-dev"])).start()
    assert started["env"]["CUDA_VISIBLE_DEVICES"] == shown


def test_percentiles_are_latencies_that_were_seen():
    seconds = [float(k) for k in range(100, 0, -1)]
    assert loadtest.percentiles(seconds) == {"p50_s": 50, "p90_s": 90, "p99_s": 99}
    assert loadtest.percentiles([2.0, 1.0]) == {"p50_s": 1, "p90_s": 2, "p99_s": 2}


def test_overhead_is_told_apart_from_drift():
    """Costs of 1 ms a step and 20 ms an image; a forward that slows down, and is slower there."""
    found = np.zeros((5, 2, 2, 2))
    for number, drift in enumerate((1.0, 1.5, 2.0, 2.5, 3.0)):
        for at, steps in enumerate((4, 28)):
            here, there = drift * 0.05 * steps, 1.1 * drift * 0.05 * steps
            found[number, 0, at] = there + 0.1 + 0.02 + 0.001 * steps, there
            found[number, 1, at] = here + 0.1, here
    row = overhead.summary(found, [4, 28])
    for name in ("overhead", "paired"):
        assert row[f"{name}_per_step_s"] == pytest.approx(0.001)
        assert row[f"{name}_per_image_s"] == pytest.approx(0.02)
    assert row["step_in_process_s"] == pytest.approx(0.1) and row["rounds"] == 5
    assert row["forward_in_server_s"] == pytest.approx(0.11)
    low, high = row["step_in_process_s_95"]
    assert 0.05 - 1e-9 <= low < 0.1 < high <= 0.15 + 1e-9
    found[0, :, :, 0] += 5.0  # other work: a round that is slow on both sides changes little
    assert overhead.summary(found, [4, 28])["overhead_per_step_s"] == pytest.approx(0.001)
    found[:, 0, :, 0] += 0.001 * np.array([4, 28])
    assert not overhead.summary(found, [4, 28])["step_goal_met"]


def test_http_parameters_are_fields_that_nobody_knows():
    requests.refuse_parameters('{"triton_enable_empty_final_response": true}')
    requests.refuse_parameters("")
    with pytest.raises(ValueError, match="lora: unknown field"):
        requests.refuse_parameters('{"lora": "x"}')


def test_the_repository_carries_the_commands_flags(tmp_path):
    args, flags = serve.parse_args(["--ckpt", "tiny-dev", "--disable_bf16", "--batch-sizes", "1,2"])
    repository.write_repository(tmp_path, args, flags)
    text = (tmp_path / "dit_transformer" / "config.pbtxt").read_text()
    assert '"--ckpt tiny-dev --disable_bf16"' in text and 'string_value: "1,2"' in text
    assert "max_batch_size: 2" in text and "BF16" not in text
    assert (tmp_path / "vae_decoder" / "1" / "model.py").exists()
    args.batch_sizes = "2,4"
    assert "--batch-sizes 2,4: expected numbers, 1 among them" in serve.problems_of(args)


@pytest.mark.parametrize("mode", ["compile", pytest.param("export_aoti", marks=pytest.mark.slow)])
def test_one_component_is_compiled_by_itself(tmp_path, mode):
    """As each process of the server does it; the values stay those of the eager component."""
    from triton_models.components import Decoder

    flags = ["--ckpt", "tiny-schnell", "--device", "cpu", "--cache-dir", str(tmp_path / "store")]
    eager = Decoder(parts.settings([*flags, "--compile_export_mode", "disabled"]))
    compiled = Decoder(parts.settings([*flags, "--compile_export_mode", mode]))
    assert compiled.pipeline.transformer is None
    latents = torch.randn(1, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    found, expected = compiled(latents, 128, 128).float(), eager(latents, 128, 128).float()
    assert (found - expected).norm() / expected.norm() < 0.02

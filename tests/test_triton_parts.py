"""The served models without a server: requests, batching by iteration, contract, environment."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from triton_models import contract, loadtest, parts, repository, requests, serve
from triton_models.answers import in_batches

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


def test_bounds_of_all_models_are_lowered_alone_and_not_raised():
    """A raised one would pass the orchestrator and fail in the transformer, as its own error."""
    assert requests.Limits.read({"max_steps": "50", "timeout_s": "9000"}).max_steps == 50
    with pytest.raises(ValueError, match="max_steps: found 200, expected at most 100: the other"):
        requests.Limits.read({"max_steps": "200"})
    with pytest.raises(ValueError, match="max_pixels: found 4194305, expected at most 4194304"):
        requests.Limits.read({"max_pixels": "4194305"})


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
    assert "--threads 0: expected 1 to 65536" in found and "--http-port 70000: cannot" in found
    assert "--max-in-flight 0: expected 1 to 65536" in found
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
    monkeypatch.setattr(serve, "STOP_S", 0.1)
    before = {stop: signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)}
    serve.end_by_signals()
    server = serve.Server(*serve.parse_args([]))
    server.process = subprocess.Popen(  # a server that takes its time
        ["sh", "-c", "trap '' TERM; echo; sleep 99"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    server.process.stdout.readline()
    left = Path("/dev/shm") / f"{server.region}left"
    left.touch()
    patient = server.process.wait

    def wait(seconds: float | None = None) -> int:
        os.kill(os.getpid(), signal.SIGINT)  # the second one, amid the clean-up
        return patient(seconds)

    monkeypatch.setattr(server.process, "wait", wait)
    try:
        server.stop()
    finally:
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


def test_calls_leave_threads_for_answers_and_cancellations(tmp_path, monkeypatch):
    """Triton's own number of threads is the default's number of requests in flight."""
    commands: list[list[str]] = []
    monkeypatch.setattr(repository, "environment", lambda env: env / "bin" / "python3")
    monkeypatch.setattr(repository, "write_backend", lambda folder, env: env / "tritonserver")
    monkeypatch.setattr(serve.tempfile, "mkdtemp", lambda prefix: str(tmp_path))
    monkeypatch.setattr(serve.subprocess, "Popen", lambda command, **how: commands.append(command))
    args, flags = serve.parse_args(["--ckpt", "tiny-dev"])
    serve.Server(args, flags).start()
    flag = "--backend-config=python,thread-pool-size="
    (size,) = [word.removeprefix(flag) for word in commands[0] if word.startswith(flag)]
    calls = repository.CALLS_PER_REQUEST * args.max_in_flight
    assert int(size) >= calls + 2 * args.max_in_flight
    assert f"{flag}{size} " in (ROOT / "docs" / "serving.md").read_text()  # the container's


@pytest.mark.parametrize(
    ("silent", "times"), [("vae_decoder", [100, 210]), ("bls_orchestrator", [60, 130, 200])]
)
def test_a_silent_model_has_its_time_again_after_each_load(monkeypatch, silent, times):
    """It may be compiling, which a load each second would never let it finish."""
    pytest.importorskip("tritonclient")
    clock, loaded = [0.0], []

    class Watched:
        def __init__(self, port: int, key: str) -> None: ...

        def __enter__(self) -> "Watched":
            return self

        def __exit__(self, *error) -> None: ...

        def unhealthy(self) -> dict[str, str]:
            return {silent: "no answer within 30 s"}

        def reload(self, name: str) -> None:
            loaded.append((name, clock[0]))

    monkeypatch.setattr(serve, "Client", Watched)
    monkeypatch.setattr(serve.time, "monotonic", lambda: clock[0])
    server = serve.Server(*serve.parse_args(["--timeout", "100"]))
    for clock[0] in range(0, 260, 10):
        server.heal()
    server.folder.rmdir()
    assert loaded == [(silent, time) for time in times]


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

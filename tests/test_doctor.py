"""The doctor's examination: what it finds, what it calls broken, and what it never tells."""

import http.server
import json
import shutil
import socket
import threading
import urllib.request

import doctor_pieces
import pytest
from conftest import make_args
from doctor_pieces import ROOT
from packaging.version import Version

from extras.doctor import availability, checks, pairs, self_test
from utils import checkpoints
from utils.hardware import Machine
from utils.pipeline_utils import STEPS

PINNED = {"torch": "2.13.0+cpu", "torchao": "0.18.0", "triton": "3.7.1"}
BAD = {  # a change to what is pinned -> the pair that it forms
    ("torchao", "0.12.0"): "torchao older than 0.17",
    ("torch", "2.11.0"): "torchao 0.18 with a torch older than 2.12",
    ("triton", "3.6.0"): "torch 2.13 with another triton than 3.7",
    ("flash-attn-3", "0.0.1"): "flash-attn-3 from PyPI",
    ("torchvision", "0.28.0"): "torchvision for CUDA beside a CPU build of torch",
}


def parsed(versions: dict[str, str]) -> dict[str, Version]:
    return {name: Version(version) for name, version in versions.items()}


@pytest.mark.parametrize(("change", "name"), BAD.items(), ids=BAD.values())
def test_known_bad_pairs_are_found_and_the_pinned_ones_are_none(change, name):
    assert not pairs.known_bad(parsed(PINNED))
    found = pairs.known_bad(parsed(PINNED | dict([change])))
    assert name in [pair.name for pair in found]
    assert all(pair.why and pair.fix and pair.source for pair in found)


@pytest.mark.parametrize(
    ("cuda", "fa3", "bad"),
    [("13.0", "0.0.3", 0), ("13.0", "0.0.2", 1), ("12.8", "0.0.2", 0), ("12.8", "0.0.3", 1)],
)
def test_fa3_belongs_to_one_cuda(cuda, fa3, bad):
    here = {"torch": "2.13.0", "cuda": cuda, "fa3-fwd": fa3}
    assert len(pairs.known_bad(parsed(here))) == bad
    older = {"torch": "2.11.0", "triton": "3.7.0"}
    assert [pair.fix for pair in pairs.known_bad(parsed(older))] == ["pip install triton==3.6.0"]


def test_versions_are_compared_with_the_requirements(monkeypatch):
    from importlib import metadata

    whole = metadata.version

    def version(package: str) -> str:
        if package == "accelerate":
            raise metadata.PackageNotFoundError(package)
        return "0.1" if package == "tqdm" else whole(package)

    monkeypatch.setattr(metadata, "version", version)
    found = {one.text.split()[0]: one for one in checks.versions()}
    assert (found["accelerate:"].state, found["tqdm"].state) == ("problem", "note")
    assert found["tqdm"].fix.startswith("pip install tqdm==")


def test_every_step_that_is_off_is_asked_whether_it_could_run():
    args = make_args("--device", "cpu", "--ckpt", "tiny-dev")
    off = [step for step in STEPS if args.plan[step.NAME].state == "off"]
    for step in off:
        if availability.asking(step):
            assert availability.asked(step, args).state != "off", step.NAME
    found = {one.topic: one for one in availability.steps(args)}
    assert list(found) == [f"step {step.NAME}" for step in STEPS]
    assert found["step cache_dit"].text.endswith("could run here")
    assert found["step step_mask"].text.endswith("could run here")
    assert "need a GPU of capability 8.9" in found["step quant"].text
    assert found["step fused_kernels"].state == "note"
    assert not args.cache_dit_config  # the call itself is as it was


def test_a_missing_package_on_a_hopper_gpu_is_a_problem_with_its_command(as_machine):
    from utils.prepare import settle_call

    as_machine(Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139.0))
    args = make_args("--random_weights", checks=False)
    settle_call(args)
    found = {one.topic: one for one in availability.steps(args)}
    assert found["step fa3"].state == "problem"
    assert found["step fa3"].fix == "pip install fa3-fwd==0.0.3"


def test_the_cache_directory_is_looked_at_as_a_run_would(tmp_path):
    from utils import artifacts

    folder = tmp_path / "cache"
    assert "not there yet" in checks.cache_directory(str(folder)).text
    root = artifacts.open_cache(folder)
    artifacts.save(root, {"component": "transformer"}, {".pt2": bytes(3 * 2**20)}, {})
    found = checks.cache_directory(str(folder))
    assert found.state == "ok" and "1 package(s), 3.0 MiB" in found.text
    (root / "decoder-0123456789ab.json").write_text("{")
    assert "unusable: decoder-0123456789ab" in checks.cache_directory(str(folder)).text
    root.chmod(0o777)
    found = checks.cache_directory(str(folder))
    assert (found.state, found.fix) == ("problem", f"chmod 700 {folder}")


@pytest.fixture
def hub(monkeypatch):
    """Give a function that puts a hub's address in place of the real one, and no token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/no/such/file")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return lambda address: monkeypatch.setattr(constants, "ENDPOINT", address)


def test_a_hub_that_answers_and_one_that_does_not(hub, monkeypatch):
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub(f"http://127.0.0.1:{server.server_port}")
    token, answer = checks.hub(timeout_s=600)
    assert answer.state == "ok" and "answers in" in answer.text  # 501: an answer all the same
    assert token.state == "note" and "hf auth login" in token.text
    server.shutdown()
    server.server_close()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # nobody else gets it, and nobody listens
        hub(f"http://127.0.0.1:{closed.getsockname()[1]}")
        assert "cannot be reached" in checks.hub()[1].text
        monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken")
        assert checks.hub()[0].text == "a token in HF_TOKEN"
        assert "averysecret" not in str(checks.hub())


def test_a_hub_that_is_none_is_a_note(hub):
    """The usual slip, and what a gateway may say."""
    hub("hub.example")
    assert "cannot be reached (unknown url type: 'hub.example')" in checks.hub()[1].text
    with socket.create_server(("127.0.0.1", 0)) as gateway:

        def answer() -> None:
            with gateway.accept()[0] as connection:
                connection.recv(1000)
                connection.sendall(b"no HTTP at all\r\n")

        threading.Thread(target=answer, daemon=True).start()
        hub(f"http://127.0.0.1:{gateway.getsockname()[1]}")
        assert "cannot be reached (no HTTP at all" in checks.hub(timeout_s=600)[1].text


def test_a_gpu_is_missing_only_where_torch_sees_none(monkeypatch):
    import torch

    cpu = Machine("cpu", "a processor")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for sees, states in ((False, ["ok", "problem"]), (True, ["ok"])):  # --device cpu beside a GPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda sees=sees: sees)
        assert [found.state for found in checks.hardware(cpu, None)] == states


def test_a_hub_that_is_silent_costs_the_timeout_only(hub, monkeypatch):
    given, urlopen = [], urllib.request.urlopen

    def asked(request, timeout: float):
        given.append(timeout)
        return urlopen(request, timeout=timeout)

    monkeypatch.setattr(urllib.request, "urlopen", asked)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub(f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert "cannot be reached (timed out)" in checks.hub(timeout_s=0.2)[1].text
    assert given == [0.2]  # once


def test_the_bundled_weights_are_finite():
    (found,) = checks.weights(checkpoints.resolve("tiny-schnell"))
    assert found.state == "ok" and "all finite" in found.text


def test_the_whole_examination_of_this_machine(tmp_path):
    words = ("-m", "extras.doctor", "--device", "cpu", "--json", "--cache-dir", tmp_path / "cache")
    done = doctor_pieces.run(*words, folder=tmp_path)
    told = json.loads(done.output)
    problems = [one for one in told["findings"] if one["state"] == "problem"]
    assert (done.code, told["healthy"], problems) == (0, True, [])
    topics = {one["topic"] for one in told["findings"]}
    assert topics >= {"hardware", "versions", "memory", "cache", "hub", "self-test"}
    texts = [one["text"] for one in told["findings"] if one["topic"] == "self-test"]
    assert sum("4 of 4 pictures show what the prompt says" in text for text in texts) == 2


def test_a_call_that_cannot_be_is_a_problem_and_the_rest_is_still_examined(tmp_path):
    words = ("-m", "extras.doctor", "--skip_self_test", "--ckpt", "someone/FLUX")
    done = doctor_pieces.run(*words, "--device", "cpu", folder=tmp_path)
    assert done.code == 1 and done.output.endswith("not healthy\n")
    assert "PROBLEM  call" in done.output and "hub cannot be reached" in done.output
    assert "step fused_projections" in done.output


def test_a_wrong_picture_fails_the_self_test(tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "tiny-schnell"
    shutil.copytree(ROOT / "tiny_flux" / "tiny-schnell", copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for name in ("decoder.conv_out.weight", "decoder.conv_out.bias"):
        weights[name] = weights[name][[1, 2, 0]].contiguous()  # red for blue
    save_file(weights, file, metadata={"format": "pt"})
    monkeypatch.setattr(checkpoints, "BUNDLED_DIR", tmp_path)
    found = self_test.run(["--device", "cpu"])
    assert [one.state for one in found[:2]] == ["problem", "problem"]
    assert "0 of 4" in found[0].text and "colour, background" in found[0].text

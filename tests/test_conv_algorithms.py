"""cuDNN's timing switch: on while the decoder runs, and only then, in every mode."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_args

from tests.flux_pieces import vae
from utils import aoti
from utils.hardware import Machine
from utils.steps import conv_algorithms


@pytest.fixture
def spied(monkeypatch):
    """Give a VAE with the step applied, and what its decoder saw of the flag, call by call."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    model, seen = vae(torch.float32), []
    conv_algorithms.apply(SimpleNamespace(vae=model), None)
    inside = model.decoder.conv_in
    inside.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    return model, seen


LATENTS = torch.zeros(1, 16, 4, 4)


@torch.no_grad()
def test_it_is_on_in_the_decoder_and_off_elsewhere(spied):
    model, seen = spied
    model.decode(LATENTS)
    assert seen == [True] and not torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True  # whoever wants it everywhere keeps it
    model.decode(LATENTS)
    assert seen == [True, True] and torch.backends.cudnn.benchmark


@torch.no_grad()
def test_a_call_that_fails_switches_back(spied):
    model, seen = spied
    with pytest.raises(RuntimeError):
        model.decoder(torch.zeros(1, 3, 4, 4))  # latents have 16 channels
    assert seen == [True] and not torch.backends.cudnn.benchmark
    model.decode(LATENTS)
    assert seen == [True, True] and not torch.backends.cudnn.benchmark


@torch.no_grad()
def test_a_replaced_forward_keeps_it(spied):
    """As compile, packages and CUDA graphs do; no graph sees the hooks."""
    model, _ = spied
    decoder, seen = model.decoder, []
    component = aoti.Component("decoder", decoder)
    aoti.record_inputs([component], lambda: model.decode(LATENTS))
    program = aoti.export(component)
    assert not torch.backends.cudnn.benchmark
    run = program.module()

    def forward(sample, latent_embeds=None):
        seen.append(torch.backends.cudnn.benchmark)
        return run(sample=sample, latent_embeds=latent_embeds)

    expected = decoder(LATENTS)
    decoder.forward = forward
    torch.testing.assert_close(model.decode(LATENTS)[0], expected)
    assert seen == [True] and not torch.backends.cudnn.benchmark


@torch.no_grad()
def test_compiled_code_runs_with_it():
    model, seen = vae(torch.float32), []
    conv_algorithms.apply(SimpleNamespace(vae=model), None)

    def backend(graph, _):
        def run(*inputs):
            seen.append(torch.backends.cudnn.benchmark)
            return graph(*inputs)

        return run

    torch._dynamo.reset()
    model.decoder.forward = torch.compile(model.decoder.forward, fullgraph=True, backend=backend)
    model.decode(LATENTS)
    model.decode(LATENTS)
    assert seen == [True, True] and not torch.backends.cudnn.benchmark


def test_the_step_is_asked_for_and_needs_cudnn_and_its_layout():
    assert make_args("--device", "cpu").plan["conv_algorithms"].state == "off"
    verdict = make_args("--device", "cpu", "--conv_benchmark").plan["conv_algorithms"]
    assert verdict.state == "unavailable" and "found a CPU" in verdict.reason
    given = {"conv_benchmark": True, "disable_channels_last": False}
    for hip, state in ((None, "on"), ("6.4", "unavailable")):
        machine = Machine("cuda", "", (9, 0), hip)
        assert conv_algorithms.check(SimpleNamespace(machine=machine, **given)).state == state
    given["disable_channels_last"] = True
    machine = Machine("cuda", "", (9, 0))
    verdict = conv_algorithms.check(SimpleNamespace(machine=machine, **given))
    assert verdict.state == "refused"
    assert verdict.reason.startswith("--conv_benchmark: found --disable_channels_last")

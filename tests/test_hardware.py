"""What is chosen on machines that are not here, through the detection that finds them."""

from datetime import datetime
from types import SimpleNamespace

import pytest
import report_pieces
import torch
from conftest import make_args

from extras.doctor import checks
from utils import card, readme
from utils.errors import UserError
from utils.hardware import Machine, detect
from utils.report_rows import problem
from utils.steps import compile

GIB = 2**30
FOUND = {  # what torch reports: name, capability, memory, ROCm
    "NVIDIA H100 80GB HBM3": ((9, 0), 80, None),
    "NVIDIA H200": ((9, 0), 141, None),
    "NVIDIA L20": ((8, 9), 48, None),
    "NVIDIA L40S": ((8, 9), 48, None),
    "NVIDIA GeForce RTX 4090": ((8, 9), 24, None),
    "NVIDIA A100-SXM4-80GB": ((8, 0), 80, None),
    "NVIDIA B200": ((10, 0), 180, None),
    "NVIDIA GeForce RTX 5090": ((12, 0), 32, None),
    "Tesla T4": ((7, 5), 16, None),
    "Tesla V100-SXM2-32GB": ((7, 0), 32, None),
    "AMD Instinct MI300X": ((9, 4), 192, "7.0.51831"),
}
HOPPER = ("fa3, fp8", "fa4, fa2, int8", "e4m3fn", "-", "export_aoti", "static first")
ADA = ("fa2, bf16", "int8", "e4m3fn", "-", "export_aoti", "static first")
EXPECTED = {  # attention, others by name, linear, others by name, mode, shapes
    "NVIDIA H100 80GB HBM3": HOPPER,
    "NVIDIA H200": HOPPER,
    "NVIDIA L20": ADA,
    "NVIDIA L40S": ADA,
    "NVIDIA GeForce RTX 4090": ADA,
    "NVIDIA A100-SXM4-80GB": (
        *("fa2, bf16", "int8", "unavailable", "-", "export_aoti", "static first"),
    ),
    "NVIDIA B200": (
        *("fa4, bf16", "fa2, int8", "e4m3fn", "mxfp8, nvfp4", "export_aoti", "static first"),
    ),
    "NVIDIA GeForce RTX 5090": (
        *("sdpa_cudnn, bf16", "fa4, fa2, int8", "e4m3fn", "mxfp8, nvfp4"),
        *("export_aoti", "static first"),
    ),
    "Tesla T4": ("sdpa, bf16", "int8", "unavailable", "-", "export_aoti", "static first"),
    "Tesla V100-SXM2-32GB": (
        *("sdpa, bf16", "-", "unavailable", "-", "export_aoti", "static first"),
    ),
    "AMD Instinct MI300X": ("aiter, bf16", "fa2", "e4m3fnuz", "-", "compile", "dynamic"),
}


@pytest.fixture
def found(monkeypatch):
    """Give a function that makes torch report one GPU, or none.

    torchao asks the GPU which float8 it has when it is first imported, which lasts as long as the
    process does: that is not to be the pretended one.
    """
    import torchao.quantization  # noqa: F401

    def report(name: str | None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: name is not None)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(name is not None))
        monkeypatch.setattr(torch.version, "hip", None)
        if name is not None:
            (major, minor), memory_gib, hip = FOUND[name]
            properties = SimpleNamespace(
                name=name, major=major, minor=minor, total_memory=memory_gib * GIB
            )
            monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
            monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
            monkeypatch.setattr(torch.version, "hip", hip)

    return report


@pytest.mark.parametrize("name", FOUND)
def test_what_is_chosen_on_each_gpu(name, found):
    found(name)
    machine = detect()
    capability, memory_gib, hip = FOUND[name]
    assert machine == Machine("cuda", name, capability, hip, memory_gib)
    assert readme.choices(machine) == EXPECTED[name]
    assert compile.default_mode(machine, step_cache=True)[0] == "compile"


def test_what_is_chosen_without_a_gpu(found):
    found(None)
    machine = detect()
    assert machine.device == "cpu" and machine.memory_gib > 0
    expected = ("sdpa, bf16", "-", "unavailable", "-", "disabled", "static first")
    assert readme.choices(machine) == expected
    with pytest.raises(UserError, match="no CUDA device found"):
        detect("cuda")


def test_a_device_has_a_number_or_none(found):
    found("NVIDIA H200")
    for device in ("cuda:", "cuda:x", "cuda:-1", "cuda:01", "cuda:0:0", "CUDA", "cpu:0"):
        with pytest.raises(UserError, match=f"--device {device}: unknown device"):
            detect(device)
    with pytest.raises(UserError, match=r"--device cuda:1: found 1 CUDA device\(s\)"):
        detect("cuda:1")


def test_rocm_is_looked_at_before_the_capability(found):
    """An MI300X reports 9.4, which would be a Hopper's."""
    found("AMD Instinct MI300X")
    machine = detect("cuda:0")
    assert not machine.is_hopper and not machine.is_cuda
    assert "ROCm" in machine.short()


def test_the_readme_lists_machines_that_detection_finds(found):
    by_choice = {}
    for name in FOUND:
        found(name)
        by_choice.setdefault(detect().capability, set()).add(readme.choices(detect()))
    for name, machine in readme.MACHINES.items():
        if machine.device == "cuda":
            assert by_choice[machine.capability] == {readme.choices(machine)}, name


@pytest.mark.parametrize(
    ("machine", "emulates"),
    [
        (Machine("cuda", "Tesla T4", (7, 5)), True),
        (Machine("cuda", "NVIDIA A100-SXM4-80GB", (8, 0)), False),
        (Machine("cuda", "AMD Instinct MI300X", (9, 4), hip="7.0"), False),
        (Machine("cpu", "without"), True),
        (Machine("cpu", "with"), False),
    ],
)
def test_a_machine_without_bf16_says_so(monkeypatch, machine, emulates):
    """A GPU by its capability, a CPU by what oneDNN finds; not where fp32 was asked for."""
    has_bf16 = machine.name != "without"
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    assert machine.emulates_bf16 == emulates
    args = make_args("--device", "cpu")
    args.machine, note = machine, "no bf16 in this hardware"
    assert (note in card.render(args)) == emulates
    args.disable_bf16 = True
    assert note not in card.render(args)
    findings = [one.text for one in checks.hardware(machine, None)]
    assert any("--disable_bf16" in text for text in findings) == emulates


def test_a_row_knows_its_threads_its_time_and_how_busy_the_machine_was(monkeypatch):
    args = make_args("--device", "cpu")
    about = card.environment(args)
    assert about["threads"] == torch.get_num_threads()
    assert about["load_average"] == args.started["load_average"] >= 0  # not that of its own end
    assert datetime.fromisoformat(about["time"]).utcoffset().total_seconds() == 0
    assert problem(report_pieces.row(environment=about)) == ""
    monkeypatch.setattr(card.os, "cpu_count", lambda: 4)
    args.started = {"load_average": 2.0}
    assert card.busy(args) == []
    args.started = {"load_average": 2.1}
    (line,) = card.busy(args)
    assert "load average 2.1 at the start, on 4 core(s)" in line and "say little" in line

"""Which attention kernel each machine gets, and what is said when it cannot."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.test_attention import BF16_TOLERANCE, head_errors, make, relative_error, truth
from utils import steps
from utils.hardware import Machine
from utils.kernels import flash_attention as fa
from utils.kernels.int8_attention import int8_attention
from utils.steps import fa3

# Packages are stand-ins: none of them can be imported where there is no GPU.


def stand_in(monkeypatch, name, module):
    for other in (name for names in fa.PACKAGES.values() for name in names):
        monkeypatch.setitem(sys.modules, other, None)  # None: import says that there is no module
    if module is not None:
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fa, "load", fa.find)  # which forgets nothing between two stand-ins


def plain(q, k, v):
    return truth(q, k, v).to(q.dtype)


def scaled(q, k, v, q_descale=None, k_descale=None, v_descale=None):
    pairs = ((q, q_descale), (k, k_descale), (v, v_descale))
    out = truth(*(fa.dequantize_heads(x, d) for x, d in pairs)).bfloat16()
    return out, out.new_zeros(1)


@pytest.mark.parametrize(
    ("backend", "name", "function"),
    [
        ("fa2", "flash_attn", plain),
        ("fa4", "flash_attn.cute", lambda q, k, v: (plain(q, k, v), None)),
        ("aiter", "aiter", plain),
        ("fa3", "flash_attn_interface", plain),
        ("fa3", "flash_attn_interface", lambda q, k, v: (plain(q, k, v), None)),
    ],
)
def test_dispatch_takes_a_tensor_or_a_tuple(monkeypatch, backend, name, function):
    stand_in(monkeypatch, name, SimpleNamespace(flash_attn_func=function))
    q = make("random", (2, 9, 3, 64))
    out = fa._cuda(q, q, q, backend=backend)
    assert out.shape == q.shape
    assert relative_error(out, truth(q, q, q)) < BF16_TOLERANCE


def test_dispatch_hands_descales_to_fa3(monkeypatch):
    stand_in(monkeypatch, "flash_attn_interface", SimpleNamespace(flash_attn_func=scaled))
    q = make("outliers", (2, 9, 3, 64))
    x, scale = fa.quantize_heads(q)
    out = fa._cuda(x, x, x, scale, scale, scale, "fa3")
    expected = fa.flash_attn_func(x, x, x, scale, scale, scale)
    assert max(head_errors(out, expected)) < BF16_TOLERANCE
    with pytest.raises(ValueError, match="no float8"):
        fa._cuda(x, x, x, scale, scale, scale, "sdpa_cudnn")


def comfy_kitchen(available: bool = True):
    def attend(q, k, v):  # (B, H, S, D), in and out
        assert all(x.stride(-1) == 1 for x in (q, k, v))
        return int8_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return SimpleNamespace(int8_attention=attend, int8_attention_is_available=lambda: available)


def test_dispatch_turns_the_layout_for_int8(monkeypatch):
    stand_in(monkeypatch, "comfy_kitchen", comfy_kitchen())
    q, k = make("random", (2, 9, 3, 64), 1), make("random", (2, 21, 3, 64), 2)
    out = fa._cuda(q, k, k, backend="int8")
    assert out.is_contiguous() and torch.equal(out, fa.flash_attn_func(q, k, k, backend="int8"))
    x, scale = fa.quantize_heads(q)
    with pytest.raises(ValueError, match="comfy_kitchen takes no descales"):
        fa._cuda(x, x, x, scale, scale, scale, "int8")


def test_a_pinned_backend_never_falls_back():
    q = make("random", (2, 9, 3, 64))
    assert relative_error(fa._cuda(q, q, q, backend="sdpa_math"), truth(q, q, q)) < BF16_TOLERANCE
    with pytest.raises(RuntimeError):
        fa._cuda(q, q, q, backend="sdpa_cudnn")


class Broken:
    """A finder whose module fails like a wheel built for another CUDA."""

    def find_spec(self, name, path=None, target=None):
        if name == "fa3_fwd_interface":
            raise ImportError("libcudart.so.12: cannot open shared object file")


def test_probe_tells_missing_broken_and_wrong_signature(monkeypatch):
    stand_in(monkeypatch, "", None)
    for backend, names in fa.PACKAGES.items():
        assert f"no module {names[0]}" in fa3.probe(backend, False)[1]
    stand_in(monkeypatch, "flash_attn_interface", SimpleNamespace(flash_attn_func=plain))
    assert fa3.probe("fa3", False) == ("flash_attn_interface", "")
    assert fa3.probe("fa3", True)[1] == "flash_attn_interface takes no q_descale"
    stand_in(monkeypatch, "flash_attn_interface", SimpleNamespace(flash_attn_func=scaled))
    assert fa3.probe("fa3", True) == ("flash_attn_interface", "")
    stand_in(monkeypatch, "flash_attn", SimpleNamespace())
    assert fa3.probe("fa2", False)[1] == "flash_attn has no flash_attn_func"
    assert fa3.probe("fa4", False)[1] == "no module flash_attn.cute"  # FlashAttention-2 alone
    stand_in(monkeypatch, "comfy_kitchen", comfy_kitchen(available=False))
    assert fa3.probe("int8", False)[1].startswith("comfy_kitchen has no int8 kernel")
    monkeypatch.delitem(sys.modules, "fa3_fwd_interface")
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    problem = fa3.probe("fa3", True)[1]
    assert "fa3_fwd_interface is installed but broken: ImportError: libcudart.so.12" in problem
    assert "no module flash_attn_interface" in problem


def test_flash_attn_4_alone_makes_flash_attn_importable_and_empty(monkeypatch, tmp_path):
    """As its wheel is: no __init__.py in the outer folder, and imports that may not be met."""
    cute = tmp_path / "flash_attn" / "cute"
    cute.mkdir(parents=True)
    (cute / "__init__.py").write_text("import cutlass_of_another_world\n")
    for name in ("flash_attn", "flash_attn.cute"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert fa3.probe("fa2", False)[1] == "flash_attn has no flash_attn_func"
    problem = fa3.probe("fa4", False)[1]
    assert problem.startswith("flash_attn.cute is installed but broken") and "cutlass" in problem
    (cute / "__init__.py").write_text("def flash_attn_func(q, k, v, softmax_scale=None): ...\n")
    importlib.invalidate_caches()
    assert fa3.probe("fa4", False) == ("flash_attn.cute", "")
    assert fa3.probe("fa4", True)[1] == "flash_attn.cute takes no q_descale"
    for name in ("flash_attn", "flash_attn.cute"):
        sys.modules.pop(name, None)


CPU = Machine("cpu", "EPYC")
GPU = {
    name: Machine("cuda", name, capability)
    for name, capability in {
        "V100": (7, 0),
        "T4": (7, 5),
        "A100": (8, 0),
        "L40S": (8, 9),
        "H200": (9, 0),
        "B200": (10, 0),
        "Thor": (11, 0),
        "RTX 5090": (12, 0),
    }.items()
}
MI300 = Machine("cuda", "MI300X", (9, 4), hip="7.0")
MI200 = Machine("cuda", "MI250X", (9, 0), hip="7.0")


def installed(backend, fp8):
    return "package", ""


def missing(backend, fp8):
    return ("", "no module") if backend in fa.PACKAGES else ("torch", "")


@pytest.mark.parametrize(
    ("machine", "fp32", "backend", "dtype"),
    [
        (CPU, False, "sdpa", "bf16"),
        (CPU, True, "sdpa", "fp32"),
        (GPU["V100"], False, "sdpa", "bf16"),
        (GPU["V100"], True, "sdpa_efficient", "fp32"),
        (GPU["A100"], False, "fa2", "bf16"),
        (GPU["L40S"], False, "fa2", "bf16"),
        (GPU["H200"], False, "fa3", "fp8"),
        (GPU["H200"], True, "sdpa_efficient", "fp32"),
        (GPU["B200"], False, "fa4", "bf16"),
        (GPU["B200"], True, "sdpa_efficient", "fp32"),
        (GPU["Thor"], False, "fa4", "bf16"),
        (GPU["RTX 5090"], False, "sdpa_cudnn", "bf16"),
        (MI300, False, "aiter", "bf16"),
        (MI300, True, "sdpa", "fp32"),
        (MI200, False, "sdpa", "bf16"),
    ],
)
def test_each_machine_gets_its_backend(machine, fp32, backend, dtype):
    verdict = fa3.choose(machine, torch.float32 if fp32 else torch.bfloat16, probe=installed)
    assert verdict.is_on
    assert (verdict.settings["backend"], verdict.settings["dtype"]) == (backend, dtype)
    assert verdict.lossless == (dtype != "fp8")


@pytest.mark.parametrize(
    ("machine", "backend"),
    [
        *((GPU["H200"], name) for name in fa3.BACKENDS if name != "aiter"),
        *((MI300, name) for name in ("aiter", "fa2", "sdpa_flash", "sdpa_efficient")),
        (GPU["A100"], "sdpa_cudnn"),
        (GPU["T4"], "int8"),
    ],
)
def test_what_a_machine_has_may_be_named(machine, backend):
    verdict = fa3.choose(machine, torch.bfloat16, backend=backend, probe=installed)
    assert verdict.is_on and verdict.settings["backend"] == backend


def test_precision_of_fa3():
    def choose(**flags):
        verdict = fa3.choose(GPU["H200"], torch.bfloat16, probe=installed, **flags)
        return verdict.settings["dtype"], verdict.lossless

    assert choose() == ("fp8", False)
    assert choose(quant_disabled=True) == ("bf16", True)
    assert choose(quant_disabled=True, fa3_dtype="fp8") == ("fp8", False)
    assert choose(fa3_dtype="bf16") == ("bf16", True)


@pytest.mark.parametrize("machine", [CPU, MI300, *(g for n, g in GPU.items() if n != "H200")])
def test_fp8_by_name_is_refused_off_hopper(machine):
    verdict = fa3.choose(machine, torch.bfloat16, fa3_dtype="fp8", probe=installed)
    assert verdict.state == "refused"
    assert "Hopper" in verdict.reason


def test_fp8_by_name_is_refused_in_fp32():
    verdict = fa3.choose(GPU["H200"], torch.float32, fa3_dtype="fp8", probe=installed)
    assert verdict.state == "refused"
    assert "fp32" in verdict.reason


@pytest.mark.parametrize(
    ("machine", "fp32", "backend"),
    [
        *((CPU, False, name) for name in fa3.BACKENDS),
        (GPU["A100"], False, "fa3"),
        (GPU["H200"], False, "aiter"),
        (GPU["V100"], False, "fa2"),
        (GPU["V100"], False, "int8"),
        (GPU["L40S"], True, "int8"),
        (MI300, False, "int8"),
        (GPU["L40S"], False, "fa4"),
        (GPU["B200"], True, "fa4"),
        (MI300, False, "fa4"),
        (GPU["V100"], False, "sdpa_efficient"),
        (GPU["H200"], True, "fa3"),
        (GPU["H200"], True, "sdpa_cudnn"),
        (MI300, False, "sdpa_cudnn"),
        (MI300, False, "fa3"),
        (MI200, False, "aiter"),
    ],
)
def test_a_backend_named_for_the_wrong_machine_is_refused(machine, fp32, backend):
    dtype = torch.float32 if fp32 else torch.bfloat16
    verdict = fa3.choose(machine, dtype, backend=backend, probe=installed)
    assert verdict.state == "refused"
    assert all(part in verdict.reason for part in ("found", "expected", "--disable_fa3"))


def test_a_missing_package_stops_only_where_there_is_no_equal():
    for machine, package in ((GPU["H200"], "fa3-fwd"), (MI300, "amd-aiter")):
        verdict = fa3.choose(machine, torch.bfloat16, probe=missing)
        assert verdict.state == "refused"
        assert all(
            part in verdict.reason for part in ("no module", f"install {package}", "--disable_fa3")
        )
    for machine, name, instead in (("A100", "fa2", "sdpa_flash"), ("B200", "fa4", "sdpa_cudnn")):
        verdict = fa3.choose(GPU[machine], torch.bfloat16, probe=missing)
        assert verdict.settings["backend"] == instead and verdict.lossless
        assert "no module" in verdict.settings["why"]
        named = fa3.choose(GPU[machine], torch.bfloat16, backend=name, probe=missing)
        assert named.state == "refused" and fa3.INSTALL[name] in named.reason


@pytest.mark.parametrize(
    ("name", "backend", "dtype"),
    [(name, "int8", "int8") for name in GPU if name != "V100"]
    + [(name, "fa4", "bf16") for name in ("H200", "B200", "Thor", "RTX 5090")],
)
def test_what_is_only_chosen_by_name(name, backend, dtype):
    """int8 is lossy whatever else is off; a missing package is never replaced."""
    for quant_disabled in (False, True):
        found = fa3.choose(
            GPU[name], torch.bfloat16, quant_disabled, backend=backend, probe=installed
        )
        assert (found.settings["backend"], found.settings["dtype"]) == (backend, dtype)
        assert found.lossless == (dtype != "int8")
    refused = fa3.choose(GPU[name], torch.bfloat16, backend=backend, probe=missing)
    assert refused.state == "refused" and fa3.INSTALL[backend] in refused.reason


def test_fa3_without_descales_is_refused_with_the_way_out():
    def old(backend, fp8):
        return "flash_attn_interface", "takes no q_descale" if fp8 else ""

    verdict = fa3.choose(GPU["H200"], torch.bfloat16, probe=old)
    assert verdict.state == "refused"
    assert "--fa3_dtype bf16" in verdict.reason
    assert fa3.choose(GPU["H200"], torch.bfloat16, fa3_dtype="bf16", probe=old).is_on


def test_flags_reach_the_table(monkeypatch):
    monkeypatch.setattr(fa3, "probe", installed)
    flags = {"disable_fa3": False, "disable_quant": False, "fa3_dtype": None}
    flags["fa3_rotation"] = False
    run = {"machine": GPU["H200"], "dtype": torch.bfloat16, "attention_backend": "auto"}

    def check(**changed):
        return fa3.check(SimpleNamespace(**(run | flags | changed)))

    assert check().settings["dtype"] == "fp8"
    assert check(disable_quant=True).settings["dtype"] == "bf16"
    assert check(attention_backend="sdpa_cudnn").settings["backend"] == "sdpa_cudnn"
    assert check(disable_fa3=True).reason == "--disable_fa3"
    assert check(fa3_rotation=True).settings["rotation"] == "Hadamard"
    monkeypatch.setattr(steps, "import_problem", lambda *names: "no module triton")
    assert "--fa3_rotation: found no module triton" in check(fa3_rotation=True).reason

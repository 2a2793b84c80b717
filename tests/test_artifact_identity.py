"""What makes a package another one, and when one was last used."""

import json
import os

import pytest
import torch
from aoti_pieces import make_args

from utils import artifacts
from utils.artifacts import run, store
from utils.artifacts.identity import code_digest, differences
from utils.artifacts.private import file_problem
from utils.hardware import Machine
from utils.steps import on

IDENTITY = {"component": "decoder", "dtype": "bf16"}


def test_sources_are_digested_by_names_and_contents_in_any_order(tmp_path):
    one, two, other = (tmp_path / name for name in ("one.py", "two.py", "other.py"))
    one.write_text("a = 1")
    two.write_text("b = 2")
    first = code_digest([one, two])
    assert code_digest([two, one]) == first != code_digest([one])
    two.write_text("b = 3")
    assert code_digest([one, two]) != first
    two.write_text("b = 2")
    assert code_digest([one, two]) == first
    assert code_digest([one, two.rename(other)]) != first


def test_each_field_that_differs_is_a_line_in_the_order_of_names():
    found = {"b": {"x": 1, "y": True}, "a": {"on": {}}, "c": 1}
    assert differences(found, dict(reversed(found.items()))) == []
    assert differences(found, {"b": {"x": 2, "y": 1}, "a": {}, "c": 1}) == [
        "a: found nothing, expected {}",
        "a.on: found {}, expected nothing",
        "b.x: found 1, expected 2",
        "b.y: found True, expected 1",
    ]


def test_steps_that_are_off_or_outside_of_the_packages_are_no_part_of_them(tmp_path):
    args = make_args(tmp_path)
    assert not args.plan["quant"].is_on
    args.plan |= {"memory": on(tier="tiled"), "fused_mlp": on(joint=True)}
    found = artifacts.identity_of_run(args, {})["steps"]
    assert found == {"fused_projections": {}, "channels_last": {}, "fused_mlp": {"joint": True}}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_cpu_with_other_instructions_gets_packages_of_its_own(device, tmp_path, monkeypatch):
    """Of the same name and vector width; the code that launches a GPU's kernels is C++, too."""
    args = make_args(tmp_path, machine=Machine(device, "any", (9, 0)))
    first = artifacts.identity_of_run(args, {})
    has = torch.cpu.get_capabilities()
    less = has | {"sse4_2": not has.get("sse4_2")}
    for found, fields in ((has | {"num_sockets": 64}, []), (less, ["machine.cpu_isa"])):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        lines = differences(first, artifacts.identity_of_run(args, {}))
        assert [line.partition(":")[0] for line in lines] == fields


def test_threads_and_the_compilers_variables_make_another_package(tmp_path, monkeypatch):
    """A package that was built for one thread has loops for one thread, whatever there is later."""
    args = make_args(tmp_path)
    first = artifacts.identity_of_run(args, {})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setenv("TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS", "ATEN")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # where, not what
    found = differences(first, artifacts.identity_of_run(args, {}))
    assert [line.partition(":")[0] for line in found] == [
        "machine.threads",
        "variables",
        "variables.TORCHINDUCTOR_MAX_AUTOTUNE_GEMM_BACKENDS",
    ]
    args = make_args(tmp_path, machine=Machine("cuda", "NVIDIA H200", (9, 0)))
    assert "threads" not in artifacts.identity_of_run(args, {})["machine"]


def test_packages_are_looked_for_in_the_home_that_the_shell_would_mean(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (line,) = run.stored_problems(make_args("~/cache"), {}, [{"component": "decoder"}])
    assert line == f"decoder: found no package in {tmp_path}/cache"
    assert artifacts.open_cache("~/cache") == tmp_path / "cache"


def test_only_plain_files_that_others_cannot_write_are_trusted(tmp_path):
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch(mode=0o600)
    link.symlink_to(file)
    assert file_problem(file) == ""
    assert "expected a plain file" in file_problem(link)
    file.chmod(0o620)
    assert "mode: found 0620, which lets others write" in file_problem(file)


def test_a_package_that_is_found_counts_as_used_now(tmp_path):
    root = artifacts.open_cache(tmp_path / "cache")
    package = artifacts.save(root, IDENTITY, {".pt2": b"code"}, {})
    manifest = root / f"{package.name}.json"
    os.utime(manifest, (1, 1))
    assert artifacts.find(root, IDENTITY | {"dtype": "fp32"})[0] is None
    assert manifest.stat().st_mtime == 1
    assert artifacts.find(root, IDENTITY)[0] == package
    assert manifest.stat().st_mtime > 1


def test_only_a_package_that_is_there_can_be_damaged(tmp_path):
    root = artifacts.open_cache(tmp_path / "cache")
    assert store.damage(root, IDENTITY, ["nothing there"]) == ""
    package = artifacts.save(root, IDENTITY, {".pt2": b"code"}, {})
    package.files[".pt2"].write_bytes(b"else")
    _, lines = artifacts.find(root, IDENTITY)
    assert lines[0] in store.damage(root, IDENTITY, lines)


@pytest.mark.parametrize("entry", [["a list"], {"name": "x"}, "text", None])
def test_an_entry_that_is_no_file_is_one_line(entry):
    manifest = {"format": store.FORMAT, "identity": {}, "constants": {}, "files": {".pt2": entry}}
    manifest["sha256"] = store.checksum(manifest)
    found, problem = store.parse_manifest("x", json.dumps(manifest).encode())
    assert found is None and problem.startswith("x: files..pt2: found ")

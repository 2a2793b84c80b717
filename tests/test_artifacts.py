"""The store of packages alone, and what the step refuses before any weight is loaded."""

import ast
import hashlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from aoti_pieces import make_args, transformer_call

import tiny_flux
from utils import aoti, artifacts
from utils.artifacts import run
from utils.artifacts.store import checksum
from utils.errors import UserError
from utils.hardware import Machine
from utils.pipeline_utils import STEPS
from utils.steps import export_aoti, on

IDENTITY = {"component": "decoder", "dtype": "bf16", "versions": {"torch": "1"}, "code": "a"}


def store(path):
    return artifacts.open_cache(path / "cache")


def test_store_round_trip_and_replacement(tmp_path):
    root = store(tmp_path)
    saved = artifacts.save(root, IDENTITY, {".pt2": b"old"}, {"w": [[2], "f", [1]]})
    assert artifacts.find(root, IDENTITY) == (saved, [])
    newer = IDENTITY | {"versions": {"torch": "2"}}
    assert artifacts.find(root, newer)[1] == [f"{saved.name}: versions.torch: found 1, expected 2"]
    again = artifacts.save(root, newer, {".pt2": b"new"}, {})
    assert again.name == saved.name and not saved.files[".pt2"].exists()
    assert [path.name for path in root.iterdir() if path.suffix == ".pt2"] == [
        again.files[".pt2"].name
    ]


def test_a_package_that_another_process_removes_is_none(tmp_path, monkeypatch):
    """Whoever makes room or stores its own may do it between a look and the reading."""
    root = store(tmp_path)
    saved = artifacts.save(root, IDENTITY, {".pt2": b"code", ".txt": b"more"}, {})
    assert artifacts.read(root, IDENTITY, ".pt2") == ({".pt2": b"code", ".txt": b"more"}, [])
    find = artifacts.find

    def found(*where):
        package = find(*where)
        saved.files[".pt2"].unlink()
        return package

    monkeypatch.setattr("utils.artifacts.store.find", found)
    removed = ({}, [f"{saved.name}: removed by another process"])
    assert artifacts.read(root, IDENTITY, ".pt2") == removed


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("call", range(6))
def test_an_interrupted_save_leaves_the_previous_package(tmp_path, monkeypatch, error, call):
    root = store(tmp_path)
    old = artifacts.save(root, IDENTITY, {".pt2": b"old", ".safetensors": b"t"}, {})
    before = {path: path.read_bytes() for path in root.iterdir()}
    real, calls = os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) > call:
            raise error
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        artifacts.save(root, IDENTITY, {".pt2": b"new", ".safetensors": b"t"}, {})
    found, lines = artifacts.find(root, IDENTITY)
    assert lines == []
    if call < 5:
        assert {path: path.read_bytes() for path in root.iterdir()} == before and found == old
    else:  # after the manifest's rename: the new package stands, the old code goes with the next
        assert found.files[".pt2"].read_bytes() == b"new"


def test_cache_directory_is_private(tmp_path, monkeypatch):
    root = store(tmp_path / "a")
    assert root.stat().st_mode & 0o777 == 0o700
    for mode in (0o770, 0o707, 0o722):
        root.chmod(mode)
        with pytest.raises(UserError, match=rf"--cache-dir.*mode 0{mode:o} lets others write"):
            artifacts.open_cache(root)
    root.chmod(0o755)
    artifacts.open_cache(root)
    monkeypatch.setattr(os, "geteuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(UserError, match="owned by user"):
        artifacts.open_cache(root)


@pytest.mark.parametrize(
    ("changes", "state", "reason"),
    [
        ({}, "on", ""),
        ({"compile_export_mode": "disabled"}, "off", "disabled"),
        ({"compile_export_mode": "compile", "use_cached_model": True}, "off", "compile"),
        (
            {"compile_export_mode": "disabled", "use_cached_model": True},
            "refused",
            "--use-cached-model: found --compile_export_mode disabled, expected export_aoti or",
        ),
        (
            {"compile_export_mode": "disabled", "force_export": True},
            "refused",
            "--force_export: found --compile_export_mode disabled, expected export_aoti or",
        ),
        (
            {"use_cached_model": True, "force_export": True},
            "refused",
            "--force_export, --use-cached-model: expected one of them",
        ),
        ({"compile_scope": "blocks"}, "on", ""),
        ({"use_cached_model": True}, "refused", "transformer: found no package in"),
        (
            {"use_cached_model": True, "compile_scope": "blocks"},
            "refused",
            "single_block: found no package in",
        ),
    ],
    ids=[
        "on",
        "off",
        "compile looks for itself",
        "cached, not compiled",
        "forced, not compiled",
        "cached and forced",
        "blocks",
        "nothing cached",
        "no blocks cached",
    ],
)
def test_check(tmp_path, changes, state, reason):
    verdict = export_aoti.check(make_args(tmp_path / "cache", **changes))
    assert verdict.state == state
    assert reason in verdict.reason
    assert not (tmp_path / "cache").exists()  # checking makes nothing


def test_blocks_with_scales_per_tensor_are_refused(tmp_path, monkeypatch):
    """Each block's scales would be in its code: 57 packages instead of two."""
    monkeypatch.setattr(export_aoti.quant, "check", lambda args: on())
    args = make_args(tmp_path, compile_scope="blocks", quant_granularity="tensor")
    verdict = export_aoti.check(args)
    assert verdict.state == "refused" and "use --quant_granularity row" in verdict.reason


def test_digests_are_read_once_and_again_after_any_change(tmp_path, monkeypatch):
    root, folder = store(tmp_path), tmp_path / "model"
    (folder / "vae").mkdir(parents=True)
    weights, config = folder / "vae" / "weights.safetensors", folder / "vae" / "config.json"
    weights.write_bytes(b"weights")
    config.write_bytes(b"{}")
    read, digest_of = [], hashlib.file_digest

    def counted(stream, name):
        read.append(Path(stream.name).name)
        return digest_of(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    now = weights.stat().st_ctime_ns
    monkeypatch.setattr("utils.artifacts.digests.time.time_ns", lambda: now)
    first = artifacts.checkpoint_digest(folder, root)
    assert artifacts.checkpoint_digest(folder, root) == first
    assert len(read) == 4  # files that were written just now may change within the clock's grain
    later = now + 10**13
    monkeypatch.setattr("utils.artifacts.digests.time.time_ns", lambda: later)
    artifacts.checkpoint_digest(folder, root)
    read.clear()
    assert artifacts.checkpoint_digest(folder, root) == first and read == []
    status = weights.stat()
    weights.write_bytes(b"WEIGHTS")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # the change time tells
    assert artifacts.checkpoint_digest(folder, root) != first and read == ["weights.safetensors"]
    (kept,) = root.glob("digests.*.json")
    harmed = bytearray(kept.read_bytes())
    harmed[harmed.index(b"vae/")] ^= 1
    kept.write_bytes(harmed)
    read.clear()
    artifacts.checkpoint_digest(folder, root)
    assert sorted(read) == ["config.json", "weights.safetensors"]
    kept.chmod(0o666)
    artifacts.checkpoint_digest(folder, root)
    assert len(read) == 4


def test_files_of_a_linked_folder_belong_to_a_checkpoint(tmp_path):
    """Checkpoints share a VAE so, the bundled ones too."""
    root, folder, shared = store(tmp_path), tmp_path / "model", tmp_path / "shared"
    folder.mkdir()
    shared.mkdir()
    (shared / "weights.safetensors").write_bytes(b"weights")
    (folder / "vae").symlink_to(shared)
    (folder / "itself").symlink_to(folder)  # an endless path ends
    first = artifacts.checkpoint_digest(folder, root)
    (shared / "weights.safetensors").write_bytes(b"others!")
    assert artifacts.checkpoint_digest(folder, root) != first
    bundled = Path(tiny_flux.__file__).parent / "tiny-dev"
    names = [str(f.relative_to(bundled)) for f in artifacts.files_below(bundled, "*.safetensors")]
    assert "vae/diffusion_pytorch_model.safetensors" in names and len(names) == 4


def leaves(value: dict, path: tuple = ()):
    """Name every field of nested dicts by its keys."""
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key)


def test_every_field_of_a_real_run_is_refused_by_name(tmp_path):
    root, args = (
        store(tmp_path),
        make_args(tmp_path / "cache", plan={"quant": on(granularity="row")}),
    )
    identity = artifacts.identity_of_run(args, export_aoti._options(args)) | {
        "component": "transformer",
        "inputs": aoti.describe(transformer_call()),
        "folded_weights": None,
    }
    package = artifacts.save(root, identity, {".pt2": b"code"}, {})
    path = root / f"{package.name}.json"
    whole, fields = path.read_text(), set()
    for *parents, leaf in leaves(identity):
        manifest = json.loads(whole)
        at = manifest["identity"]
        for parent in parents:
            at = at[parent]
        at[leaf] = "another"
        path.write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))
        field = ".".join((*parents, leaf))
        fields.add(field)
        found, lines = artifacts.find(root, identity)
        assert found is None and len(lines) == 1, field
        assert lines[0].startswith(f"{package.name}: {field}: found another, expected ")
    path.write_text(whole)
    assert artifacts.find(root, identity)[0] == package
    assert fields >= {
        *(f"checkpoint.{key}" for key in ("name", "weights")),
        *(f"machine.{key}" for key in ("device", "name", "capability", "hip", "cpu_isa")),
        *(f"versions.{key}" for key in ("torch", "triton", "torchao", "diffusers", "cuda")),
        *(f"versions.{key}" for key in ("driver", "os", "libc")),
        *("component", "dtype", "code", "steps.quant.granularity", "inputs.hidden_states.shape"),
        *("compiler.epilogue_fusion", "compiler.always_keep_tensor_constants"),
    }


OUTSIDE = {  # what the sources behind a package import without its changing the package, and why
    "errors": "words",
    "progress": "words",
    "prompts": "words",
    "artifacts": "finds and stores it",
    "cudagraph": "records it",
    "pipeline_utils": "makes the call, which is recorded in the manifest",
    "hardware": "describes the machine, which is in the manifest",
    "checkpoints": "finds weights, whose digests are in the manifest",
    "acceleration": "fills in flags, whose effects are in the manifest",
    "schedulers": "makes the scheduler, which is in no package",
    "guidance": "decides how often a package is called",
    "loras": "reads files whose digests are in the manifest",
    "gguf_file": "reads the header of a file whose digest is in the manifest",
    "scales_file": "reads a file whose digest is in the manifest",
    "random_weights": "gives the config, whose shapes are in the manifest",
    "work": "the same: what the config leaves out",
}


def imported(path: Path) -> set[str]:
    """Name the modules of utils that a source imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "utils":
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("utils.")}
    return found


def test_an_edit_of_any_source_behind_a_package_makes_it_another():
    """All steps on: whatever their sources import is digested as well, or named above."""
    steps = [step.NAME for step in STEPS if step.NAME not in run.OUTSIDE]
    assert len(steps) == len(STEPS) - len(run.OUTSIDE)  # none of those is misspelt
    digested = set(run.sources_of_run(dict.fromkeys(steps)))
    assert {run.UTILS / "steps" / f"{name}.py" for name in steps} <= digested
    for source in digested:
        for module in imported(source):
            path = run.UTILS.parent / (module.replace(".", "/"))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            if file.is_file() and file != run.UTILS / "__init__.py":
                known = file in digested or module.split(".")[1] in OUTSIDE
                known |= file.parent.name == "steps"  # digested where it is on
                assert known, f"{source.name} imports {module}"
    assert len(digested) > len(steps) + 8


def test_what_the_weights_come_from_is_in_the_fingerprint(tmp_path):
    args = make_args(tmp_path)
    assert run.weights_of_run(args) == {"name": "tiny", "weights": "sha256:1"}
    assert artifacts.identity_of_run(args, {})["checkpoint"] == run.weights_of_run(args)


def test_a_gpu_and_its_driver_are_in_the_fingerprint(tmp_path, monkeypatch):
    seen = "580.159, 700.00, 1980, 1980, 40"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=seen))
    args = make_args(tmp_path, machine=Machine("cuda", "NVIDIA H200", (9, 0)))
    identity = artifacts.identity_of_run(args, {})
    assert identity["machine"]["name"] == "NVIDIA H200"
    assert identity["versions"]["driver"] == "580.159"


def test_check_refuses_a_cache_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    verdict = export_aoti.check(make_args(tmp_path / "file" / "cache"))
    assert verdict.state == "refused" and "is not a folder" in verdict.reason


def test_flags_are_spelled_with_either_dash():
    from utils.benchmark_utils import create_parser

    args = create_parser().parse_args(["--cache_dir", "x", "--use_cached_model"])
    assert args.cache_dir == "x" and args.use_cached_model
    assert not args.force_export and create_parser().parse_args(["--force-export"]).force_export

"""Looking after the store: python -m utils.artifacts list | verify | prune, as a user runs it."""

import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils import artifacts
from utils.artifacts.__main__ import main, parse_size
from utils.artifacts.store import checksum
from utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
IDENTITY = {
    "checkpoint": {"name": "tiny-schnell", "weights": "sha256:1"},
    "dtype": "torch.bfloat16",
    "machine": {"device": "cpu", "name": "test processor"},
    "steps": {"fused_projections": {}, "channels_last": {}},
    "versions": {"torch": "2.13.0"},
    "inputs": {"sample": {"shape": [1, 16, 32, 32], "dtype": "torch.bfloat16"}},
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Give a function that runs the command in this process: its exit code and its lines."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["artifacts", *words, "--cache-dir", str(tmp_path)])
        code = 0
        try:
            main()
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().out.splitlines()

    tmp_path.chmod(0o700)
    return call


def add(root, component, content=b"code", used_days_ago=0):
    package = artifacts.save(root, IDENTITY | {"component": component}, {".pt2": content}, {})
    then = time.time() - 86400 * used_days_ago
    os.utime(root / f"{package.name}.json", (then, then))
    return package


def test_an_unknown_word_is_one_line_that_names_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "utils.artifacts", "burn"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.endswith("; see python -m utils.artifacts --help\n")


def test_kept_digests_are_no_broken_package(run, tmp_path, monkeypatch):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with monkeypatch.context() as patch:  # a file touched just now is read again, not kept
        later = time.time_ns() + 10**10
        patch.setattr("utils.artifacts.digests.time.time_ns", lambda: later)
        artifacts.checkpoint_digest(model, tmp_path)
    assert [path.name for path in tmp_path.glob("digests*")]
    code, lines = run("list")
    assert code == 0 and not any("UNUSABLE" in line for line in lines)
    assert any("digests of a checkpoint's files" in line for line in lines)
    assert run("verify")[0] == 0
    run("prune")
    assert list(tmp_path.glob("digests*"))


def test_list_names_each_package_as_artifact_digest_takes_it(run, tmp_path):
    package = add(tmp_path, "decoder")
    digest = hashlib.sha256((tmp_path / f"{package.name}.json").read_bytes()).hexdigest()
    assert f"    {package.name}@sha256:{digest}" in run("list")[1]


def test_list_says_what_each_package_covers(run, tmp_path):
    package = add(tmp_path, "decoder", bytes(3 * 2**20), used_days_ago=3)
    (tmp_path / "reference-0123456789abcdef.safetensors").write_bytes(b"pictures")
    code, lines = run("list")
    assert code == 0
    assert lines[0].startswith(f"{package.name}  3.0 MiB, built ")
    assert lines[0].endswith("used 3 d ago")
    assert lines[1].strip() == (
        "tiny-schnell, bfloat16, latents 1x16x32x32, test processor, torch 2.13.0, "
        "steps channels_last fused_projections"
    )
    assert lines[-1] == f"{tmp_path}: 1 package(s), 3.0 MiB with all other files"


def test_the_module_is_the_command(tmp_path):
    tmp_path.chmod(0o700)
    command = [sys.executable, "-m", "utils.artifacts"]
    for words, expected in (
        (("list", "--cache-dir", str(tmp_path / "none")), "no such folder; a run makes it"),
        (("prune", "--max-size", "many"), "--max-size many: expected a size such as 20GB"),
        (("list", "--max-size", "1GB"), "--max-size: found list, expected prune"),
        (("sell",), "invalid choice: 'sell'"),
    ):
        done = subprocess.run([*command, *words], cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        assert expected in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_open_to_others_is_refused(run, tmp_path):
    tmp_path.chmod(0o770)
    with pytest.raises(UserError, match="lets others write"):
        run("verify")


def test_verify_reads_every_file(run, tmp_path):
    good, bad = add(tmp_path, "decoder"), add(tmp_path, "transformer")
    assert run("verify")[0] == 0
    bad.files[".pt2"].write_bytes(b"edoc")
    code, lines = run("verify")
    assert code == 1
    assert lines[0] == f"{good.name}: as written, 0.0 MiB"
    assert "sha256: found" in lines[1]
    manifest = tmp_path / f"{good.name}.json"
    changed = json.loads(manifest.read_text().replace("bfloat16", "float32"))
    manifest.write_text(json.dumps(changed | {"sha256": checksum(changed)}))
    assert any("decoder" in line and "identity: found that of" in line for line in run("verify")[1])


def test_prune_removes_what_was_used_longest_ago(run, tmp_path):
    for days, component in enumerate(("double_block", "decoder", "transformer")):
        add(tmp_path, component, bytes(2**20), used_days_ago=days)
    (tmp_path / "reference-0123456789abcdef.safetensors").write_bytes(bytes(2**20))
    (tmp_path / "mine.txt").write_text("of no business to the store")
    assert run("prune") == (0, [f"{tmp_path}: freed 0.0 MiB, 4.0 MiB left"])
    code, lines = run("prune", "--max-size", "3.5MiB")
    assert code == 0 and len(lines) == 2
    assert lines[0].startswith("transformer-") and lines[0].endswith("removed (--max-size)")
    assert lines[1] == f"{tmp_path}: freed 1.0 MiB, 3.0 MiB left"
    assert artifacts.find(tmp_path, IDENTITY | {"component": "decoder"})[0]  # and now used
    run("prune", "--max-size", "1.1MB")
    left = sorted(path.name.split("-")[0] for path in tmp_path.iterdir())
    assert left == ["decoder", "decoder", "mine.txt"]
    run("prune", "--max-size", "0")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_prune_removes_leftovers_and_what_is_unusable(run, tmp_path):
    good, old, short = (add(tmp_path, name) for name in ("decoder", "transformer", "double_block"))
    manifest = tmp_path / f"{old.name}.json"
    manifest.write_text(manifest.read_text().replace('"format": 2', '"format": 1'))
    short.files[".pt2"].write_bytes(b"co")
    leftovers = [
        f"{good.name}-00000000.pt2",
        f".{good.name}-00000000.pt2.x1.tmp",
        f".{good.name}.json.x2.tmp",
        f".{good.name}.lock",
        ".reference-0123456789abcdef.safetensors.x3.tmp",
    ]
    for name in leftovers:
        (tmp_path / name).write_bytes(b"half")
    (tmp_path / f".{good.name}.building").mkdir()
    (tmp_path / f".{good.name}.building" / "package.pt2").write_bytes(b"half")
    yesterday = time.time() - 86400
    os.utime(tmp_path / leftovers[-1], (yesterday, yesterday))
    code, lines = run("list")
    assert code == 0 and sum("UNUSABLE" in line for line in lines) == 2
    assert any("format: found 1, expected 2" in line for line in lines)
    assert run("prune")[0] == 0
    assert artifacts.find(tmp_path, IDENTITY | {"component": "decoder"})[0] == good
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {f"{good.name}.json", good.files[".pt2"].name}


def test_prune_leaves_what_is_renamed_meanwhile(run, tmp_path, monkeypatch):
    glob = Path.glob

    def found(folder, pattern):
        return [*glob(folder, pattern), *([folder / ".digests.1.json.x.tmp"] * (pattern[0] == "."))]

    monkeypatch.setattr(Path, "glob", found)
    assert run("prune") == (0, [f"{tmp_path}: freed 0.0 MiB, 0.0 MiB left"])


def test_prune_leaves_a_build_alone(run, tmp_path):
    identity, other = IDENTITY | {"component": "decoder"}, add(tmp_path, "transformer")
    with artifacts.building(tmp_path, identity) as scratch:
        (scratch / "package.pt2").write_bytes(bytes(2**20))
        code, lines = run("prune", "--max-size", "0.5MiB")
        assert code == 0 and "being built by another process" in lines[0]
        assert lines[1:] == [f"{tmp_path}: freed 0.0 MiB, 0.0 MiB left"]  # it does not count
        assert (scratch / "package.pt2").exists() and other.files[".pt2"].exists()
        assert len(run("prune", "--max-size", "0")[1]) == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"),
    [("20GB", 20 * 10**9), ("1.5 GiB", 3 * 2**29), ("7", 7), ("2tb", 2 * 10**12), ("0b", 0)],
)
def test_sizes(text, size):
    assert parse_size(text) == size

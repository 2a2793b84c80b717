"""The store of packages alone, and what the step refuses before any weight is loaded."""

import os
from pathlib import Path

import pytest
from aoti_pieces import make_args

from utils import artifacts
from utils.errors import UserError
from utils.steps import export_aoti

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
        (
            {"compile_export_mode": "compile", "use_cached_model": True},
            "refused",
            "--use-cached-model: found --compile_export_mode compile, expected export_aoti",
        ),
        ({"compile_scope": "blocks"}, "refused", "--compile_scope blocks"),
        ({"use_cached_model": True}, "refused", "transformer: found no package in"),
    ],
    ids=["on", "off", "cached without export", "blocks", "nothing cached"],
)
def test_check(tmp_path, changes, state, reason):
    verdict = export_aoti.check(make_args(tmp_path / "cache", **changes))
    assert verdict.state == state
    assert reason in verdict.reason
    assert not (tmp_path / "cache").exists()  # checking makes nothing


def test_check_refuses_a_cache_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    verdict = export_aoti.check(make_args(tmp_path / "file" / "cache"))
    assert verdict.state == "refused" and "is not a folder" in verdict.reason


def test_flags_are_spelled_with_either_dash():
    from utils.benchmark_utils import create_parser

    args = create_parser().parse_args(["--cache_dir", "x", "--use_cached_model"])
    assert args.cache_dir == "x" and args.use_cached_model
    assert not Path(create_parser().parse_args([]).cache_dir).is_absolute()

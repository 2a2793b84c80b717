"""A store with one small package in it, and what must be true of it: without torch."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import artifacts
from utils.artifacts import store

IDENTITY = {
    "component": "decoder",
    "checkpoint": {"name": "tiny", "weights": "sha256:1"},
    "dtype": "torch.bfloat16",
    "inputs": {"sample": {"shape": [1, 16, 32, 32], "device": "cpu"}},
    "versions": {"torch": "2.13.0", "driver": None},
    "code": "0123456789abcdef",
}
CONSTANTS = {"conv_in.weight": [[128, 16, 3, 3], "torch.bfloat16", [144, 1, 48, 16]]}
SOURCES = str(Path(store.__file__).parent)


def contents(version: int) -> dict[str, bytes]:
    """Make two files that say which build they come from, of a size that differs."""
    return {
        ".pt2": f"code {version};".encode() * (1000 + version % 1000),
        ".safetensors": f"tensors {version};".encode() * 50,
    }


def build(root: Path, version: int) -> store.Package:
    """Build one package as the step does: under its lock, through its folder."""
    with artifacts.building(root, IDENTITY) as scratch:
        (scratch / "package.pt2").write_bytes(b"half")
        return artifacts.save(root, IDENTITY, contents(version), CONSTANTS)


def is_whole(root: Path, versions: range) -> bool:
    """Whether a package of one of these builds is found, all of its files from the same one."""
    package, _ = artifacts.find(root, IDENTITY)
    if package is None or package.constants != CONSTANTS:
        return False
    found = {suffix: path.read_bytes() for suffix, path in package.files.items()}
    version = int(found[".pt2"].split(b";")[0].split()[1])
    return version in versions and found == contents(version)


def recovers(root: Path, version: int) -> bool:
    """Whether the next build works and leaves nothing but itself."""
    package = build(root, version)
    left = {path.name for path in root.iterdir()}
    return left == {f"{package.name}.json", *(path.name for path in package.files.values())}


def is_refused(root: Path, *words: str) -> bool:
    """Whether nothing is found, and each word stands in a line that says why."""
    package, lines = artifacts.find(root, IDENTITY)
    return package is None and all(any(word in line for line in lines) for word in words)


@contextmanager
def stored(folder: Path) -> Iterator[tuple[Path, store.Package]]:
    """Give a store with one package in it, gone afterwards."""
    root = artifacts.open_cache(tempfile.mkdtemp(dir=folder))
    try:
        yield root, build(root, 0)
    finally:
        shutil.rmtree(root)

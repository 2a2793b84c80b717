"""Digests of a checkpoint's files, read once and not at every start: 31 GiB at full size.

A digest is kept as long as path, size, inode and both times of the file stay as they were. The
change time cannot be set back, so an edit that restores the old modification time is noticed too.
A file that was touched within the clock's grain of being read is not kept.
"""

import glob
import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path

from utils.artifacts.private import file_problem, write_atomically

FORMAT = 1
GRAIN_NS = 2 * 10**9  # of the coarsest file system's times
WEIGHTS = ("*.safetensors", "*.json")


def checkpoint_digest(folder: Path, root: Path) -> str:
    """Digest the weights and configs of a folder in diffusers' layout; `root` keeps what is read.

    Returns: hex digits
    """
    folder = folder.resolve()
    files = [file for pattern in WEIGHTS for file in files_below(folder, pattern)]
    return _digest(files, folder, folder, root)


def files_below(folder: Path, pattern: str) -> list[Path]:
    """List a checkpoint's files, those of linked folders too: checkpoints share T5 or a VAE so."""
    found = glob.glob(f"**/{pattern}", root_dir=folder, recursive=True, include_hidden=True)
    return sorted(folder / name for name in found)


def file_digest(file: Path, root: Path) -> str:
    """Digest one file of weights, such as a GGUF, in the same way.

    Returns: hex digits
    """
    file = file.resolve()
    return _digest([file], file.parent, file, root)


def _digest(files: list[Path], folder: Path, of: Path, root: Path) -> str:
    # A dot, no dash: the names of packages begin with a component and a dash
    path = root / f"digests.{hashlib.sha256(str(of).encode()).hexdigest()[:12]}.json"
    known, now = _load(path), {}
    digest = hashlib.sha256()
    for file in files:
        name = str(file.relative_to(folder))
        key, entry = _key(file.stat()), known.get(name)
        if not entry or entry[:-1] != key:
            with file.open("rb") as stream:
                read = hashlib.file_digest(stream, "sha256").hexdigest()
            entry = [*_key(file.stat()), read]
            if entry[:-1] != key:
                entry = [0, read]  # written to meanwhile: no key
        now[name] = entry
        digest.update(name.encode())
        digest.update(bytes.fromhex(entry[-1]))
    kept = {name: entry for name, entry in now.items() if _is_settled(entry)}
    if kept != known:
        with suppress(OSError):  # a full disk: it is read again next time
            found = {"format": FORMAT, "files": kept, "sha256": _checksum(kept)}
            write_atomically(path, json.dumps(found).encode())
    return digest.hexdigest()


def _key(status: os.stat_result) -> list[int]:
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]


def _is_settled(entry: list) -> bool:
    """Whether a later write to the file would be seen by its times."""
    return len(entry) == 6 and max(entry[1:3]) < time.time_ns() - GRAIN_NS


def _load(path: Path) -> dict[str, list]:
    """Read the kept digests; nothing if the file is not there, damaged or someone else's."""
    try:
        found = json.loads(path.read_text()) if not file_problem(path) else {}
        known = found["format"] == FORMAT and found["sha256"] == _checksum(found["files"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return found["files"] if known else {}


def _checksum(files: dict[str, list]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()

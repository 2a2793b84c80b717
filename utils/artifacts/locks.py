"""One process at a time builds a package; the lock of a killed one is released."""

import fcntl
import os
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError
from utils.progress import say


@contextmanager
def locked(root: Path, name: str, wait: bool = True):
    """Hold one package's lock, and remove its file in the end. A kill releases it.

    Yields: whether the lock is held; without `wait` it may not be.
    Raises: UserError if the disk is full or the folder gone.
    """
    path = root / f".{name}.lock"
    while True:
        with _open_lock(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    yield False
                    return
                say("artifacts", f"{name}: another process builds it; waiting")
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_at(lock, path):
                continue  # its last holder has removed the file: this lock excludes nobody
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)  # while it is held
            return


def _open_lock(path: Path):
    try:  # for its owner alone: who may open it may hold it
        return open(path, "ab", opener=lambda path, flags: os.open(path, flags, 0o600))
    except OSError as error:
        raise unwritable(path.parent, path.name, error) from error


def _is_at(file, path: Path) -> bool:
    """Whether an open file is still the one of this name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def unwritable(root: Path, name: str, error: OSError) -> UserError:
    """Say in one line why the cache directory takes no package."""
    return UserError(f"--cache-dir {root}: {name}: {error.strerror or error}")

"""Whose files are trusted, and writes that leave all or nothing.

Packages are machine code: whoever may write to the folder may run anything as its owner. So the
folder is made for its owner alone and refused when it is someone else's or open to others, and so
is every file in it before it is opened.
"""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.errors import UserError

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_problem(path: str | Path) -> str:
    """Say why a cache directory cannot be trusted or written; "" if nothing is wrong."""
    path = Path(path).expanduser().absolute()
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir():
        return f"--cache-dir {path}: {parent} is not a folder"
    if parent != path:
        if not os.access(parent, os.W_OK | os.X_OK):
            return f"--cache-dir {path}: cannot be made, {parent} cannot be written"
        return ""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return (
            f"--cache-dir {path}: owned by user {status.st_uid}, expected {os.geteuid()} (you): "
            "packages are code, so only your own folder is trusted"
        )
    if status.st_mode & OTHERS_WRITE:
        return (
            f"--cache-dir {path}: mode {stat.S_IMODE(status.st_mode):04o} lets others write, "
            f"expected 0700: packages are code (chmod 700 {path})"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        return f"--cache-dir {path}: cannot be written"
    return ""


def open_cache(path: str | Path) -> Path:
    """Make the cache directory for its owner alone, or check the one that is there.

    Raises: UserError if others may write to it, or it belongs to someone else.
    """
    path = Path(path).expanduser().absolute()
    if problem := cache_problem(path):
        raise UserError(problem)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache-dir {path}: cannot be made ({error.strerror})") from None
    if problem := cache_problem(path):  # made by another process meanwhile, or with an odd umask
        raise UserError(problem)
    return path


def file_problem(path: Path) -> str:
    """Say why a file in the cache directory cannot be trusted; "" if nothing is wrong.

    Raises: OSError if there is no such file.
    """
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        return f"{path.name} kind: found {stat.filemode(status.st_mode)}, expected a plain file"
    if status.st_uid != os.geteuid():
        return f"{path.name} owner: found user {status.st_uid}, expected {os.geteuid()} (you)"
    if status.st_mode & OTHERS_WRITE:
        mode = stat.S_IMODE(status.st_mode)
        return f"{path.name} mode: found {mode:04o}, which lets others write, expected 0600"
    return ""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name beside a file to write under; it takes the file's place if the body succeeds."""
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # the ending may decide the format
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file of the store: for its owner alone, durable, and renamed into its place."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)

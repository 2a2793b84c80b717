"""Kill, interrupt, starve and race builds of packages, at any moment: does the store survive?"""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tests.artifact_pieces import (
    CONSTANTS,
    IDENTITY,
    SOURCES,
    build,
    contents,
    is_whole,
    recovers,
    stored,
)
from utils import artifacts
from utils.errors import UserError


def _at_line(number: int, act) -> None:
    """Call `act` before the line that comes `number`th in the store's own sources."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        if event == "line":
            if seen == number:
                sys.settrace(None)
                act()
            seen += 1
        return trace

    sys.settrace(trace)


def _in_child(work) -> int:
    """Run work in a fork of this process. Returns: its exit status as os.waitpid gives it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1]


def kills_at_every_line(folder: Path, step: int = 1) -> Iterator[bool]:
    """Kill -9 a build before each line of the store's code that it runs."""
    for number in count(0, step):
        with stored(folder) as (root, _):

            def work(root=root, number=number):
                _at_line(number, lambda: os.kill(os.getpid(), signal.SIGKILL))
                build(root, 1)

            if _in_child(work) == 0:
                return  # it got to its end
            yield is_whole(root, range(2)) and recovers(root, 2)


def interrupts_at_every_line(folder: Path, step: int = 1) -> Iterator[bool]:
    """Interrupt a build (Ctrl-C) before each line of the store's code that it runs."""

    def interrupt():
        raise KeyboardInterrupt

    for number in count(0, step):
        with stored(folder) as (root, _):
            try:
                _at_line(number, interrupt)
                build(root, 1)
                return
            except KeyboardInterrupt:
                pass
            finally:
                sys.settrace(None)
            yield is_whole(root, range(2)) and recovers(root, 2)


def kills_at_random(folder: Path, kills: int, chance: random.Random) -> Iterator[bool]:
    """Kill -9 a process that builds without a pause, wherever it is; the store is never renewed."""
    with stored(folder) as (root, _):
        start = time.perf_counter()
        build(root, 1)
        once = time.perf_counter() - start
        for first in range(2, 2 + 1000 * kills, 1000):
            ready, told = os.pipe()
            child = os.fork()
            if child == 0:
                for version in count(first):
                    os.write(told, b".")
                    build(root, version)
            os.read(ready, 1)
            time.sleep(chance.uniform(0, 3 * once))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(ready)
            os.close(told)
            yield is_whole(root, range(first + 1000)) and recovers(root, first)


def full_disks(folder: Path) -> Iterator[bool]:
    """Let every write beyond a size fail, as the kernel does it; then fill a disk of 64 KiB."""
    for limit in (0, 1, 1000, 4096, 7006):
        with stored(folder) as (root, _):

            def work(root=root, limit=limit):
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                try:
                    artifacts.save(root, IDENTITY, contents(1), CONSTANTS)
                except UserError as error:
                    os._exit(0 if "File too large" in str(error) else 2)

            yield _in_child(work) == 0 and is_whole(root, range(1)) and recovers(root, 2)
    disk = Path(tempfile.mkdtemp(dir=folder))
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return  # not permitted here
    try:
        build(disk, 0)
        fill = disk / "others"
        for left in (0, 4096, 8192, 12288, 16384):
            fill.write_bytes(b"")
            room = shutil.disk_usage(disk).free - left
            fill.write_bytes(bytes(max(room, 0)))
            try:
                build(disk, 1)
                yield False
            except UserError as error:
                yield "No space left on device" in str(error) and is_whole(disk, range(1))
        fill.unlink()
        yield recovers(disk, 2)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def builders_at_once(folder: Path, builders: int, rounds: int) -> Iterator[bool]:
    """Let several processes want the same package: one builds it, all others find it."""
    for _ in range(rounds):
        root = artifacts.open_cache(tempfile.mkdtemp(dir=folder))
        log = os.open(root.parent / f"{root.name}.log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)

        def work(root=root, log=log):
            with artifacts.building(root, IDENTITY):
                if artifacts.find(root, IDENTITY)[0] is None:
                    os.write(log, b"built\n")
                    artifacts.save(root, IDENTITY, contents(os.getpid()), CONSTANTS)
            os.write(log, b"found\n" if artifacts.find(root, IDENTITY)[0] else b"nothing\n")

        children = []
        for _ in range(builders):
            child = os.fork()
            if child == 0:
                work()
                os._exit(0)
            children.append(child)
        ended = [os.waitpid(child, 0)[1] for child in children]
        said = (root.parent / f"{root.name}.log").read_text().split()
        alone = sorted(path.suffix for path in root.iterdir())
        yield (
            ended == [0] * builders
            and sorted(said) == ["built", *["found"] * builders]
            and alone == [".json", ".pt2", ".safetensors"]
        )
        shutil.rmtree(root)

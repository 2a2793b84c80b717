"""Kill, starve and race the real compiler: python -m tests.aoti_faults --kills 20

What tests/artifact_kills.py does to the store with files of bytes, on builds as the step makes
them: torch.export, the C++ compiler, the package, the manifest. The smallest module there is, so
that a build takes seconds. Survived means: the package from before is found, loads and computes
what it did, or the whole new one does; and the next build leaves nothing but itself.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from utils import aoti, artifacts
from utils.errors import UserError

IDENTITY = {"component": "linear", "dtype": "torch.float32"}
BUILD = "a build by the real compiler: kill -9 at a random moment"
FULL = "a build by the real compiler on a disk that fills up"
RACE = "two processes that want the same package of the real compiler"


class Small(torch.nn.Module):
    """One product, and a number in the code that tells one build from another."""

    def __init__(self, version: int) -> None:
        super().__init__()
        self.linear, self.version = torch.nn.Linear(16, 16), version
        torch.nn.init.eye_(self.linear.weight)
        torch.nn.init.zeros_(self.linear.bias)

    def forward(self, x):
        """Shapes: x (4, 16) fp32 -> (4, 16)."""
        return torch.sin(self.linear(x)) + self.version


def component(version: int) -> aoti.Component:
    """Give the module with its one call recorded."""
    found = aoti.Component("linear", Small(version))
    found.inputs = {"x": torch.zeros(4, 16)}
    return found


def build(root: Path, version: int, log: Callable[[str], object] = lambda _: None) -> None:
    """Export, compile and store as utils/steps/export_aoti.py does, under the package's lock."""
    with artifacts.building(root, IDENTITY) as scratch:
        log("building")
        made = component(version)
        files, constants = aoti.compile_package(aoti.export(made), made, {}, scratch)
        artifacts.save(root, IDENTITY, files, constants)


def in_child(work: Callable[[], object]) -> int:
    """Start work in a fork of this process, which has never computed anything. Returns: its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except UserError as error:
            print(error, file=sys.stderr)
            code = 2
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a child. Returns: its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def computes(root: Path, *versions: int) -> bool:
    """Whether a package is found, and run in a process of its own gives what one of these does."""

    def work():
        package, _ = artifacts.find(root, IDENTITY)
        live = component(0)
        x = torch.linspace(-1, 1, 64).reshape(4, 16)
        found = aoti.attach(live, package.files, package.constants)(x=x)
        plain = torch.sin(live.module.linear(x))
        assert any(torch.allclose(found, plain + version) for version in versions)

    return ended(in_child(work)) == 0


def is_alone(root: Path) -> bool:
    """Whether nothing is there but one package."""
    return sorted(path.suffix for path in root.iterdir()) == [".json", ".pt2"]


def kills(folder: Path, number: int, chance: random.Random) -> Iterator[bool]:
    """Kill -9 one build after the other, anywhere between its first line and its last."""
    root, before = artifacts.open_cache(folder / "kills"), 1
    for version in (0, before):  # the second is timed: the compiler's headers are ready
        start = time.perf_counter()
        assert ended(in_child(lambda version=version: build(root, version))) == 0
    once = time.perf_counter() - start
    for version in range(2, number + 2):
        ready, told = os.pipe()

        def work(version=version, told=told):
            build(root, version, lambda _: os.write(told, b"."))

        child = in_child(work)
        os.read(ready, 1)
        time.sleep(chance.uniform(0, once))
        os.kill(child, signal.SIGKILL)
        ended(child)
        os.close(ready)
        os.close(told)
        yield computes(root, before, version)
        if computes(root, version):
            before = version
    ended(in_child(lambda: build(root, number + 2)))
    yield computes(root, number + 2) and is_alone(root)


def full_disks(folder: Path) -> Iterator[bool]:
    """Build where less room is left than a package needs, wherever that is noticed."""
    disk = folder / "disk"
    disk.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=16m,mode=0700", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        return  # not permitted here
    try:
        assert ended(in_child(lambda: build(disk, 0))) == 0
        size = sum(path.stat().st_size for path in disk.iterdir())
        fill = disk / "others"
        for share in (0.0, 0.3, 0.6, 0.9):  # of a package
            fill.write_bytes(b"")
            fill.write_bytes(bytes(max(0, int(shutil.disk_usage(disk).free - share * size))))
            refused = ended(in_child(lambda: build(disk, 1))) == 2
            yield refused and computes(disk, 0)
        fill.unlink()
        ended(in_child(lambda: build(disk, 2)))
        yield computes(disk, 2) and is_alone(disk)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def races(folder: Path) -> Iterator[bool]:
    """Let two processes want what is not there: one builds, the other waits and finds it."""
    root, log = artifacts.open_cache(folder / "race"), folder / "built"

    def work():
        with artifacts.building(root, IDENTITY) as scratch:
            if artifacts.find(root, IDENTITY)[0] is None:
                with log.open("a") as stream:
                    stream.write("built\n")
                made = component(7)
                files, constants = aoti.compile_package(aoti.export(made), made, {}, scratch)
                artifacts.save(root, IDENTITY, files, constants)

    codes = [ended(child) for child in [in_child(work), in_child(work)]]
    yield codes == [0, 0] and log.read_text() == "built\n" and computes(root, 7) and is_alone(root)


def main() -> None:
    """Try everything and print the rows of results/faults.md."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    failed = 0
    print("| fault | tried | survived |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "compiler")
        tries = {
            FULL: full_disks(folder),
            RACE: races(folder),
            BUILD: kills(folder, args.kills, random.Random(args.seed)),
        }
        for kind, results in tries.items():
            results = list(results)
            failed += results.count(False)
            print(f"| {kind} | {len(results)} | {sum(results)} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

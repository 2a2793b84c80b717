"""Run the scripts in processes of their own that start with torch and diffusers already imported.

Each is forked from one warm process (multiprocessing's forkserver), so a real run that really fails
costs a fraction of a second instead of the imports' several.
"""

import importlib.abc
import io
import json
import multiprocessing
import os
import resource
import runpy
import shlex
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tiny_flux" / "tiny-schnell"
COMPILED = ("--compile_export_mode", "compile")
WARM = ["torch._dynamo", "diffusers", "transformers", "PIL.Image", "torchao.quantization"]

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(WARM)


@dataclass(frozen=True)
class Done:
    """What a process left: its exit code, and stdout and stderr together."""

    code: int
    output: str


def run(*argv: str, folder: Path, **around) -> Done:
    """Run `gen_image.py ...`, or `-m module ...`, to its end.

    `around`: env (variables), before (a picklable function called first), room_mib (memory that the
    process may allocate beyond what it has when it starts).
    """
    target = folder / "output.txt"
    process = FORKS.Process(target=_child, args=(list(map(str, argv)), str(target), around))
    process.start()
    process.join(timeout=600)
    assert process.exitcode is not None, f"still running: {argv}"
    return Done(process.exitcode, target.read_text())


def explain(output: str, folder: Path) -> tuple[int, list[dict]]:
    """Feed an output to the doctor: its exit code and explanations."""
    log = folder / "log.txt"
    log.write_text(output)
    done = run("-m", "extras.doctor", "--explain-error", log, "--json", folder=folder)
    return done.code, json.loads(done.output)


def cured(command: str, flags: tuple, **words: str) -> list[str]:
    """Write a command of the doctor's as argv: `...` becomes the failed run's flags."""
    for name, value in words.items():
        command = command.replace(name, value)
    python, *argv = shlex.split(command)
    assert python == "python"
    at = argv.index("...")
    return [*argv[:at], *map(str, flags), *argv[at + 1 :]]


class Missing(importlib.abc.MetaPathFinder):
    """Makes a package missing, to whoever imports it."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def without(package: str) -> None:
    """Make a package missing in this process, though it may have been imported already."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    sys.meta_path.insert(0, Missing(package))


def _child(argv: list[str], output: str, around: dict) -> None:
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    os.environ.update(around.get("env", {}))
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    sys.stdout = io.TextIOWrapper(os.fdopen(1, "wb", 0), write_through=True)
    sys.stderr = io.TextIOWrapper(os.fdopen(2, "wb", 0), write_through=True)
    code = 0
    try:
        if before := around.get("before"):
            before()
        if room := around.get("room_mib"):
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + room * 2**20
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(str(ROOT / argv[0]), run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    os._exit(code)

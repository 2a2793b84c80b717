"""What a tritonserver needs on disk: its environment, a model repository, the Python backend."""

import argparse
import importlib.metadata
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from triton_models.parts import HEALTH, MODELS
from utils.errors import UserError

HERE = Path(__file__).resolve().parent
VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
STUBS = ("python3.10", "python3.11", "python3.12")  # that the wheel has a Python stub for
CALLS_PER_REQUEST = 3  # threads of the orchestrator for each request in flight
MESSAGES_PER_REQUEST = 2  # its answers; its refusal or cancellation


def missing(env: Path) -> list[str]:
    """Name the pins of requirements.txt that an environment lacks: all, some, or none."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found = {
        canonicalize_name(package.name): package.version
        for package in importlib.metadata.distributions(
            path=[str(env / "lib" / VERSION / "site-packages")]
        )
    }
    lines = (HERE / "requirements.txt").read_text().splitlines()
    pins = [Requirement(text) for line in lines if (text := line.split("#")[0].strip())]
    return [
        str(pin)
        for pin in pins
        if not pin.specifier.contains(found.get(canonicalize_name(pin.name), "0"))
    ]


def environment(env: Path) -> Path:
    """Give the interpreter of the server's environment; install what it lacks.

    Raises: UserError if that fails.
    """
    python = env / "bin" / "python3"
    if not python.exists() or missing(env):
        print(f"installing into {env} (once, some minutes)", flush=True)
        pip = [str(python), "-m", "pip", "install", "-q", "-r", str(HERE / "requirements.txt")]
        for command in ([sys.executable, "-m", "venv", str(env)], pip):
            if code := subprocess.run(command).returncode:
                raise UserError(f"--env {env}: {shlex.join(command)} failed ({code})")
    return python


def write_repository(folder: Path, args: argparse.Namespace, flags: list[str]) -> None:
    """Write the model repository: the configs with this command's parameters, the code by link."""
    from utils.benchmark_utils import create_parser

    dtype = "FP32" if create_parser().parse_args(flags).disable_bf16 else "BF16"
    values = {
        "flags": shlex.join(flags),
        "batch_sizes": args.batch_sizes,
        "max_in_flight": str(args.max_in_flight),
        "threads": str(args.threads),
    }
    numbers = {
        "max_batch_size": max(int(size) for size in args.batch_sizes.split(",")),
        # never reached by the orchestrator's own calls: a full queue would be an INTERNAL error
        "max_queue_size": CALLS_PER_REQUEST * args.max_in_flight + len(MODELS),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*MODELS, HEALTH):
        text = (HERE / name / "config.pbtxt").read_text().replace("TYPE_BF16", f"TYPE_{dtype}")
        for key, value in values.items():
            words = value.replace("\\", "\\\\").replace('"', '\\"')
            found = rf'(key: "{key}" value {{ string_value: )"[^"]*"'
            text = re.sub(found, lambda match, words=words: f'{match[1]}"{words}"', text)
        for key, number in numbers.items():
            text = re.sub(rf"\b{key}: [1-9]\d*", f"{key}: {number}", text)
        (folder / name).mkdir()
        (folder / name / "config.pbtxt").write_text(text)
        (folder / name / "1").symlink_to(HERE / name / "1")


def pool_size(max_in_flight: int) -> int:
    """Count the threads that Triton's Python backend needs for one model's calls and answers.

    A call has one until its first answer, a denoising job so to its end: with fewer (32 by default)
    neither an answer nor a refusal nor a cancellation leaves the model while that many run.
    """
    return (CALLS_PER_REQUEST + MESSAGES_PER_REQUEST) * max_in_flight + len(MODELS)


def write_backend(folder: Path, env: Path) -> Path:
    """Put the Python backend's three files together, as the server wants them.

    Returns: the wheel's tritonserver folder
    """
    server = env / "lib" / VERSION / "site-packages" / "pytriton" / "tritonserver"
    (folder / "python").mkdir(parents=True)
    stubs = server / "python_backend_stubs" / VERSION.removeprefix("python")
    for file in (
        server / "backends" / "python" / "libtriton_python.so",
        server / "backends" / "python" / "triton_python_backend_utils.py",
        stubs / "triton_python_backend_stub",
    ):
        shutil.copy(file, folder / "python")
    return server

"""Findings about a machine, one function a topic; nothing here loads weights or compiles.

A finding is "ok", a "note" (worth knowing, nothing is broken) or a "problem", with the command that
cures it where one is known. No finding ever holds the hub's token.
"""

import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from utils.artifacts import files_below
from utils.checkpoints import Checkpoint
from utils.hardware import Machine

ROOT = Path(__file__).resolve().parent.parent.parent
PIN = re.compile(r"([A-Za-z0-9_.-]+)(?:\[[a-z,]+\])?==([^\s#]+)")
HUB_TIMEOUT_S = 3.0


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    topic: str
    state: str  # "ok", "note" or "problem"
    text: str
    fix: str = ""  # a command


def hardware(machine: Machine, driver: str | None) -> list[Finding]:
    """Name device and driver; a GPU that only the driver sees is a problem of torch's build."""
    import torch

    about = f"{machine.name} ({machine.short()}), {machine.memory_gib:.0f} GiB"
    found = [Finding("hardware", "ok", f"{about}, {os.cpu_count()} CPU threads")]
    if machine.emulates_bf16:
        text = "no bf16 in hardware: it is emulated, fp32 may be faster (flag --disable_bf16)"
        found.append(Finding("hardware", "note", text))
    if driver:
        found.append(
            Finding("driver", "ok", f"NVIDIA {driver}, torch for CUDA {torch.version.cuda}")
        )
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():  # not: --device cpu
        found.append(
            Finding(
                "driver",
                "problem",
                f"nvidia-smi is installed, but torch {torch.__version__} finds no GPU",
                "nvidia-smi",
            )
        )
    return found


def versions() -> list[Finding]:
    """Compare what is installed with requirements.txt, and with the pairs that do not work."""
    from importlib import metadata

    from packaging.version import Version

    from extras.doctor.pairs import installed, known_bad

    found = []
    for package, pinned in PIN.findall((ROOT / "requirements.txt").read_text()):
        try:
            here = Version(metadata.version(package))
        except metadata.PackageNotFoundError:
            fix = "pip install -r requirements.txt"
            found.append(Finding("versions", "problem", f"{package}: not installed", fix))
            continue
        if here.public != pinned:
            text = f"{package} {here}: other than the tested {pinned}"
            found.append(Finding("versions", "note", text, f"pip install {package}=={pinned}"))
    for pair in known_bad(installed()):
        text = f"{pair.name}: {pair.why} ({pair.source})"
        found.append(Finding("versions", "problem", text, pair.fix))
    return found or [Finding("versions", "ok", "as pinned in requirements.txt, no known bad pair")]


def free_gib(device: str) -> float:
    """Give the memory that is free now, of the device or, on a CPU, of the host. Units: GiB."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0] / 2**30
    import psutil

    return psutil.virtual_memory().available / 2**30


def cache_directory(path: str) -> Finding:
    """Look at the folder for packages as a run would: owner, mode, and what it holds."""
    from extras.doctor.advice import explain
    from utils.artifacts import cache_problem
    from utils.artifacts.__main__ import entries, show_size

    if problem := cache_problem(path):
        known = explain(problem)
        fix = known[0].commands[0] if known else ""
        return Finding("cache", "problem", problem, fix)
    root = Path(path).expanduser().absolute()
    if not root.is_dir():
        return Finding("cache", "ok", f"{root}: not there yet, the first export makes it")
    stored = entries(root)
    size, free = sum(entry.size for entry in stored), shutil.disk_usage(root).free
    packages = [entry for entry in stored if entry.is_package]
    unusable = [entry.name for entry in packages if entry.manifest is None]
    text = (
        f"{root}: yours alone, {len(packages)} package(s), {show_size(size)}, "
        f"{show_size(free)} free on its disk"
    )
    if unusable:
        prune = f"python -m utils.artifacts prune --cache-dir {root}"
        return Finding("cache", "note", f"{text}; unusable: {', '.join(unusable)}", prune)
    return Finding("cache", "ok", text)


def hub(timeout_s: float = HUB_TIMEOUT_S) -> list[Finding]:
    """Ask whether the model hub answers, and whether it would know who asks.

    The bundled models need neither.
    """
    from huggingface_hub import constants

    if os.environ.get("HF_TOKEN"):
        login = "a token in HF_TOKEN"
    elif Path(constants.HF_TOKEN_PATH).is_file():
        login = f"a token in {constants.HF_TOKEN_PATH}"
    else:
        login = "no token: gated models (FLUX.1) need `hf auth login`"
    found = [Finding("hub", "ok" if login.startswith("a") else "note", login)]
    if constants.HF_HUB_OFFLINE:
        text = "not asked: HF_HUB_OFFLINE is set, so only downloaded and bundled models are used"
        return [*found, Finding("hub", "note", text, "unset HF_HUB_OFFLINE")]
    start = time.perf_counter()
    try:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        urllib.request.urlopen(request, timeout=timeout_s).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says of this page
    except (OSError, ValueError, http.client.HTTPException) as error:  # HF_ENDPOINT may be anything
        why = getattr(error, "reason", error)
        text = f"{constants.ENDPOINT} cannot be reached ({why}); the bundled models need no hub"
        return [*found, Finding("hub", "note", text)]
    seconds = time.perf_counter() - start
    return [*found, Finding("hub", "ok", f"{constants.ENDPOINT} answers in {seconds:.2f} s")]


def weights(checkpoint: Checkpoint) -> list[Finding]:
    """Read every tensor of a local checkpoint: damaged files, and numbers that are not finite."""
    from safetensors import SafetensorError, safe_open

    topic, folder = "weights", _folder_of(checkpoint)
    if folder is None:
        text = f"{checkpoint.name}: not downloaded, so there is nothing to read"
        return [Finding(topic, "problem", text, f"hf download {checkpoint.name}")]
    again = f"hf download {checkpoint.name} --force-download"
    if checkpoint.source != "hub":
        again = f"git checkout -- {folder}" if checkpoint.source == "bundled" else ""
    found, tensors = [], 0
    files = files_below(folder, "*.safetensors")
    for file in files:
        name = file.relative_to(folder)
        try:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  not a dict
                    tensors += 1
                    tensor = opened.get_tensor(key)
                    if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
                        text = f"{name}: {key} holds NaN or infinity"
                        found.append(Finding(topic, "problem", text, again))
        except (SafetensorError, OSError) as error:
            text = f"{name}: cannot be read ({' '.join(str(error).split())[:100]})"
            found.append(Finding(topic, "problem", text, again))
    if not files:
        found = [Finding(topic, "problem", f"{folder}: no *.safetensors in there", again)]
    text = f"{checkpoint.name}: {tensors} tensors in {len(files)} files, all finite"
    return found or [Finding(topic, "ok", text)]


def _folder_of(checkpoint: Checkpoint) -> Path | None:
    if checkpoint.path is not None:
        return checkpoint.path
    from huggingface_hub import try_to_load_from_cache

    index = try_to_load_from_cache(checkpoint.name, "model_index.json")
    return Path(index).parent if isinstance(index, str) else None

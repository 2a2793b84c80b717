"""What every package of one run depends on, from its arguments."""

import dataclasses
from pathlib import Path

from utils import card
from utils.artifacts.identity import code_digest, cpu_isa, environment
from utils.artifacts.private import open_cache
from utils.artifacts.remote import fetch
from utils.artifacts.store import nearest
from utils.steps import gguf

UTILS = Path(__file__).resolve().parent.parent
OUTSIDE = (  # steps that call the packages otherwise, or not at all, and are not in them
    "device_images",
    "image_encoder",
    "loop_graph",
    "memory",
    "step_mask",
    "text_encoders",
    "text_padding",
)
COMPILER = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_")  # variables that change its code
# Sources that shape a package beside the kernels and the steps that are on: a test follows imports
GRAPH = ("aoti.py", "calls.py", "denoise.py", "steps/__init__.py")


def known_early(args, compiler: dict) -> dict:
    """Say what is known of a package before any weight is loaded; `compiler`: its options."""
    import torch

    machine = dataclasses.asdict(args.machine)
    driver = card.gpu_state(args).get("driver_version")
    machine = {key: machine[key] for key in ("device", "name", "capability", "hip")}
    machine["cpu_isa"] = cpu_isa()
    if args.machine.device == "cpu":  # AOTInductor writes loops for one thread where it has one
        machine["threads"] = torch.get_num_threads()
    return {
        "dtype": str(args.dtype),
        "machine": machine,
        "compiler": compiler,
        "variables": card.variables(COMPILER),
        "versions": environment() | {"driver": driver},
    }


def stored_problems(args, compiler: dict, parts: list[dict]) -> list[str]:
    """Compare the packages there are with what is known before weights are loaded, part by part.

    Packages that the user has named by digest are fetched first.

    Raises: UserError if one cannot be had.
    """
    known, root = known_early(args, compiler), Path(args.cache_dir).expanduser()
    if args.artifact_repo:
        fetch(open_cache(root), args, known)
    return [line for part in parts for line in nearest(root, known | part)]


def no_cached_model(lines: list[str]) -> str:
    """Say why --use-cached-model stops, one line per differing field, and what to do."""
    return (
        "\n".join(f"--use-cached-model: {line}" for line in lines)
        + "\nrun once without --use-cached-model to build the packages of this run"
    )


def weights_of_run(args) -> dict:
    """Name everything that the run's weights come from, and digest it.

    Whoever adds a source of weights (a file, an adapter) adds its digest here, and nowhere else.
    """
    transformer = {"gguf": gguf.identity(args)} if args.gguf_file else {}
    return transformer | {
        "name": args.checkpoint.name,
        "weights": args.checkpoint.identity(args.cache_dir),  # a local one is read once for it
    }


def sources_of_run(steps: dict) -> list[Path]:
    """List the files whose edit makes another package of a run with these steps."""
    files = [UTILS / "steps" / f"{name}.py" for name in steps]
    files += [*(UTILS / "kernels").glob("*.py"), *(UTILS / name for name in GRAPH)]
    return [file for file in files if file.exists()]


def identity_of_run(args, compiler: dict) -> dict:
    """Say what every package of this run depends on."""
    plan = args.plan.items()
    steps = {name: verdict for name, verdict in plan if verdict.is_on and name not in OUTSIDE}
    return known_early(args, compiler) | {
        "checkpoint": weights_of_run(args),
        "steps": {name: verdict.settings for name, verdict in steps.items()},
        "code": code_digest(sources_of_run(steps)),
    }

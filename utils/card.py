"""What a run is: machine, versions, call, and every step with its state. Printed, and stored."""

import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import textwrap
from datetime import UTC, datetime
from pathlib import Path

from utils import guidance, schedulers
from utils.prompts import count_images
from utils.random_weights import configs_of
from utils.work import image_tokens

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "torchao", "cache-dit"),
    *("fa3-fwd", "flash-attn-4", "comfy-kitchen"),
)

VARIABLES = (  # of the environment, by how they begin: what changes compiled code or kernels
    *("TORCHINDUCTOR_", "TORCHDYNAMO_", "TRITON_", "TORCH_", "PYTORCH_", "CUBLAS", "CUDNN_"),
    *("CUDA_LAUNCH_BLOCKING", "CUDA_DEVICE_MAX_CONNECTIONS", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_"),
)
NO_MATTER = ("_DIR", "_PATH", "_HOME", "_LOGS", "_TRACE", "_VERSION", "_NUM_THREADS")  # or counted

CALL = (
    *("ckpt", "random_weights", "prompt", "seed", "height", "width", "num_inference_steps"),
    *("guidance_scale", "max_sequence_length", "num_images_per_prompt"),
)


def versions() -> dict[str, str]:
    """List the installed versions of what decides speed and pictures."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def variables(begin: tuple[str, ...] = VARIABLES) -> dict[str, str]:
    """List the environment's variables that decide code or speed, beside the flags, by name."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(begin) and not name.endswith(NO_MATTER)
    }


def commit() -> str:
    """Name this repository's commit, with -dirty when tracked files other than results differ."""

    def git(*words: str) -> subprocess.CompletedProcess:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, timeout=10)

    try:
        name = git("rev-parse", "--short=12", "HEAD").stdout.strip()
        same = git("diff", "--quiet", "HEAD", "--", ":/", ":(top,exclude)results").returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return name + ("" if same else "-dirty") if name else "unknown"


def command() -> str:
    """Give the command that was typed, quoted for a shell."""
    module = sys.modules["__main__"].__spec__  # of `python -m`
    program = ["-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join(["python", *program, *sys.argv[1:]])


def named(values: dict[str, str]) -> str:
    """Write names and values as a shell takes them."""
    return " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())


def plan_as_dict(args) -> dict[str, dict]:
    """Give each step's state, reason and settings, in order."""
    return {
        name: {"state": verdict.state}
        | ({"reason": verdict.reason} if verdict.reason else {})
        | ({"settings": verdict.settings} if verdict.settings else {})
        for name, verdict in args.plan.items()
    }


def is_lossless(args) -> bool:
    """Whether every step that is on keeps the picture within rounding."""
    return all(verdict.lossless for verdict in args.plan.values() if verdict.is_on)


def started() -> dict[str, float | str]:
    """Note when a run began, and how busy the machine was before the run made it so."""
    try:
        load = {"load_average": round(os.getloadavg()[0], 2)}  # of the last minute
    except (OSError, AttributeError):
        load = {}
    return {"time": datetime.now(UTC).isoformat(timespec="seconds"), **load}


def busy(args) -> list[str]:
    """Warn of a CPU that was busy when the run began; no line for an idle one, or on a GPU."""
    load, cores = args.started.get("load_average", 0.0), os.cpu_count() or 1
    if args.machine.device != "cpu" or load <= cores / 2:
        return []
    return [
        f"busy        load average {load:.1f} at the start, on {cores} core(s): other work, or a "
        "run just before; seconds of a busy machine say little"
    ]


def environment(args) -> dict:
    """Collect the machine, its state and the versions for the JSON line."""
    import torch

    machine = args.machine
    found = {
        "device": machine.name,
        "capability": list(machine.capability) if machine.capability else None,
        "memory_gib": round(machine.memory_gib, 1),
        "os": platform.platform(),
        "versions": versions(),
        "commit": commit(),
        "threads": torch.get_num_threads(),
        "variables": variables(),
        **(getattr(args, "started", None) or started()),
    }
    if state := gpu_state(args):
        limit = state["power.limit"]  # "[N/A]" where a virtual machine hides it
        watts = float(limit) if limit.replace(".", "", 1).isdigit() else None
        found |= {"driver": state["driver_version"], "power_limit_w": watts}
    return found


def gpu_state(args) -> dict:
    """Ask nvidia-smi for what decides speed beside the code; empty where there is none.

    Units: power.limit in W, clocks in MHz
    """
    if not args.machine.is_cuda:
        return {}
    fields = ("driver_version", "power.limit", "clocks.sm", "clocks.max.sm", "temperature.gpu")
    index = args.device.partition(":")[2] or "0"
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", f"--id={index}"]
    try:
        done = subprocess.run(
            [*command, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    values = [value.strip() for value in done.stdout.split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


def call(args) -> dict:
    """Collect what decides the picture, apart from the steps; `args.also`: what an extra adds."""
    solver = {name: getattr(args, name) for name in ("scheduler", "sigmas")}
    return {
        **guidance.call(args),  # it and the solver where they are given: older rows have neither
        **{name: value for name, value in solver.items() if value is not None},
        **{name: getattr(args, name) for name in CALL},
        "dtype": str(args.dtype).removeprefix("torch."),
        **getattr(args, "also", {}),
    }


def render(args) -> str:
    """Write the card as text: one line a fact, then the steps that are on, then the others."""
    about = call(args)
    why = f" (the default on {args.machine.device})" if args.ckpt_is_default else ""
    guidance = "none" if args.guidance_scale is None else f"{args.guidance_scale:g}"
    machine = args.machine
    lines = [
        f"machine     {machine.name} ({machine.short()}), {machine.memory_gib:.0f} GiB",
        "versions    " + ", ".join(f"{name} {version}" for name, version in versions().items()),
        *([f"variables   {named(found)}"] if (found := variables()) else []),
        f"checkpoint  {args.ckpt}{why}, {args.checkpoint.kind}, {about['dtype']}",
        f"call        {args.width}x{args.height} (width x height), {count_images(args)} image(s)"
        f"{_edited(args)}, {args.num_inference_steps} steps, guidance {guidance}{_true_cfg(args)}, "
        f"{args.max_sequence_length} text tokens, seed {args.seed}",
        *_scheduler(args),
    ]
    if args.acceleration_notes:
        lines.append(f"preset      {args.acceleration}: {', '.join(args.acceleration_notes)}")
    if also := getattr(args, "also", {}):
        lines.append("also        " + ", ".join(f"{key} {value}" for key, value in also.items()))
    mode = args.compile_export_mode
    lines.append(f"mode        {mode}" + (f" ({args.mode_reason})" if args.mode_reason else ""))
    # What is free is no setting of the step: two runs differ in it, not their pictures
    chosen = f", chosen for {args.memory_why}" if args.memory_why else ""
    lines.append(f"memory      tier {args.tier}{chosen}; estimate {args.memory_estimate}")
    if args.machine.emulates_bf16 and not args.disable_bf16:
        lines.append("note        no bf16 in this hardware: emulated, --disable_bf16 may be faster")
    if args.random_weights:
        lines.append("note        random weights: the picture means nothing")
    for name, verdict in args.plan.items():
        if verdict.is_on:
            settings = " ".join(f"{key}={value}" for key, value in verdict.settings.items())
            loss = "" if verdict.lossless else "  [lossy]"
            lines.append(f"on:  {name:22s} {settings}{loss}".rstrip())
    return "\n".join(lines + _steps_off(args))


def _steps_off(args) -> list[str]:
    """Give a line for each step that is off, with its reason; the flags that were not given."""
    lines, flags = [], []
    for name, verdict in args.plan.items():
        if verdict.missing_flag:
            flags.append(verdict.missing_flag)
        elif not verdict.is_on:
            state = "" if verdict.state == "off" else verdict.state + ": "
            lines.append(f"off: {name:22s} {state}{verdict.reason}")
    indent = {"initial_indent": "not asked for  ", "subsequent_indent": " " * 15}
    return lines + textwrap.wrap(" ".join(flags), 98, break_on_hyphens=False, **indent)


def _scheduler(args) -> list[str]:
    if schedulers.is_default(args):
        return []
    forwards = schedulers.evaluations(args)
    sigmas = args.sigmas or "default"
    return [f"scheduler   {args.scheduler or 'euler'}, sigmas {sigmas}, {forwards} evaluations"]


def _edited(args) -> str:
    """Give the size of Kontext's picture as it is encoded, and the tokens that it adds."""
    if args.pil_image is None:
        return ""
    width, height = args.pil_image.size
    tokens = image_tokens(configs_of(args.checkpoint)["vae"], (height, width))
    return f" of a picture of {width}x{height} ({tokens} more tokens a step)"


def _true_cfg(args) -> str:
    if args.true_cfg_scale is None:
        return ""
    return (
        f", true CFG {args.true_cfg_scale:g} away from {args.negative_prompt!r} (twice the "
        "transformer's work)"
    )


def cuda_graphs(used: dict[str, int] | None) -> list[str]:
    """Write how many CUDA graphs a run has recorded and kept; no line without any."""
    if used is None:
        return []
    return [
        f"CUDA graphs {used['kept']} kept of at most {used['limit']}, {used['recorded']} recorded, "
        f"{used['dropped']} dropped; their pool holds {used['pool_bytes'] / 2**30:.2f} GiB"
    ]


def step_cache(used: dict[str, list[int]] | None) -> list[str]:
    """Write which steps of a call were computed and which reused; no line without a cache."""
    if used is None:
        return []
    count = {name: len(steps) for name, steps in used.items()}
    return [
        f"step cache  {count['computed']} of {sum(count.values())} steps computed: "
        f"{_ranges(used['computed'])}; {count['reused']} reused: {_ranges(used['reused'])}"
    ]


def _ranges(steps: list[int]) -> str:
    """Write 0 1 2 5 as "0-2 5"."""
    parts = []
    for step in steps:
        if parts and parts[-1][1] == step - 1:
            parts[-1][1] = step
        else:
            parts.append([step, step])
    return " ".join(f"{a}-{b}" if b > a else str(a) for a, b in parts) or "none"

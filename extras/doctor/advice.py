"""Usual failures: how a log shows them, why they happen, and the commands that cure them.

`...` in a command stands for the flags of the run that failed. tests/test_doctor_advice.py and
test_doctor_advice_files.py provoke every failure of this table in a process of its own, have it
explained from its output, and where this machine can, run the command and see the failure gone.
"""

import re
from dataclasses import dataclass, field

RUN = "python gen_image.py ..."
BENCHMARK = "python run_benchmark.py ..."
QUOTED = 240  # characters of a line that was recognised
SECRET = re.compile(r"\bhf_[A-Za-z0-9]{8,}")  # the hub's tokens


@dataclass(frozen=True)
class Advice:
    """One failure. Commands may use the pattern's named groups in braces."""

    name: str
    pattern: str
    cause: str
    commands: tuple[str, ...]
    leave_out: tuple[str, ...] = field(default=())  # flags of the failed run


@dataclass(frozen=True)
class Explanation:
    """An advice as it applies to one log."""

    name: str
    found: str  # the line that gave it away
    cause: str
    commands: tuple[str, ...]
    leave_out: tuple[str, ...]


ADVICE = (
    Advice(
        "a smaller memory tier",
        r"out of memory in tier \S+ .*; next: (?P<next>python .+)$",
        "the weights and the activations of this call do not fit; the next tier keeps less of them "
        "on the device",
        ("{next}",),
    ),
    Advice(
        "no memory tier is small enough",
        r"--memory \S+: the least that this call needs is [\d.]+ GiB \(tier (?P<tier>\w+)\)",
        "even with the weights on the host the estimate is above what is free; part of it is a "
        "reserve, so trying the smallest tier may succeed",
        (f"{RUN} --height HALF --width HALF", f"{RUN} --memory {{tier}}"),
    ),
    Advice(
        "out of memory",
        r"(?:CUDA|HIP) out of memory|OutOfMemoryError|can't allocate memory|not enough memory: you "
        r"tried|std::bad_alloc|\bMemoryError\b|Cannot allocate memory|\bKilled\b",
        "the weights and the activations of this call do not fit: activations grow with the number "
        "of pixels and of images",
        (
            f"{RUN} --height HALF --width HALF",
            f"{RUN} --num_images_per_prompt 1",
        ),
    ),
    Advice(
        "weights larger than the memory",
        r"--random_weights: \S+ needs [\d.]+ GiB for its weights alone",
        "the architecture at full size does not fit into this device, whatever the call",
        (f"{RUN} --ckpt tiny-schnell",),
    ),
    Advice(
        "attention kernel not installed",
        r"attention (?P<backend>\w+): found .*: (?P<install>pip install [^(,]+?)(?: \(|,)",
        "the GPU has the fast attention ({backend}), the installation has not",
        ("{install}", f"{RUN} --disable_fa3"),
    ),
    Advice(
        "torchao does not fit",
        r"quant: found .*; expected torchao",
        "float8 needs a torchao of the release that belongs to this torch",
        ("pip install torchao==0.18.0", f"{RUN} --disable_quant"),
    ),
    Advice(
        "torchvision does not fit",
        r"operator torchvision::nms does not exist",
        "torchvision's wheel was built for another build of torch than the one installed; nothing "
        "here needs torchvision",
        ("pip uninstall -y torchvision",),
    ),
    Advice(
        "package missing",
        r"No module named '?(?:diffusers|transformers|torch|accelerate|safetensors|psutil|PIL|"
        r"yaml|tqdm|torchmetrics|huggingface_hub|numpy|tokenizers)\b|"
        r"is not installed in \S+: pip install -r requirements\.txt",
        "the environment lacks something that every run needs, or another Python was called",
        ("pip install -r requirements.txt",),
    ),
    Advice(
        "black picture or NaN",
        r"invalid value encountered in cast|latents are not finite|is constant \(black\?\)",
        "NaN or infinity has reached the picture: from damaged weights, or from a step that left "
        "its number range; if the weights are finite, turn steps off one by one",
        (
            "python -m extras.doctor --check_weights --ckpt CKPT",
            f"{RUN} --disable_quant",
            f"{RUN} --disable_fa3",
            f"{RUN} --disable_bf16",
            f"{RUN} --compile_export_mode disabled",
        ),
    ),
    Advice(
        "recompilation in a timed run",
        r"Detected recompile when torch\.compile stance|in a timed run; the warm-up must make",
        "a timed run made a call that the warm-up had not made, so the compiler would have been "
        "timed too",
        (f"{BENCHMARK} --num_warmup 2", f"TORCH_LOGS=recompiles {BENCHMARK}"),
    ),
    Advice(
        "package of another run",
        r"--use-cached-model: (?P<field>.+: found .+)",
        "no stored package belongs to this run: {field}",
        (RUN, "python -m utils.artifacts list"),
        leave_out=("--use-cached-model",),
    ),
    Advice(
        "cache directory open to others",
        r"--cache-dir (?P<path>.+?): mode \d+ lets others write",
        "packages are machine code: who may write to the folder could run anything as you",
        ("chmod 700 {path}", f"{RUN} --cache-dir ~/flux-packages"),
    ),
    Advice(
        "cache directory cannot be used",
        r"--cache-dir (?P<path>.+?): (?:cannot be|owned by user|\S+ is not a folder)",
        "the folder for packages is not yours, or cannot be written",
        (f"{RUN} --cache-dir ~/flux-packages",),
    ),
    Advice(
        "disk full",
        r"No space left on device|Disk quota exceeded",
        "no room for packages or pictures",
        ("python -m utils.artifacts prune --max-size 5GB",),
    ),
    Advice(
        "gated checkpoint",
        r"--ckpt (?P<repo>\S+): gated;",
        "its licence has to be accepted once, in the browser (https://huggingface.co/{repo}), and "
        "the hub has to know who asks",
        ("hf auth login", f"{RUN} --random_weights", f"{RUN} --ckpt tiny-schnell"),
    ),
    Advice(
        "unknown checkpoint",
        r"--ckpt \S+: (?:no such model on the hub|unknown checkpoint)",
        "the name is mistyped, or the repository is private",
        (f"{RUN} --ckpt tiny-schnell", "hf auth login"),
    ),
    Advice(
        "hub out of reach",
        r"--ckpt \S+: not in the local cache and the hub cannot be reached",
        "no network, a proxy, or HF_HUB_OFFLINE is set, and the checkpoint was never downloaded",
        (f"{RUN} --ckpt tiny-schnell", "python -m extras.doctor --skip_self_test"),
    ),
    Advice(
        "damaged checkpoint",
        r"--ckpt (?P<ckpt>\S+): cannot be loaded",
        "a file of the checkpoint is cut off, damaged or missing",
        (
            "python -m extras.doctor --check_weights --ckpt {ckpt}",
            "hf download REPO --force-download",
        ),
    ),
    Advice(
        "no GPU found",
        r"no CUDA device found",
        "torch sees no GPU: none is there, its driver is not loaded, or torch is a CPU build",
        ("nvidia-smi", f"{RUN} --device cpu"),
    ),
    Advice(
        "no C++ compiler",
        r"no C\+\+ compiler found|Python\.h: No such file",
        "torch.compile and AOTInductor call g++ with Python's headers",
        ("apt install g++ python3-dev", f"{RUN} --compile_export_mode disabled"),
    ),
)


def explain(text: str) -> list[Explanation]:
    """Find every failure of the table that a log shows, in the order of the table."""
    return [
        _applied(advice, match)
        for advice in ADVICE
        if (match := re.search(advice.pattern, text, re.MULTILINE))
    ]


def _applied(advice: Advice, match: re.Match) -> Explanation:
    start = match.string.rfind("\n", 0, match.start()) + 1
    end = match.string.find("\n", match.start())
    line = match.string[start : end if end >= 0 else None].strip()
    groups = match.groupdict()
    return Explanation(
        advice.name,
        _hide_secrets(line)[:QUOTED],
        _filled(advice.cause, groups),
        tuple(_filled(command, groups) for command in advice.commands),
        advice.leave_out,
    )


def _filled(text: str, groups: dict[str, str]) -> str:
    """Put in what the pattern found; not str.format: logs may hold braces."""
    for name, value in groups.items():
        text = text.replace("{" + name + "}", _hide_secrets(value))
    return text


def _hide_secrets(text: str) -> str:
    return SECRET.sub("hf_***", text)


def render(found: list[Explanation]) -> str:
    """Write explanations for people."""
    lines = []
    for one in found:
        without = f" (leave out {', '.join(one.leave_out)})" if one.leave_out else ""
        lines += [f"{one.name}: {one.found}", f"  why  {one.cause}"]
        lines += [
            f"  do   {command}{without if '...' in command else ''}" for command in one.commands
        ]
    return "\n".join(lines)


def last_line(text: str) -> str:
    """Give the last line that says anything, for a log that nobody understood."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _hide_secrets(lines[-1])[:QUOTED] if lines else ""

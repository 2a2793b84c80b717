"""What a package belongs to: every field that shapes its code, compared one by one.

The name of a package carries a hash of what was asked for; what the machine's software was is
compared but not hashed, so an upgrade replaces a package instead of leaving one more.
"""

import hashlib
import json
import platform
from pathlib import Path

from utils import card

UNHASHED = ("versions", "code")  # compared, but an upgrade replaces rather than adds


def environment() -> dict:
    """Name the versions of everything that shapes compiled code or is linked by it."""
    import torch

    versions = card.versions()
    shaping = ("python", "torch", "triton", "torchao", "diffusers", "transformers")
    return {name: versions.get(name) for name in shaping} | {
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "os": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
    }


def cpu_isa() -> str:
    """Name the CPU's instructions: Inductor compiles C++ for its own CPU, a GPU's launchers too.

    Names of virtual CPUs do not tell them apart, nor does torch's own word (AVX512): on a CPU that
    lacks some of them the process would end with an illegal instruction.
    """
    import torch

    has = torch.cpu.get_capabilities()
    names = " ".join(sorted(name for name, is_there in has.items() if is_there is True))
    digest = hashlib.sha256(names.encode()).hexdigest()[:8]
    return f"{torch.backends.cpu.get_cpu_capability()} {digest}"


def code_digest(files: list[Path]) -> str:
    """Digest the sources that shape the graph: who edits a kernel must not run the old one."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def plain(value):
    """Reduce to what JSON gives back, so that both sides of a comparison look alike."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def name_of(identity: dict) -> str:
    """Name the package of an identity: its component and a short fingerprint."""
    hashed = {key: value for key, value in plain(identity).items() if key not in UNHASHED}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return f"{identity['component']}-{digest[:12]}"


def flat(value, prefix: str = "") -> dict[str, object]:
    """Name every leaf of nested dicts by its path, with dots."""
    if isinstance(value, dict) and value:
        pairs = (flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
        return {key: leaf for part in pairs for key, leaf in part.items()}
    return {prefix: value}


def differences(found: dict, expected: dict) -> list[str]:
    """Compare two identities field by field: one line for each that differs."""
    found, expected = flat(plain(found)), flat(plain(expected))
    absent = "nothing"
    return [
        f"{key}: found {found.get(key, absent)}, expected {expected.get(key, absent)}"
        for key in sorted(found.keys() | expected.keys())
        if json.dumps(found.get(key, absent)) != json.dumps(expected.get(key, absent))  # 1 == True
    ]

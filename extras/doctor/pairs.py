"""Versions that are known not to go together, each with where that was learnt."""

from collections.abc import Callable
from dataclasses import dataclass

from packaging.version import Version


@dataclass(frozen=True)
class Pair:
    """One combination that fails, how to recognise it, and the way out."""

    name: str
    is_here: Callable[[dict[str, Version]], bool]  # package -> version, installed ones only
    why: str
    fix: str  # a command
    source: str


def _older(versions: dict[str, Version], package: str, than: str) -> bool:
    return package in versions and versions[package] < Version(than)


def _torch_is(versions: dict[str, Version], minor: str) -> bool:
    return "torch" in versions and versions["torch"].base_version.startswith(minor + ".")


def _triton_of(torch: str, triton: str) -> Callable[[dict[str, Version]], bool]:
    return lambda v: (
        _torch_is(v, torch)
        and "triton" in v
        and not v["triton"].base_version.startswith(triton + ".")
    )


def _fa3_for(cuda: str, release: str) -> Callable[[dict[str, Version]], bool]:
    """Whether fa3-fwd is the build for the other CUDA."""

    def is_here(v: dict[str, Version]) -> bool:
        found = v.get("cuda")
        wanted = found is not None and found.base_version.startswith(cuda + ".")
        return wanted and "fa3-fwd" in v and v["fa3-fwd"].base_version != release

    return is_here


WHEELS = "the wheels' own requirements, read for this project"
TRIED = "tried for this project on a CPU"
PAIRS = (
    Pair(
        "torchao older than 0.17",
        lambda v: _older(v, "torchao", "0.17"),
        "float8 is set up through Float8DynamicActivationFloat8WeightConfig with Float8MMConfig, "
        "which older releases lack or name otherwise",
        "pip install torchao==0.18.0",
        TRIED,
    ),
    Pair(
        "torchao 0.18 with a torch older than 2.12",
        lambda v: (
            _older(v, "torch", "2.12")
            and not _older({"torchao": Version("0")} | v, "torchao", "0.18")
        ),
        "torch 2.11 goes with torchao 0.17",
        "pip install torchao==0.17.0",
        "the pair that ran under torch 2.11",
    ),
    Pair(
        "torch 2.13 with another triton than 3.7",
        _triton_of("2.13", "3.7"),
        "torch's compiler calls triton's internals and is built for one release of it",
        "pip install triton==3.7.1",
        WHEELS,
    ),
    Pair(
        "torch 2.11 with another triton than 3.6",
        _triton_of("2.11", "3.6"),
        "torch's compiler calls triton's internals and is built for one release of it",
        "pip install triton==3.6.0",
        WHEELS,
    ),
    Pair(
        "fa3-fwd for CUDA 12 with CUDA 13",
        _fa3_for("13", "0.0.3"),
        "0.0.2 links CUDA 12, 0.0.3 links CUDA 13",
        "pip install fa3-fwd==0.0.3",
        WHEELS,
    ),
    Pair(
        "fa3-fwd for CUDA 13 with CUDA 12",
        _fa3_for("12", "0.0.2"),
        "0.0.2 links CUDA 12, 0.0.3 links CUDA 13",
        "pip install fa3-fwd==0.0.2",
        WHEELS,
    ),
    Pair(
        "flash-attn-3 from PyPI",
        lambda v: "flash-attn-3" in v,
        "an empty placeholder: it holds no kernels, whatever its name says",
        "pip uninstall -y flash-attn-3 && pip install fa3-fwd==0.0.3",
        WHEELS,
    ),
    Pair(
        "torchvision for CUDA beside a CPU build of torch",
        lambda v: (
            "torchvision" in v and v["torch"].local == "cpu" and v["torchvision"].local != "cpu"
        ),
        "its operators do not load, so its import fails (operator torchvision::nms does not exist)",
        "pip uninstall -y torchvision",
        TRIED,
    ),
)
LOOKED_AT = ("torch", "torchao", "triton", "fa3-fwd", "flash-attn-3", "torchvision")


def installed() -> dict[str, Version]:
    """List the installed versions of what PAIRS talks about, and CUDA's as torch was built for."""
    from importlib import metadata

    import torch

    found = {}
    for package in LOOKED_AT:
        try:
            found[package] = Version(metadata.version(package))
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = Version(torch.version.cuda)
    return found


def known_bad(versions: dict[str, Version]) -> list[Pair]:
    """Give the pairs that these versions form."""
    return [pair for pair in PAIRS if pair.is_here(versions)]

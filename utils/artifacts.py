"""Store of exported packages: which run each belongs to, and nothing else is ever loaded.

A package holds machine code, so only a folder that nobody else may write is trusted. It is a few
files beside a manifest, which is written last and by rename: the manifest is the package. A kill
before that leaves the previous package as it was. The name carries a hash of what was asked for;
what the machine's software was is verified but not hashed, so an upgrade replaces a package
instead of leaving one more.

    transformer-1f2e3d4c5b6a.json                  manifest: identity, constants, files
    transformer-1f2e3d4c5b6a-90ab12cd.pt2          code (utils/aoti.py), named by its content
    transformer-1f2e3d4c5b6a-77aa66bb.safetensors  tensors that are no weight of the pipeline
"""

import fcntl
import hashlib
import json
import os
import platform
import stat
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from utils.errors import UserError

FORMAT = 1
UNHASHED = ("versions", "code")  # verified, but an upgrade replaces rather than adds


@dataclass(frozen=True)
class Package:
    """A package whose manifest and digests have been verified."""

    name: str
    files: dict[str, Path]  # suffix (".pt2", ".safetensors") -> file
    constants: dict[str, list]  # name of each weight the code expects -> shape, dtype, stride

    @property
    def size(self) -> int:
        """Units: bytes."""
        return sum(file.stat().st_size for file in self.files.values())


def cache_problem(path: str | Path) -> str:
    """Say why a cache directory cannot be trusted or written; "" if nothing is wrong."""
    path = Path(path).expanduser().absolute()
    parent = next(p for p in (path, *path.parents) if p.exists())
    if not parent.is_dir():
        return f"--cache-dir {path}: {parent} is not a folder"
    if parent != path:
        if not os.access(parent, os.W_OK | os.X_OK):
            return f"--cache-dir {path}: cannot be made, {parent} cannot be written"
        return ""
    status = path.stat()
    if status.st_uid != os.geteuid():
        return (
            f"--cache-dir {path}: owned by user {status.st_uid}, expected {os.geteuid()} (you): "
            "packages are code, so only your own folder is trusted"
        )
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return (
            f"--cache-dir {path}: mode {stat.S_IMODE(status.st_mode):04o} lets others write, "
            f"expected 0700: packages are code (chmod 700 {path})"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        return f"--cache-dir {path}: cannot be written"
    return ""


def open_cache(path: str | Path) -> Path:
    """Make the cache directory for its owner alone, or check the one that is there.

    Raises: UserError if others may write to it, or it belongs to someone else.
    """
    path = Path(path).expanduser().absolute()
    if problem := cache_problem(path):
        raise UserError(problem)
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--cache-dir {path}: cannot be made ({error.strerror})") from None
    if problem := cache_problem(path):  # made by another process meanwhile, or with an odd umask
        raise UserError(problem)
    return path


def environment() -> dict:
    """Name the versions of everything that shapes compiled code or is linked by it."""
    import torch

    versions = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    for package in ("torch", "triton", "torchao", "diffusers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions | {
        "os": f"{platform.system()} {platform.machine()}",
        "libc": " ".join(platform.libc_ver()),
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
    }


def code_digest(files: list[Path]) -> str:
    """Digest the sources that shape the graph: who edits a kernel must not run the old one."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _plain(value):
    """Reduce to what JSON gives back, so that both sides of a comparison look alike."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def name_of(identity: dict) -> str:
    """Name the package of an identity: its component and a short fingerprint."""
    hashed = {key: value for key, value in _plain(identity).items() if key not in UNHASHED}
    digest = hashlib.sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
    return f"{identity['component']}-{digest[:12]}"


def _flat(value, prefix: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        pairs = (_flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
        return {key: leaf for part in pairs for key, leaf in part.items()}
    return {prefix: value}


def differences(found: dict, expected: dict) -> list[str]:
    """Compare two identities field by field: one line for each that differs."""
    found, expected = _flat(_plain(found)), _flat(_plain(expected))
    absent = "nothing"
    return [
        f"{key}: found {found.get(key, absent)}, expected {expected.get(key, absent)}"
        for key in sorted(found.keys() | expected.keys())
        if found.get(key, absent) != expected.get(key, absent)
    ]


def _read_manifest(path: Path) -> dict | None:
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(manifest, dict) and isinstance(manifest.get("identity"), dict)
    return manifest if known else None


def find(root: Path, identity: dict) -> tuple[Package | None, list[str]]:
    """Look for the package of this run and verify all of it.

    Returns: the package and no line; or None and what stands against the nearest one, one line
        per differing field.
    """
    name = name_of(identity)
    path = root / f"{name}.json"
    if not path.exists():
        return None, nearest(root, identity) or [f"{name}: found no manifest of this name"]
    manifest = _read_manifest(path)
    if manifest is None:
        return None, [f"{path.name}: found no readable manifest"]
    if manifest.get("format") != FORMAT:
        return None, [f"{name}: format: found {manifest.get('format')}, expected {FORMAT}"]
    lines = [f"{name}: {line}" for line in differences(manifest["identity"], identity)]
    files = {}
    for suffix, entry in manifest.get("files", {}).items():
        files[suffix] = root / Path(entry["name"]).name  # a file of this folder, whatever it says
        lines += [f"{name}: {line}" for line in _file_problems(files[suffix], entry)]
    if lines or ".pt2" not in files:
        return None, lines or [f"{name}: files: found no .pt2"]
    return Package(name, files, manifest.get("constants", {})), []


def _file_problems(path: Path, entry: dict) -> list[str]:
    try:
        size = path.stat().st_size
        if size != entry["size"]:
            return [f"{path.name} size: found {size}, expected {entry['size']}"]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        return [f"{path.name}: found {error.strerror}, expected {entry['size']} bytes"]
    if digest != entry["sha256"]:
        return [f"{path.name} sha256: found {digest[:16]}, expected {entry['sha256'][:16]}"]
    return []


def nearest(root: Path, identity: dict) -> list[str]:
    """Say what the least different package of this component has against it, if anything.

    Of an incomplete identity (before weights are loaded) only what is there is compared.
    """
    component, best = identity["component"], None
    for path in sorted(root.glob(f"{component}-*.json")):
        if (manifest := _read_manifest(path)) is None:
            continue
        found = {key: value for key, value in manifest["identity"].items() if key in identity}
        lines = differences(found, identity)
        if best is None or len(lines) < len(best):
            best = [f"{path.stem}: {line}" for line in lines]
    return [f"{component}: found no package in {root}"] if best is None else best


@contextmanager
def building(root: Path, identity: dict):
    """Hold the right to build one package; a second process waits. A kill releases it."""
    with open(root / f".{name_of(identity)}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def save(root: Path, identity: dict, files: dict[str, bytes], constants: dict) -> Package:
    """Write a package, then its manifest, then remove the files of the one that it replaces.

    Raises: UserError if the disk is full or the folder gone; what was there before still stands.
    """
    name = name_of(identity)
    manifest_path = root / f"{name}.json"
    previous = _read_manifest(manifest_path) or {}
    entries, written = {}, []
    try:
        for suffix, content in files.items():
            digest = hashlib.sha256(content).hexdigest()
            path = root / f"{name}-{digest[:8]}{suffix}"
            if not path.exists():
                written.append(path)
            write_atomically(path, content)
            entries[suffix] = {"name": path.name, "sha256": digest, "size": len(content)}
        manifest = {
            "format": FORMAT,
            "identity": _plain(identity),
            "constants": constants,
            "files": entries,
        }
        write_atomically(manifest_path, json.dumps(manifest, indent=1).encode())
    except BaseException as error:  # Ctrl-C included: no file without a manifest stays behind
        for path in written:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise UserError(f"--cache-dir {root}: {name}: {error.strerror or error}") from error
        raise
    kept = {entry["name"] for entry in entries.values()}
    for entry in previous.get("files", {}).values():
        if entry["name"] not in kept:
            (root / Path(entry["name"]).name).unlink(missing_ok=True)
    paths = {suffix: root / entry["name"] for suffix, entry in entries.items()}
    return Package(name, paths, manifest["constants"])


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name beside the file, make it durable, and rename."""
    descriptor, temporary = tempfile.mkstemp(
        prefix=f".{path.name}.", suffix=".tmp", dir=path.parent
    )
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)

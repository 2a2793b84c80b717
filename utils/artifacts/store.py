"""Packages on disk: a manifest, and the files that it lists with their sizes and digests.

The manifest is written last and by rename: the manifest is the package. A kill before that leaves
the previous package as it was, and files that no manifest lists, which the next build of the same
package or `prune` removes.

    transformer-1f2e3d4c5b6a.json                  manifest: identity, constants, files
    transformer-1f2e3d4c5b6a-90ab12cd.pt2          code, named by its content
    transformer-1f2e3d4c5b6a-77aa66bb.safetensors  tensors that are no weight of the pipeline
    .transformer-1f2e3d4c5b6a.lock, .building      while it is being built
"""

import errno
import hashlib
import json
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from utils.artifacts.identity import differences, name_of, plain
from utils.artifacts.locks import locked, unwritable
from utils.artifacts.private import file_problem, write_atomically

FORMAT = 2
NAME = re.compile(r"\.?([a-z_]+-[0-9a-f]{12})[-.]")  # how every file of a package begins
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
SUFFIX = re.compile(r"\.[a-z0-9]+")  # of a file: no way out of the folder
ENTRY = {"name": str, "sha256": str, "size": int}  # what a manifest says of each file


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


def read_manifest(path: Path) -> tuple[dict | None, str]:
    """Read a manifest of this format and shape.

    Returns: the manifest, or None and what is wrong with it.
    """
    try:
        if problem := file_problem(path):
            return None, problem
        return parse_manifest(path.stem, path.read_bytes())
    except FileNotFoundError:
        return None, f"{path.stem}: found no manifest of this name"
    except OSError:
        return None, f"{path.name}: found no readable manifest"


def parse_manifest(name: str, text: bytes) -> tuple[dict | None, str]:
    """Understand the manifest of a package of this name, or say what is wrong with it."""
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        return None, f"{name}.json: found no readable manifest"
    if manifest.get("format") != FORMAT:
        return None, f"{name}: format: found {manifest.get('format')}, expected {FORMAT}"
    if manifest.get("sha256") != checksum(manifest):
        return None, f"{name}.json sha256: found that of another text than the file's own"
    for key in ("identity", "constants", "files"):
        if not isinstance(manifest.get(key), dict):
            return None, f"{name}: {key}: found {manifest.get(key)!r}, expected an object"
    for suffix, entry in manifest["files"].items():
        fits = isinstance(entry, dict) and entry.keys() == ENTRY.keys()
        fits = fits and all(type(entry[key]) is kind for key, kind in ENTRY.items())
        fits = fits and SUFFIX.fullmatch(suffix)
        if not fits or entry["name"] != f"{name}-{entry['sha256'][:8]}{suffix}":
            return None, f"{name}: files.{suffix}: found {entry}, expected {', '.join(ENTRY)}"
    return manifest, ""


def checksum(manifest: dict) -> str:
    """Digest all that a manifest says, its own digest aside."""
    said = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def find(root: Path, identity: dict, code: str = ".pt2") -> tuple[Package | None, list[str]]:
    """Look for the package of this run and verify all of it, before anything opens its files.

    Returns: the package and no line; or None and what stands against the nearest one, one line
        per differing field.
    """
    name = name_of(identity)
    path = root / f"{name}.json"
    if not os.path.lexists(path):
        return None, nearest(root, identity) or [f"{name}: found no manifest of this name"]
    manifest, problem = read_manifest(path)
    if manifest is None:
        return None, [problem]
    lines = [f"{name}: {line}" for line in differences(manifest["identity"], identity)]
    lines += file_problems(root, name, manifest)
    if code not in manifest["files"]:
        lines.append(f"{name}: files: found no {code}")
    if lines:
        return None, lines
    with suppress(OSError):
        os.utime(path)  # when it was last used, for prune
    files = {suffix: root / entry["name"] for suffix, entry in manifest["files"].items()}
    return Package(name, files, manifest["constants"]), []


def read(root: Path, identity: dict, ending: str) -> tuple[dict[str, bytes], list[str]]:
    """Read all files of a package of this run, verified as by find().

    Returns: contents by suffix and no line; or none, and what stands against it: that another
        process has just replaced it or made room, too.
    """
    package, lines = find(root, identity, ending)
    if package is None:
        return {}, lines
    try:
        return {suffix: path.read_bytes() for suffix, path in package.files.items()}, []
    except FileNotFoundError:
        return {}, [f"{package.name}: removed by another process"]


def damage(root: Path, identity: dict, lines: list[str]) -> str:
    """Say that the run's own package is there and unusable, by find()'s lines; "" if none is."""
    if not os.path.lexists(root / f"{name_of(identity)}.json"):
        return ""
    return f"the stored package is damaged or does not fit ({lines[0]}), so it is made anew"


def file_problems(root: Path, name: str, manifest: dict, digests: bool = True) -> list[str]:
    """Compare the files of a package with what its manifest says of them: one line each."""
    lines = []
    for entry in manifest["files"].values():
        path = root / entry["name"]
        try:
            problem = file_problem(path)
            if not problem and (size := path.stat().st_size) != entry["size"]:
                problem = f"{path.name} size: found {size}, expected {entry['size']}"
            if not problem and digests:
                with path.open("rb") as stream:
                    digest = hashlib.file_digest(stream, "sha256").hexdigest()
                if digest != entry["sha256"]:
                    expected = entry["sha256"][:16]
                    problem = f"{path.name} sha256: found {digest[:16]}, expected {expected}"
        except (OSError, ValueError) as error:  # ValueError: a name that no file can have
            why = getattr(error, "strerror", None) or error
            problem = f"{path.name}: found {why}, expected {entry['size']} bytes"
        if problem:
            lines.append(f"{name}: {problem}")
    return lines


def nearest(root: Path, identity: dict) -> list[str]:
    """Say what the least different package of this component has against it, if anything.

    Of an incomplete identity (before weights are loaded) only what is there is compared.
    """
    component, best = identity["component"], None
    for path in sorted(root.glob(f"{component}-*.json")):
        manifest, _ = read_manifest(path)
        if manifest is None:
            continue
        found = {key: value for key, value in manifest["identity"].items() if key in identity}
        lines = differences(found, identity)
        if best is None or len(lines) < len(best):
            best = [f"{path.stem}: {line}" for line in lines]
    return [f"{component}: found no package in {root}"] if best is None else best


@contextmanager
def building(root: Path, identity: dict):
    """Hold the right to build one package; a second process waits.

    What a killed build has left is removed first.

    Yields: a folder of one's own, in the store; it is gone afterwards.
    Raises: UserError if the disk is full or the folder gone.
    """
    with workspace(root, name_of(identity)) as scratch:
        yield scratch


@contextmanager
def workspace(root: Path, name: str):
    """Hold the right to write the package of this name, as `building` does."""
    with locked(root, name):
        remove_leftovers(root, name)
        scratch = root / f".{name}.building"
        try:
            scratch.mkdir(mode=0o700)
            yield scratch
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise unwritable(root, name, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def files_of(root: Path, name: str) -> list[Path]:
    """List everything in the store that belongs to one package, its lock aside."""
    found = [path for path in root.iterdir() if (m := NAME.match(path.name)) and m[1] == name]
    return [path for path in found if path.name != f".{name}.lock"]


def remove_leftovers(root: Path, name: str) -> list[str]:
    """Remove what no manifest lists. Only with the package's lock held.

    Returns: the names of what was removed.
    """
    kept = {f"{name}.json", *_listed(root / f"{name}.json")}
    leftovers = [path for path in files_of(root, name) if path.name not in kept]
    for path in leftovers:
        remove(path)
    return [path.name for path in leftovers]


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _listed(manifest: Path) -> set[str]:
    """Name the files that a manifest lists, one of another format included."""
    try:
        entries = json.loads(manifest.read_text())["files"].values()
        return {Path(entry["name"]).name for entry in entries}
    except (OSError, ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return set()


def save(root: Path, identity: dict, files: dict[str, bytes], constants: dict) -> Package:
    """Describe a package that has just been built, and put it into the store.

    Raises: UserError if the disk is full or the folder gone; what was there before still stands.
    """
    name, entries = name_of(identity), {}
    for suffix, content in files.items():
        digest = hashlib.sha256(content).hexdigest()
        file = f"{name}-{digest[:8]}{suffix}"
        entries[suffix] = {"name": file, "sha256": digest, "size": len(content)}
    manifest = {
        "format": FORMAT,
        "built": datetime.now(UTC).isoformat(timespec="seconds"),
        "identity": identity,
        "constants": constants,
        "files": entries,
    }
    manifest = plain(manifest)
    manifest["sha256"] = checksum(manifest)
    return put(root, name, files, manifest, json.dumps(manifest, indent=1).encode())


def put(root: Path, name: str, files: dict[str, bytes], manifest: dict, text: bytes) -> Package:
    """Write a package, then its manifest, then remove the files of the one that it replaces.

    `text` is the manifest as it is written. Raises: as `save`.
    """
    manifest_path = root / f"{name}.json"
    previous = _listed(manifest_path)
    paths = {suffix: root / entry["name"] for suffix, entry in manifest["files"].items()}
    try:
        for suffix, path in paths.items():
            write_atomically(path, files[suffix])
        write_atomically(manifest_path, text)
    except BaseException as error:  # Ctrl-C included: no file without a manifest stays behind
        kept = previous | _listed(manifest_path)  # the new files, if it failed after the rename
        for path in paths.values():
            if path.name not in kept:
                path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(root, name, error) from error
        raise
    for old in previous - {path.name for path in paths.values()}:
        (root / old).unlink(missing_ok=True)
    return Package(name, paths, manifest["constants"])

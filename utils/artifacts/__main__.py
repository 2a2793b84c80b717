"""Look after the stored packages: python -m utils.artifacts list | verify | prune

list     every package: its size, age, last use, and what it covers
verify   read every file and compare it with its manifest; exit 1 if one is not as it was written
prune    remove what a killed build left and what is unusable; with --max-size, what was used
         longest ago as well, until the rest is no larger
"""

import hashlib
import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from utils import memory
from utils.artifacts.identity import flat, name_of
from utils.artifacts.locks import locked
from utils.artifacts.private import cache_problem
from utils.artifacts.store import (
    NAME,
    file_problems,
    files_of,
    read_manifest,
    remove,
    remove_leftovers,
)
from utils.benchmark_utils import Parser
from utils.errors import UserError, run_script
from utils.steps.export_aoti import CACHE_DIR

SHAPES = {"hidden_states": "image", "encoder_hidden_states": "text", "sample": "latents"}
OTHERS = {  # what else lies in the cache directory, made again when it is missing
    "reference-*.safetensors": "pictures of plain diffusers",
    "digests.*.json": "digests of a checkpoint's files",
}
ABANDONED_S = 3600  # a temporary file of no package: nothing writes for so long


@dataclass(frozen=True)
class Entry:
    """One package, or one other file, in the cache directory. Units: bytes; s since the epoch."""

    name: str
    files: list[Path]
    manifest: dict | None  # None if it cannot be used
    about: str  # what it covers, or why it cannot be used
    size: int
    used: float  # when it was last loaded or written

    @property
    def is_package(self) -> bool:
        return NAME.match(self.name + ".") is not None


def parse_size(text: str) -> int:
    """Read --max-size. Units: bytes"""
    if (size := memory.parse_size(text)) is None:
        raise UserError(f"--max-size {text}: expected a size such as 20GB or 500MiB")
    return size


def show_size(size: int) -> str:
    """Write bytes for people."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def show_age(seconds: float) -> str:
    """Write a duration in its largest unit."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def covers(identity: dict) -> str:
    """Say in one line what a package is for."""
    fields = flat(identity)
    shapes = [
        f"{SHAPES[name]} {'x'.join(map(str, fields[f'inputs.{name}.shape']))}"
        for name in SHAPES
        if isinstance(fields.get(f"inputs.{name}.shape"), list)
    ]
    call = [f"{key[5:]} {value}" for key, value in fields.items() if key.startswith("call.")]
    steps = identity.get("steps")
    parts = (
        fields.get("checkpoint.name"),
        str(fields.get("dtype")).removeprefix("torch."),
        *shapes,
        *call,
        fields.get("machine.name"),
        f"torch {fields.get('versions.torch')}",
        f"steps {' '.join(steps)}" if steps and isinstance(steps, dict) else "",
    )
    return ", ".join(str(part) for part in parts if part)


def package_names(root: Path) -> list[str]:
    """Name every package of which there is anything at all."""
    return sorted({m[1] for path in root.iterdir() if (m := NAME.match(path.name))})


def package(root: Path, name: str) -> Entry | None:
    """Look at one package, contents aside; None if there is but the lock of a build."""
    path, files = root / f"{name}.json", files_of(root, name)
    manifest, about = read_manifest(path)
    if manifest is not None:
        about = "; ".join(file_problems(root, name, manifest, digests=False))
    if not files:
        return None
    if manifest is None or about:
        return _entry(name, files, None, about, path)
    return _entry(name, files, manifest, covers(manifest["identity"]), path)


def entries(root: Path) -> list[Entry]:
    """List what is stored, what was used last at the end."""
    found = [entry for name in package_names(root) if (entry := package(root, name))]
    for pattern, about in OTHERS.items():
        found += [_entry(path.name, [path], {}, about, path) for path in root.glob(pattern)]
    return sorted(found, key=lambda entry: entry.used)


def _entry(name: str, files: list[Path], manifest: dict | None, about: str, dated: Path) -> Entry:
    size, used = 0, 0.0
    for path in files:
        for part in (path, *path.rglob("*")):
            try:
                status = part.lstat()
            except OSError:
                continue  # removed meanwhile
            size += status.st_size
            used = status.st_mtime if path == dated else used
    return Entry(name, files, manifest, about, size, used)


def show(root: Path) -> None:
    """Print every package, and the sum."""
    now, found = time.time(), entries(root)
    for entry in found:
        built = (entry.manifest or {}).get("built")
        age = f"built {show_age(now - _seconds(built))} ago, " if _seconds(built) else ""
        state = f"{age}used {show_age(now - entry.used)} ago" if entry.used else "no manifest"
        unusable = "" if entry.manifest is not None else "UNUSABLE: "
        print(f"{entry.name}  {show_size(entry.size)}, {state}\n    {unusable}{entry.about}")
        if entry.is_package and entry.manifest is not None:
            digest = hashlib.sha256((root / f"{entry.name}.json").read_bytes()).hexdigest()
            print(f"    {entry.name}@sha256:{digest}")  # as --artifact_digest takes it
    total = show_size(sum(entry.size for entry in found))
    print(f"{root}: {sum(e.is_package for e in found)} package(s), {total} with all other files")


def _seconds(built: object) -> float:
    try:
        return datetime.fromisoformat(built).timestamp()
    except (TypeError, ValueError):
        return 0.0


def verify(root: Path) -> int:
    """Read every file of every package.

    Returns: how many packages are not as they were written
    """
    broken = 0
    for entry in entries(root):
        if not entry.is_package:
            continue
        lines = [] if entry.manifest else [f"{entry.name}: {entry.about}"]
        if entry.manifest:
            lines = file_problems(root, entry.name, entry.manifest)
            if (named := name_of({"component": None} | entry.manifest["identity"])) != entry.name:
                lines.append(f"{entry.name}: identity: found that of {named}")
        broken += bool(lines)
        print("\n".join(lines) or f"{entry.name}: as written, {show_size(entry.size)}")
    return broken


def prune(root: Path, max_size: int | None) -> None:
    """Remove leftovers and unusable packages; then the least recently used above `max_size` bytes.

    What another process is building is left alone, and does not count.
    """
    freed, busy = 0, set()
    for path in root.glob(".*.tmp"):
        with suppress(FileNotFoundError):  # renamed meanwhile: somebody is writing it
            status = path.lstat()
            if not NAME.match(path.name) and time.time() - status.st_mtime > ABANDONED_S:
                freed += status.st_size
                remove(path)
    for name in package_names(root):
        with locked(root, name, wait=False) as held:  # a lock that nobody holds goes with it
            if not held:
                busy.add(name)
                print(f"{name}: being built by another process, left alone")
            elif entry := package(root, name):
                freed += _tidy(root, entry)
    found = [entry for entry in entries(root) if entry.name not in busy]
    total = sum(entry.size for entry in found)
    for entry in found if max_size is not None else ():
        if total <= max_size:
            break
        with locked(root, entry.name, wait=False) as held:
            if held:
                gone = _drop(entry.name, entry.files, "--max-size")
                freed, total = freed + gone, total - gone
    print(f"{root}: freed {show_size(freed)}, {show_size(total)} left")


def _tidy(root: Path, entry: Entry) -> int:
    """Remove a package's leftovers, or all of one that cannot be used. Units: bytes"""
    if entry.manifest is None:
        return _drop(entry.name, entry.files, f"unusable: {entry.about}")
    before = {path.name: path.lstat().st_size for path in entry.files}
    gone = remove_leftovers(root, entry.name)
    for name in gone:
        print(f"{name}: removed (no manifest lists it)")
    return sum(before.get(name, 0) for name in gone)


def _drop(name: str, files: list[Path], why: str) -> int:
    """Remove a package, its manifest first: a kill in between leaves leftovers, not half of it."""
    size = sum(path.lstat().st_size for path in files if os.path.lexists(path))
    for path in sorted(files, key=lambda path: path.name != f"{name}.json"):
        remove(path)
    print(f"{name}: removed ({why})")
    return size


def main() -> None:
    """Parse and do it."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("action", choices=("list", "verify", "prune"))
    parser.add_argument("--cache-dir", default=CACHE_DIR, help="where packages are kept")
    parser.add_argument("--max-size", metavar="SIZE", help="of prune, such as 20GB")
    args = parser.parse_args()
    if args.max_size and args.action != "prune":
        raise UserError(f"--max-size: found {args.action}, expected prune")
    limit = parse_size(args.max_size) if args.max_size else None
    if problem := cache_problem(args.cache_dir):
        raise UserError(problem)
    root = Path(args.cache_dir).expanduser().absolute()
    if not root.is_dir():
        raise UserError(f"--cache-dir {root}: no such folder; a run makes it")
    if args.action == "list":
        show(root)
    elif args.action == "verify":
        sys.exit(1 if verify(root) else 0)
    else:
        prune(root, limit)


if __name__ == "__main__":
    run_script(main)

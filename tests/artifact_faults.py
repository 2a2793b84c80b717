"""Harm a store of packages in every way that can be thought of, and count what it survives.

python -m tests.artifact_faults --kills 300 > results/faults.md      # a minute on an idle core

Survived means: what was there before is still found and whole, or the fault is named and nothing is
loaded; and the next build leaves nothing but itself. Needs no torch, so that processes start fast.
"""

import argparse
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import artifact_kills as killed
from tests.artifact_pieces import CONSTANTS, IDENTITY, contents, is_refused, recovers, stored
from utils import artifacts
from utils.artifacts import store
from utils.artifacts.identity import flat


def write_manifest(path: Path, manifest: dict) -> None:
    """Write a manifest that is whole, whatever it says."""
    path.write_text(json.dumps(manifest | {"sha256": store.checksum(manifest)}))


def changed_fields(folder: Path) -> Iterator[bool]:
    """Change, remove and add every field of the manifest's identity in turn."""
    with stored(folder) as (root, package):
        path = root / f"{package.name}.json"
        whole = json.loads(path.read_text())
        for field in flat(whole["identity"]):
            *parents, leaf = field.split(".")
            for change in ("other", "removed"):
                manifest = json.loads(json.dumps(whole))
                at = manifest["identity"]
                for parent in parents:
                    at = at[parent]
                at[leaf] = "other"
                if change == "removed":
                    del at[leaf]
                write_manifest(path, manifest)
                yield is_refused(root, f"{field}: found")
        whole["identity"]["more"] = 1
        write_manifest(path, whole)
        yield is_refused(root, "more: found 1, expected nothing")


def truncations(folder: Path) -> Iterator[bool]:
    """Cut each file off: everything, one byte, and points between."""
    with stored(folder) as (root, package):
        for path in (*package.files.values(), root / f"{package.name}.json"):
            whole = path.read_bytes()
            for length in (0, 1, len(whole) // 3, len(whole) // 2, len(whole) - 1):
                path.write_bytes(whole[:length])
                yield is_refused(root, f"size: found {length}") or is_refused(root, "manifest")
            path.write_bytes(whole + b"\0")
            yield is_refused(root)
            path.write_bytes(whole)


def flipped_bits(folder: Path, flips: int, chance: random.Random) -> Iterator[bool]:
    """Flip single bits of the code and of the manifest: refused, or the same in every word."""
    with stored(folder) as (root, package):
        manifest = root / f"{package.name}.json"
        for path in (package.files[".pt2"], package.files[".safetensors"], manifest):
            whole = path.read_bytes()
            for _ in range(flips):
                harmed, at = bytearray(whole), chance.randrange(len(whole))
                harmed[at] ^= 1 << chance.randrange(8)
                path.write_bytes(harmed)
                found, lines = artifacts.find(root, IDENTITY)
                said_so = found is None and "sha256: found" in lines[0]
                # Of a manifest only white space may change; what is no JSON has no digest either
                yield said_so or (path == manifest and (found == package or bool(lines)))
            path.write_bytes(whole)


def swaps(folder: Path) -> Iterator[bool]:
    """Put another package's files and manifest in this one's place."""
    with stored(folder) as (root, package):
        other = artifacts.save(root, IDENTITY | {"dtype": "fp32"}, contents(1), CONSTANTS)
        for suffix, path in package.files.items():
            whole = path.read_bytes()
            path.write_bytes(other.files[suffix].read_bytes()[: len(whole)].ljust(len(whole)))
            yield is_refused(root, "sha256: found")
            path.write_bytes(whole)
        code, tensors = package.files.values()
        before = code.read_bytes(), tensors.read_bytes()
        code.write_bytes(before[1])
        tensors.write_bytes(before[0])
        yield is_refused(root, "size: found")
        code.write_bytes(before[0])
        tensors.write_bytes(before[1])
        (root / f"{package.name}.json").write_bytes((root / f"{other.name}.json").read_bytes())
        yield is_refused(root)


def strangers(folder: Path) -> Iterator[bool]:
    """Open each file to others, give it to another user, put a link or a folder in its place."""
    with stored(folder) as (root, package):
        for path in (*package.files.values(), root / f"{package.name}.json"):
            for mode in (0o620, 0o602, 0o666):
                path.chmod(mode)
                yield is_refused(root, f"mode: found {mode:04o}")
            path.chmod(0o600)
            if os.geteuid() == 0:
                os.chown(path, 65534, -1)
                yield is_refused(root, "owner: found user 65534")
                os.chown(path, 0, -1)
            aside = root / "aside"
            path.rename(aside)
            path.symlink_to(aside)
            yield is_refused(root, "kind: found l")
            path.unlink()
            path.mkdir()
            yield is_refused(root, "kind: found d")
            path.rmdir()
            aside.rename(path)
        yield artifacts.find(root, IDENTITY)[0] == package


def old_formats(folder: Path) -> Iterator[bool]:
    """Claim every other format."""
    with stored(folder) as (root, package):
        path = root / f"{package.name}.json"
        whole = json.loads(path.read_text())
        for other in (0, 1, store.FORMAT + 1, str(store.FORMAT), None, [store.FORMAT]):
            write_manifest(path, whole | {"format": other})
            yield is_refused(root, f"format: found {other}, expected {store.FORMAT}")
            yield recovers(root, 1)


def faults(folder: Path, kills: int, flips: int, step: int, seed: int) -> dict[str, Iterator[bool]]:
    """Name every kind of fault; each gives True for one that was survived."""
    chance, rounds = random.Random(seed), max(2, kills // 20)
    return {
        "a field of the manifest changed, removed or added": changed_fields(folder),
        "a file cut off or longer": truncations(folder),
        "one bit flipped in code, tensors or manifest": flipped_bits(folder, flips, chance),
        "files or manifests of two packages swapped": swaps(folder),
        "a file that others may write or own, a link, a folder": strangers(folder),
        "another format": old_formats(folder),
        "kill -9 before every line of a build": killed.kills_at_every_line(folder, step),
        "Ctrl-C before every line of a build": killed.interrupts_at_every_line(folder, step),
        "kill -9 at a random moment": killed.kills_at_random(folder, kills, chance),
        "a disk that is full, at several sizes": killed.full_disks(folder),
        "four processes that want the same package": killed.builders_at_once(folder, 4, rounds),
    }


def main() -> None:
    """Try everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=300, help="at random moments")
    parser.add_argument("--flips", type=int, default=3000, help="bits, in each file")
    parser.add_argument("--every", type=int, default=1, help="which lines a build is stopped at")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows, failed = [], 0
    with tempfile.TemporaryDirectory() as folder:
        kinds = faults(Path(folder), args.kills, args.flips, args.every, args.seed)
        for name, tries in kinds.items():
            results = list(tries)
            print(f"{name}: {sum(results)} of {len(results)}", file=sys.stderr)
            failed += results.count(False)
            rows.append(f"| {name} | {len(results)} | {sum(results)} |")
    print("# Faults that the store of packages was put through\n")
    print(
        f"`python -m tests.artifact_faults --kills {args.kills} --flips {args.flips} --seed "
        f"{args.seed}`, Python {platform.python_version()}, {platform.system()}\n"
    )
    print("| fault | tried | survived |\n| --- | --- | --- |")
    print("\n".join(rows))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

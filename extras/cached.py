"""Requests with a memory: the same request gives the stored picture, the same text its embeddings.

python -m extras.cached --prompt "..." [any flag of gen_image.py]

What belongs to a request is everything that changes its picture: every flag but those of NEUTRAL,
the contents of files that flags name, the checkpoint's weights, every step that is on with its
settings, the machine, the versions and the sources of steps and kernels. A flag that this module
does not know belongs to it too, so a new one cannot be forgotten.

A request that was made before loads no weight. Otherwise its text embeddings are looked for
(utils/embeddings.py), and the picture is made and stored. Entries are packages of
utils/artifacts: a private folder, digests that are checked before use, atomic writes, one builder
at a time, the least recently used ones leave first. Benchmarks never come here.
"""

import contextlib
import copy
import functools
import hashlib
import os
import sys
import time
from pathlib import Path

from utils import artifacts, embeddings
from utils.benchmark_utils import create_parser
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

NEUTRAL = {  # flags that decide where things lie or whether the run starts, never the picture
    "cache_dir": "where packages are",
    "force_export": "builds the same package again",
    "output_file": "where the picture goes",
    "request_cache": "where this module's entries are",
    "max_size": "how many of them",
    "require": "stops the run, or does nothing",
    "use_cached_model": "stops the run, or does nothing",
}
EXPLAINS = ("why",)  # settings that give a reason and change nothing
SOURCES = Path(artifacts.__file__).parent.parent  # utils: whoever edits a step wants its picture
FIRST = ".png0"  # ending of a request's first picture


def request_identity(args) -> dict:
    """Say all that a prepared run's pictures depend on, as utils/artifacts compares it."""
    identity = _of_run(args)
    flags = {name: value for name, value in vars(args).items() if name in _flags()}
    named = [value for value in flags.values() if isinstance(value, str)]
    return identity | {
        "component": "request",
        "flags": {name: _plain(value) for name, value in flags.items()},
        # not Path.is_file: a long negative prompt is no name that a file could have
        "files": {name: _digest(Path(name)) for name in named if os.path.isfile(name)},
    }


def _of_run(args) -> dict:
    """Say what a package of this run depends on, and what its pictures depend on beyond that."""
    from utils import card
    from utils.steps import compile

    identity = artifacts.identity_of_run(args, compile.compiler_options(args))
    return identity | {
        "steps": {
            name: {key: value for key, value in verdict.settings.items() if key not in EXPLAINS}
            for name, verdict in args.plan.items()
            if verdict.is_on
        },
        "versions": identity["versions"] | card.versions(),
        "code": _sources_digest(),
    }


@functools.cache
def _sources_digest() -> str:
    return artifacts.code_digest(list(SOURCES.rglob("*.py")))


@functools.cache
def _flags() -> set[str]:
    """Name every flag of a run that may change its picture."""
    return {action.dest for action in create_parser()._actions} - {"help"} - NEUTRAL.keys()


def _plain(value):
    return value if isinstance(value, (bool, int, float, list, type(None))) else str(value)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def find_pictures(root: Path, identity: dict) -> tuple[list[bytes], list[str]]:
    """Look for a request's pictures, digests checked.

    Returns: PNG files in order, none if there is no whole entry; then what stands against it.
    """
    files, lines = artifacts.read(root, identity, FIRST)
    return [files[f".png{k}"] for k in range(len(files))], lines


def evict(root: Path, max_size: int) -> None:
    """Remove what was used longest ago until the rest is no larger. Units: bytes"""
    from utils.artifacts.__main__ import entries, prune

    if sum(entry.size for entry in entries(root)) > max_size:
        with contextlib.redirect_stdout(sys.stderr):
            prune(root, max_size)


def write_pictures(pictures: list[bytes], output_file: str) -> list[Path]:
    """Write PNG files as utils/images.py names them; each whole or not at all."""
    target, written = Path(output_file), []
    for k, content in enumerate(pictures):
        path = target if len(pictures) == 1 else target.with_stem(f"{target.stem}_{k}")
        with artifacts.replacing(path) as new:
            new.write_bytes(content)
        written.append(path)
    return written


def make(args, root: Path, identity: dict, scratch: Path) -> list[Path]:
    """Make a request's pictures and store them; its text embeddings may be there already.

    They are read from a folder of this process alone: another may write the same output file.
    """
    from utils import card
    from utils.images import save_images
    from utils.pipeline_utils import generate, load_pipeline, optimize, reused_steps

    print(card.render(args), flush=True)
    text = embeddings.Remembered(args, root)
    pipeline = load_pipeline(args, text.unneeded)
    text.install(pipeline)
    optimize(pipeline, args, text.parts)
    alone = copy.copy(args)
    alone.output_file = str(scratch / "x.png")
    made = save_images(generate(pipeline, args), alone, reused_steps(pipeline, args))
    pictures = [path.read_bytes() for path in made]
    paths = write_pictures(pictures, args.output_file)
    artifacts.save(root, identity, {f".png{k}": png for k, png in enumerate(pictures)}, {})
    print(text.line())
    return paths


def parse_arguments():
    """Add the memory's own flags to those of a run."""
    from utils.steps.export_aoti import CACHE_DIR

    parser = create_parser("Make images, or find those of the same request; see --request_cache.")
    add = parser.add_argument_group("memory of requests").add_argument
    add("--request_cache", metavar="DIR", default=f"{CACHE_DIR}-requests", help="yours alone")
    add("--max_size", metavar="SIZE", default="2GB", help="of all entries; the oldest leave first")
    return parser.parse_args()


def main() -> None:
    """Parse, look for the request, and make it if it is not there."""
    from utils.artifacts.__main__ import parse_size

    args = parse_arguments()
    limit = parse_size(args.max_size)
    if args.swap_loras:
        raise UserError("--swap_loras: a request is one call; use --lora alone, or gen_image.py")
    quiet_libraries()
    from utils.prepare import prepare

    start = time.perf_counter()
    prepare(args)
    identity = request_identity(args)  # may refuse --cache-dir, before the other folder is made
    root = embeddings.open_cache(args, "--request_cache")
    pictures, lines = find_pictures(root, identity)
    if not pictures:
        with artifacts.building(root, identity) as scratch:  # a second process waits, then finds it
            pictures, _ = find_pictures(root, identity)
            paths = [] if pictures else make(args, root, identity, scratch)
    if pictures:
        paths = write_pictures(pictures, args.output_file)
    found = "found" if pictures else f"made ({lines[0]})"
    for path in paths:
        print(f"wrote {path}")
    print(f"request     {found} in {time.perf_counter() - start:.2f} s, {root}")
    evict(root, limit)


if __name__ == "__main__":
    run_script(main)

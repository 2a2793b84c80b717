"""Packages from a repository on a model hub: only those that the user names, by digest.

A package is machine code, so nobody's word is taken for it: `--artifact_digest` names a package and
the sha256 of its manifest, the manifest names its files' sha256 and sizes, and nothing whose digest
differs is written to the store. What has been put there is looked up like a package built here, so
it serves a run only if its whole fingerprint belongs to it. A repository holds the files of a store
as they are.
"""

import hashlib
import re
from pathlib import Path

from utils.artifacts.identity import differences, name_of
from utils.artifacts.store import file_problems, parse_manifest, put, read_manifest, workspace
from utils.checkpoints import transport_error
from utils.errors import UserError
from utils.progress import say

DIGEST = re.compile(r"([a-z_]+-[0-9a-f]{12})@sha256:([0-9a-f]{64})")
FORM = "NAME@sha256:HEX of a manifest, as `python -m utils.artifacts list` prints it"
LARGEST_MANIFEST = 16 * 2**20  # bytes; FLUX.1's have some 200 kB


def flag_problem(args) -> str:
    """Say what is wrong with the flags that name a repository; "" if nothing is."""
    repo, digests = args.artifact_repo, args.artifact_digest or []
    if digests and not repo:
        return "--artifact_digest: expected --artifact_repo as well, which has the packages"
    if not repo:
        return ""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        return f"--artifact_repo {repo}: expected ORG/NAME"
    if not digests:
        return (
            f"--artifact_repo {repo}: found no --artifact_digest; packages are machine code, so "
            f"each has to be named by its digest ({FORM})"
        )
    if wrong := [word for word in digests if not DIGEST.fullmatch(word)]:
        return f"--artifact_digest {wrong[0]}: expected {FORM}"
    if not args.use_cached_model:
        return (
            f"--artifact_repo {repo}: expected --use-cached-model as well: who fetches packages "
            "wants none built in their place"
        )
    return ""


def fetch(root: Path, args, known: dict) -> None:
    """Put every package that the user names into the store, unless it is there already.

    `known` is what this run knows of its packages so early: what differs is not fetched.

    Raises: UserError, one line for what differs, and nothing of that package has been written.
    """
    repo = args.artifact_repo
    for word in args.artifact_digest:
        name, digest = DIGEST.fullmatch(word).groups()
        if _is_stored(root, name, digest):
            continue
        with workspace(root, name) as scratch:
            text = _download(repo, f"{name}.json", LARGEST_MANIFEST, scratch)
            _compare(repo, f"{name}.json", text, digest)
            manifest, problem = parse_manifest(name, text)
            lines = [problem] if problem else _foreign(name, manifest["identity"], known)
            if lines:
                raise UserError("\n".join(f"--artifact_repo {repo}: {x}" for x in lines))
            files = {}
            for suffix, entry in manifest["files"].items():
                content = _download(repo, entry["name"], entry["size"], scratch)
                _compare(repo, entry["name"], content, entry["sha256"])
                files[suffix] = content
            package = put(root, name, files, manifest, text)
        size = f"{package.size / 2**20:.1f} MiB"
        say("artifacts", f"fetched {name}, {size}, from {repo} to {root}")


def _is_stored(root: Path, name: str, digest: str) -> bool:
    path = root / f"{name}.json"
    manifest, _ = read_manifest(path)
    if manifest is None or hashlib.sha256(path.read_bytes()).hexdigest() != digest:
        return False
    return not file_problems(root, name, manifest)


def _foreign(name: str, identity: dict, known: dict) -> list[str]:
    """Say what keeps a package from this run, as far as it is known before weights are loaded."""
    if name_of({"component": None} | identity) != name:
        return [f"{name}: identity: found that of another package"]
    found = {key: value for key, value in identity.items() if key in known}
    return [f"{name}: {line}" for line in differences(found, known)]


def _compare(repo: str, file: str, content: bytes, expected: str) -> None:
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected:
        raise UserError(
            f"--artifact_repo {repo}: {file} sha256: found {digest[:16]}, expected {expected[:16]}"
        )


def _download(repo: str, file: str, largest: int, folder: Path) -> bytes:
    """Fetch one file of a repository, no larger than expected, through a folder of our own."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        size = get_hf_file_metadata(hf_hub_url(repo, file), timeout=10).size  # one try, not six
        if size is not None and size <= largest:
            return Path(hf_hub_download(repo, file, local_dir=folder)).read_bytes()
    except (HfHubHTTPError, OSError, ValueError, RuntimeError, transport_error()) as error:
        why = " ".join(str(error).split())[:150]
        raise UserError(
            f"--artifact_repo {repo}: {file} cannot be fetched ({type(error).__name__}: {why})"
        ) from None
    raise UserError(f"--artifact_repo {repo}: {file} size: found {size}, expected {largest}")

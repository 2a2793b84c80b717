"""Store of exported packages: which run each belongs to, and nothing else is ever loaded.

private.py      whose files are trusted, and writes that leave all or nothing
identity.py     what a package belongs to: names, versions, differences field by field
run.py          the part of it that all packages of one run share
store.py        packages: a manifest, written last, and the files that it lists with their digests
locks.py        one process at a time builds a package
remote.py       packages from a repository, named by digest
digests.py      digests of a checkpoint's files, read once
__main__.py     python -m utils.artifacts list | verify | prune
"""

from utils.artifacts.digests import checkpoint_digest, file_digest, files_below
from utils.artifacts.identity import code_digest, environment, name_of
from utils.artifacts.private import cache_problem, open_cache, replacing, write_atomically
from utils.artifacts.remote import flag_problem
from utils.artifacts.run import (
    identity_of_run,
    known_early,
    no_cached_model,
    sources_of_run,
    stored_problems,
)
from utils.artifacts.store import building, damage, find, read, read_manifest, save

__all__ = [
    "building",
    "cache_problem",
    "checkpoint_digest",
    "code_digest",
    "damage",
    "environment",
    "file_digest",
    "files_below",
    "find",
    "flag_problem",
    "identity_of_run",
    "known_early",
    "name_of",
    "no_cached_model",
    "open_cache",
    "read",
    "read_manifest",
    "replacing",
    "save",
    "sources_of_run",
    "stored_problems",
    "write_atomically",
]

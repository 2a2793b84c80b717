"""Packages from a repository: over real HTTP, by digest, and nothing of a refused one stays."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from aoti_pieces import make_args
from hub_server import serving

from utils import artifacts
from utils.artifacts.store import checksum
from utils.errors import UserError
from utils.steps import compile, export_aoti

REPO = "someone/packages"
ROOT = Path(__file__).resolve().parent.parent


def digest_of(root: Path, name: str) -> str:
    return f"{name}@sha256:{hashlib.sha256((root / f'{name}.json').read_bytes()).hexdigest()}"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Serve two small packages of a run: the hub, its folder, and the arguments of the run."""
    import huggingface_hub.constants as constants

    folder = tmp_path / "hub" / REPO
    folder.parent.mkdir(parents=True)
    root = artifacts.open_cache(folder)
    args = make_args(tmp_path / "cache", use_cached_model=True, artifact_repo=REPO)
    known = artifacts.known_early(args, export_aoti._options(args))
    packages = [
        artifacts.save(root, known | {"component": component}, {".pt2": component.encode()}, {})
        for component in export_aoti.COMPONENTS["full"]
    ]
    args.artifact_digest = [digest_of(root, package.name) for package in packages]
    with serving(tmp_path / "hub") as server:
        template = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server, root, args


def refusal(args) -> str:
    """Give what stops the run, and make sure that nothing has been written."""
    try:
        verdict = export_aoti.check(args)
        assert verdict.state == "refused"
        reason = verdict.reason
    except UserError as error:
        reason = str(error)
    cache = Path(args.cache_dir)
    assert not cache.exists() or not list(cache.iterdir())
    return reason


def test_named_packages_are_fetched_once_and_whole(hub):
    server, root, args = hub
    assert export_aoti.check(args).is_on
    cache = Path(args.cache_dir)
    assert cache.stat().st_mode & 0o777 == 0o700
    fetched = {path.name: path.read_bytes() for path in cache.iterdir()}
    assert fetched == {path.name: path.read_bytes() for path in root.iterdir()}
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in cache.iterdir())
    asked = len(server.asked)
    assert asked and export_aoti.check(args).is_on and len(server.asked) == asked
    next(cache.glob("decoder-*.pt2")).write_bytes(b"harmed!")
    assert export_aoti.check(args).is_on and len(server.asked) > asked
    assert fetched == {path.name: path.read_bytes() for path in cache.iterdir()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"artifact_digest": None}, "found no --artifact_digest; packages are machine code"),
        ({"artifact_repo": None}, "--artifact_digest: expected --artifact_repo as well"),
        ({"artifact_repo": "packages"}, "--artifact_repo packages: expected ORG/NAME"),
        ({"artifact_digest": ["sha256:12"]}, "--artifact_digest sha256:12: expected NAME@sha256"),
        ({"use_cached_model": False}, "expected --use-cached-model as well"),
        ({"compile_export_mode": "disabled", "use_cached_model": False}, "--use-cached-model as"),
    ],
    ids=["no digest", "no repo", "repo", "digest", "may build", "disabled"],
)
def test_flags_that_name_nothing_are_refused_without_a_connection(hub, changes, message):
    server, _, args = hub
    vars(args).update(changes)
    assert message in refusal(args)
    assert not server.asked


def test_nothing_is_asked_for_without_the_flag(hub):
    server, _, args = hub
    args.artifact_repo = args.artifact_digest = None
    assert "found no package in" in refusal(args)
    assert not server.asked


def test_another_manifest_than_the_named_one_is_refused(hub):
    _, root, args = hub
    manifest = next(root.glob("transformer-*.json"))
    manifest.write_bytes(manifest.read_bytes() + b" ")
    assert f"{manifest.name} sha256: found" in refusal(args)


@pytest.mark.parametrize("harm", ["flipped", "longer", "absent"])
def test_another_file_than_the_manifest_lists_is_refused(hub, harm):
    _, root, args = hub
    code = next(root.glob("transformer-*.pt2"))
    whole = code.read_bytes()
    if harm == "absent":
        code.unlink()
    else:
        code.write_bytes(b"T" + whole[1:] if harm == "flipped" else whole + b"\0")
    expected = {"flipped": "sha256: found", "longer": "size: found 12, expected 11"}
    assert f"{code.name} {expected.get(harm, 'cannot be fetched')}" in refusal(args)


def test_a_package_of_another_run_is_refused_by_field(hub):
    _, _, args = hub
    args.machine = type(args.machine)("cpu", "other processor")
    assert "machine.name: found test processor, expected other processor" in refusal(args)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format: found 1, expected 2"),
        ({"identity": {"component": "transformer"}}, "identity: found that of another package"),
        (
            {"files": {"/../../x": {"name": "", "sha256": "0" * 64, "size": 1}}},
            "files./../../x: found",
        ),
    ],
    ids=["format", "identity", "path"],
)
def test_a_manifest_that_is_wrong_is_refused_though_its_digest_was_given(hub, change, message):
    _, root, args = hub
    path = next(root.glob("transformer-*.json"))
    manifest = json.loads(path.read_text()) | change
    for suffix, entry in manifest["files"].items():
        entry["name"] = f"{path.stem}-{entry['sha256'][:8]}{suffix}"
    path.write_text(json.dumps(manifest | {"sha256": checksum(manifest)}))
    args.artifact_digest = [digest_of(root, path.stem)]
    assert message in refusal(args)


def test_a_hub_that_cannot_be_reached_is_one_line(hub):
    server, _, args = hub
    server.shutdown()
    server.server_close()
    reason = refusal(args)
    assert "cannot be fetched" in reason and "\n" not in reason


def test_what_torch_compile_has_made_is_fetched_the_same_way(hub):
    _, root, args = hub
    vars(args).update(
        prompt=["x"],
        num_images_per_prompt=1,
        text_tokens=32,
        drop_text_padding=False,
        guidance_scale=None,
        cache_dit_config=None,
        compile_export_mode="compile",
    )
    known = artifacts.known_early(args, compile.compiler_options(args)) | compile._about(args)
    stored = artifacts.save(root, known, {compile.STORED: b"made"}, {})
    args.artifact_digest = [digest_of(root, stored.name)]
    assert compile.check(args).is_on
    assert next(Path(args.cache_dir).glob("compile-*.compiled")).read_bytes() == b"made"


@pytest.mark.slow
def test_a_run_with_packages_of_another_machines_user(tmp_path):
    """Build, publish, list the digests, fetch into an empty store, and make the same picture."""

    def run(*words, **environment):
        return subprocess.run(
            [sys.executable, *map(str, words)],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )

    common = ("gen_image.py", "--device", "cpu", "--compile_export_mode", "export_aoti")
    built, empty = tmp_path / "built", tmp_path / "empty"
    pictures = [tmp_path / "built.png", tmp_path / "fetched.png"]
    done = run(*common, "--cache-dir", built, "--output-file", pictures[0])
    assert done.returncode == 0, done.stderr[-2000:]
    listed = run("-m", "utils.artifacts", "list", "--cache-dir", built).stdout
    digests = [line.strip() for line in listed.splitlines() if "@sha256:" in line]
    assert len(digests) == 2
    shutil.copytree(built, tmp_path / "hub" / REPO)
    named = [word for digest in digests for word in ("--artifact_digest", digest)]
    fetch = (*common, "--cache-dir", empty, "--output-file", pictures[1], "--use-cached-model")
    fetch += ("--artifact_repo", REPO)
    with serving(tmp_path / "hub") as server:
        where = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0"}
        done = run(*fetch, *named, **where)
        assert done.returncode == 0, done.stderr[-2000:]
        refused = run(*fetch, *named, "--height", 64, **where)
    assert refused.returncode == 2 and not refused.stdout.count("Traceback")
    assert "inputs.hidden_states.shape: found [1, 64, 64], expected [1, 32, 64]" in refused.stderr
    assert pictures[0].read_bytes() and len(list(empty.glob("*.pt2"))) == 2

    from PIL import Image, ImageChops

    first, second = (Image.open(picture).convert("RGB") for picture in pictures)
    assert ImageChops.difference(first, second).getbbox() is None

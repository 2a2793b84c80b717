"""What each checkpoint is: where it lies, which kind of FLUX.1, and the call it was made for.

A checkpoint is named by `--ckpt`: a bundled one (`tiny-schnell`), a hub id
(`black-forest-labs/FLUX.1-schnell`) or a folder in diffusers' layout. Its kind decides the defaults
of the call; everything else is read from its configs.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from utils.errors import UserError

BUNDLED_DIR = Path(__file__).resolve().parent.parent / "tiny_flux"
BUNDLED = {  # name -> folder and kind; one set of weights draws and edits
    "tiny-schnell": ("tiny-schnell", "schnell"),
    "tiny-dev": ("tiny-dev", "dev"),
    "tiny-kontext": ("tiny-dev", "kontext"),
}
HUB_KINDS = {
    "black-forest-labs/FLUX.1-schnell": "schnell",
    "black-forest-labs/FLUX.1-dev": "dev",
    "black-forest-labs/FLUX.1-Kontext-dev": "kontext",
    "black-forest-labs/FLUX.1-Fill-dev": "fill",
}
MID = "mid-schnell"  # an architecture between the two, without weights: random_weights.py
DEFAULT_CKPT = {"cuda": "black-forest-labs/FLUX.1-schnell", "cpu": "tiny-schnell"}
DRAW, EDIT = "a lighthouse on a cliff at dawn, oil on canvas", "make it night, with the lamp lit"
DEFAULT_PROMPT = {"schnell": DRAW, "dev": DRAW, "kontext": EDIT, "fill": DRAW}
TINY_DRAW, TINY_EDIT = "a red circle on a blue background", "make the background green"
TINY_STAR = "a yellow star on a black background"  # tiny-dev draws its circles badly
TINY_PROMPT = {"schnell": TINY_DRAW, "dev": TINY_STAR, "kontext": TINY_EDIT}


@dataclass(frozen=True)
class Kind:
    """Defaults of one kind of FLUX.1. Source: the model cards' own example calls."""

    pipeline: str  # the diffusers class
    steps: int
    guidance: float | None  # None: the checkpoint has no guidance embedding
    max_sequence_length: int  # T5 tokens
    takes_image: bool  # as --image of both scripts; Fill's are extras.inpaint's


KINDS = {
    "schnell": Kind("FluxPipeline", 4, None, 256, False),
    "dev": Kind("FluxPipeline", 28, 3.5, 512, False),
    "kontext": Kind("FluxKontextPipeline", 28, 2.5, 512, True),
    "fill": Kind("FluxFillPipeline", 50, 30.0, 512, False),
}
PIPELINES = {kind.pipeline: name for name, kind in KINDS.items()}  # Schnell's and Dev's is one


@dataclass(frozen=True)
class Checkpoint:
    """One named set of weights, or with `random_weights` one architecture."""

    name: str  # as given to --ckpt
    source: str  # "bundled", "hub", "folder" or "architecture"
    kind: str  # a key of KINDS
    path: Path | None  # None for the hub
    native_size: int  # pixels; the edge it was trained for
    random_weights: bool = False

    @property
    def defaults(self) -> Kind:
        return KINDS[self.kind]

    @property
    def prompt(self) -> str:
        return (TINY_PROMPT if self.source == "bundled" else DEFAULT_PROMPT)[self.kind]

    def identity(self, cache_dir: str | Path) -> str:
        """Name the weights themselves: a digest of a folder's files, or a hub revision.

        Files that have not changed since are not read again: their digests are in `cache_dir`.
        """
        if self.random_weights:
            return "random:" + self.kind
        if self.source == "hub":
            return "hub:" + hub_revision(self.name)
        from utils.artifacts import checkpoint_digest, open_cache

        return "sha256:" + checkpoint_digest(self.path, open_cache(cache_dir))


def _read_json(path: Path, what: str) -> dict:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--ckpt: {what} cannot be read: {path} ({error})") from None
    if not isinstance(found, dict):
        kind = type(found).__name__
        raise UserError(f"--ckpt: {what}: found {kind}, expected keys and values: {path}")
    return found


def folder_config(folder: Path, part: str) -> dict:
    """Read the config of one component of a folder.

    Raises: UserError if there is none, or it is no config.
    """
    file = "scheduler_config.json" if part == "scheduler" else "config.json"
    return _read_json(folder / part / file, f"the {part}'s config")


def _from_folder(name: str, path: Path, source: str) -> Checkpoint:
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"--ckpt {name}: no model in this folder (expected diffusers' model_index.json)"
        )
    pipeline = _read_json(index, "model_index.json").get("_class_name")
    if not isinstance(pipeline, str) or pipeline not in PIPELINES:
        expected = f"expected one of {', '.join(PIPELINES)}"
        raise UserError(f"--ckpt {name}: found a {pipeline}, {expected}")
    for part in ("tokenizer", "tokenizer_2"):
        if not (path / part).is_dir():  # transformers would go on with one that knows no word
            raise UserError(f"--ckpt {name}: no folder {part} in it (expected diffusers' layout)")
    transformer, vae = folder_config(path, "transformer"), folder_config(path, "vae")
    size = vae.get("sample_size", 1024)
    if not isinstance(size, int) or size < 16 or size % 16:
        raise UserError(
            f"--ckpt {name}: the vae's config has sample_size {size!r}, expected pixels, a whole "
            "number divisible by 16"
        )
    guided = transformer.get("guidance_embeds", False)
    kind = ("dev" if guided else "schnell") if pipeline == "FluxPipeline" else PIPELINES[pipeline]
    return Checkpoint(name, source, kind, path, size)


def _from_hub(name: str) -> Checkpoint:
    """Ask the hub for the two small files that tell the kind; weights are loaded later."""
    index = _read_json(hub_file(name, "model_index.json"), "model_index.json")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(f"--ckpt {name}: found a {pipeline}, expected a FLUX.1 pipeline")
    kind = HUB_KINDS.get(name) or PIPELINES[pipeline]
    if name not in HUB_KINDS and pipeline == "FluxPipeline":
        config = _read_json(hub_file(name, "transformer/config.json"), "the transformer's config")
        kind = "dev" if config.get("guidance_embeds") else "schnell"
    return Checkpoint(name, "hub", kind, None, 1024)


INSTEAD = (
    f"bundled: {', '.join(BUNDLED)}; or measure speed without its weights: --random_weights with a "
    "FLUX.1 name"
)


class NotFromHub(UserError):
    """A file of the hub cannot be had; `why` says so without the flag and what to do instead."""

    def __init__(self, flag: str, repo: str, why: str, cure: str) -> None:
        super().__init__(f"{flag} {repo}: {why}; {cure}")
        self.why = why


def hub_file(repo: str, file: str, flag: str = "--ckpt", instead: str = INSTEAD) -> Path:
    """Fetch one file of a hub repository.

    Raises: NotFromHub, one line that names the flag and another way
    """
    from huggingface_hub import (
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )

    try:
        cached = try_to_load_from_cache(repo, file)
        if isinstance(cached, str):
            return Path(cached)
        get_hf_file_metadata(hf_hub_url(repo, file), timeout=10)  # one try; a download makes six
        return Path(hf_hub_download(repo, file))
    except HFValidationError:
        raise UserError(
            f"{flag} {repo}: no such folder, and no name on the hub; {instead}"
        ) from None
    except GatedRepoError:
        cure = f"accept the licence at https://huggingface.co/{repo}, then `hf auth login`"
        raise NotFromHub(flag, repo, "gated", f"{cure}; {instead}") from None
    except RepositoryNotFoundError:
        why = "no such model on the hub, or not yours to see (`hf auth login`)"
        raise NotFromHub(flag, repo, why, instead) from None
    except (HfHubHTTPError, OSError, ValueError, RuntimeError, transport_error()) as error:
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        why = f"not in the local cache and the hub cannot be reached ({said})"
        cure = f"licence: https://huggingface.co/{repo}, login: `hf auth login`"
        raise NotFromHub(flag, repo, why, f"{cure}; {instead}") from None


def transport_error() -> type[Exception]:
    """Give the base class of connection errors of the HTTP client that huggingface_hub uses."""
    from huggingface_hub.utils import _http

    for module in ("httpx2", "httpx"):
        if hasattr(_http, module):
            return getattr(_http, module).HTTPError
    return OSError


def hub_revision(repo: str) -> str:
    """Give the commit of the hub snapshot in the local cache."""
    return hub_file(repo, "model_index.json").parent.name


def resolve(name: str, random_weights: bool = False) -> Checkpoint:
    """Find out what `--ckpt` names, without loading a weight.

    Raises: UserError for an unknown name, a folder without a model, a gated or unreachable one.
    """
    if name in BUNDLED:
        folder, kind = BUNDLED[name]
        found = replace(_from_folder(name, BUNDLED_DIR / folder, "bundled"), kind=kind)
    elif name and Path(name).is_dir():  # Path("") is the working directory
        found = _from_folder(name, Path(name), "folder")
    elif random_weights and name in HUB_KINDS:
        found = Checkpoint(name, "hub", HUB_KINDS[name], None, 1024)
    elif random_weights and name == MID:
        found = Checkpoint(name, "architecture", "schnell", None, 128)
    elif name == MID:
        raise UserError(f"--ckpt {name}: an architecture without weights; add --random_weights")
    elif random_weights:
        raise UserError(
            f"--random_weights: unknown architecture {name!r} "
            f"(expected a folder or one of {', '.join((*HUB_KINDS, MID, *BUNDLED))})"
        )
    elif name.count("/") == 1 and not name.startswith(("/", ".")):
        found = _from_hub(name)
    else:
        raise UserError(
            f"--ckpt {name or repr(name)}: unknown checkpoint (expected {', '.join(BUNDLED)}, a "
            f"folder, or a hub id such as {DEFAULT_CKPT['cuda']})"
        )
    return replace(found, random_weights=random_weights)

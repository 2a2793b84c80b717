"""The stored reference of a run: what plain diffusers makes of the same prompts and seeds.

Every row of a benchmark is compared with the same pictures, so they are made once, by the untouched
pipeline, and kept in the cache directory under a digest of all that decides them. bf16 eager is the
reference of pictures; for latents it is a poor oracle (it rounds guidance * 1000 to 8 bits), so
fp32 eager is kept too, and eager's own distance from it. Another seed's pictures give the scale.
"""

import copy
import hashlib
import json
import sys
from contextlib import contextmanager
from pathlib import Path

from utils import card, quality
from utils.artifacts import open_cache, write_atomically
from utils.errors import UserError
from utils.memory import parse_size
from utils.memory_tiers import GIB, estimate
from utils.progress import say
from utils.prompts import count_images
from utils.steps import lora, memory

FORMAT = 2
OTHER_SEED = 1000  # added to the seed; no row reaches that many images


def load_or_make(pipeline, args, prompts: list[str], with_fp32: bool) -> tuple[dict, Path]:
    """Give the reference of these prompts, made now if it is not kept yet.

    `pipeline` must be untouched: plain diffusers in the run's own dtype. Where its transformer is
    to come from a GGUF file, or its weights wait on the host, the checkpoint is loaded once more.

    Returns: {"eager": Result, "fp32": Result or None, "other_seed_psnr_db": float}, and its file.
    """
    import torch

    identity = identity_of(args, prompts, with_fp32)
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    path = open_cache(args.cache_dir) / f"reference-{digest}.safetensors"
    if (found := _load(path, identity)) is not None:
        return found, path
    say("reference", f"plain diffusers, {len(prompts)} prompts, once; kept in {path.parent}")
    if args.gguf_file or args.load_device != args.device:
        pipeline = _load_plain(args, args.dtype)
    other = copy.copy(args)
    other.seed = args.seed + OTHER_SEED
    with lora.unfused(pipeline, args):
        eager = quality.run(pipeline, args, prompts)
        seed_db = quality.mean_psnr_db(quality.run(pipeline, other, prompts).images, eager.images)
    fp32 = None
    if with_fp32:
        exact = copy.copy(args)
        exact.dtype = torch.float32
        pipeline = _load_plain(args, exact.dtype)
        with lora.unfused(pipeline, exact), _noise_in(args.dtype, pipeline):
            fp32 = quality.run(pipeline, exact, prompts)
    made = {"eager": eager, "fp32": fp32, "other_seed_psnr_db": seed_db}
    _save(path, identity, made)
    return made, path


@contextmanager
def _noise_in(dtype, pipeline):
    """Let a pipeline start from the noise that one in another dtype draws.

    torch 2.11 draws other numbers in bf16 than in fp32 from the same seed; later ones round them.
    """
    module = sys.modules[type(pipeline).__module__]
    draw = module.randn_tensor

    def drawn(*shape, **how):
        return draw(*shape, **how | {"dtype": dtype}).to(how["dtype"])

    module.randn_tensor = drawn
    try:
        yield
    finally:
        module.randn_tensor = draw


def check_room(args) -> None:
    """Look whether fp32 fits beside the run's own weights, which stay on the device meanwhile.

    Raises: UserError if it does not; weights that wait on the host leave it room.
    """
    exact = copy.copy(args)
    exact.disable_bf16 = True
    needed = estimate(args, "full").weights / GIB + estimate(exact, "full").gib
    free = (parse_size(args.memory) or memory.free_bytes(args.device)) / GIB
    if args.load_device == args.device and needed > free:
        raise UserError(
            f"--fp32_reference: fp32 beside the run's own weights needs {needed:.1f} GiB, found "
            f"{free:.1f} GiB free; leave it out, or use --memory group"
        )


def identity_of(args, prompts: list[str], with_fp32: bool) -> dict:
    """Collect all that decides the pictures of plain diffusers."""
    import torch

    call, versions = card.call(args), card.versions()
    image = None
    if args.pil_image is not None:
        image = hashlib.sha256(args.pil_image.tobytes()).hexdigest()
    # On a CPU they decide the order of bf16's sums: 57 dB between one thread and two
    threads = {"threads": torch.get_num_threads()} if args.machine.device == "cpu" else {}
    return {
        "format": FORMAT,
        "weights": args.checkpoint.identity(args.cache_dir),
        "lora": args.plan[lora.NAME].settings,
        "kind": args.checkpoint.kind,
        "prompts": prompts,
        "image": image,
        "batch": count_images(args),
        "call": {key: value for key, value in call.items() if key not in ("prompt", "ckpt")},
        "with_fp32": with_fp32,
        "device": args.machine.name,
        **threads,  # a GPU's kept references stay what they are
        "versions": {key: versions.get(key) for key in ("torch", "diffusers", "transformers")},
    }


def _load_plain(args, dtype):
    """Load the checkpoint once more, with its own weights."""
    from utils.pipeline_utils import load_pipeline

    plain = copy.copy(args)
    plain.dtype, plain.gguf_file = dtype, None
    pipeline = load_pipeline(plain)
    if args.load_device != args.device:
        memory.place(pipeline, plain, "group")  # it fits nearly anywhere, and changes no bit
    return pipeline


def _save(path: Path, identity: dict, made: dict) -> None:
    """Write under a temporary name and rename: an interruption leaves nothing half-written."""
    import numpy as np
    import torch
    from safetensors.torch import save

    tensors = {}
    for name in ("eager", "fp32"):
        if made[name] is not None:
            pixels = np.stack([np.asarray(image) for image in made[name].images])
            tensors[f"{name}.images"] = torch.from_numpy(pixels)
            tensors[f"{name}.latents"] = made[name].latents.contiguous()
    about = {
        "identity": json.dumps(identity, sort_keys=True),
        "other_seed_psnr_db": json.dumps(made["other_seed_psnr_db"]),
    }
    write_atomically(path, save(tensors, metadata=about))


def _load(path: Path, identity: dict) -> dict | None:
    """Read a kept reference; None if there is none, it is damaged, or its identity is another."""
    from PIL import Image
    from safetensors import SafetensorError, safe_open

    if not path.exists():
        return None
    made = {"eager": None, "fp32": None}
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            if json.loads(about.get("identity", "null")) != json.loads(json.dumps(identity)):
                return None
            for name in made:
                if f"{name}.images" in file.keys():  # noqa: SIM118  not a dict
                    pixels = file.get_tensor(f"{name}.images").numpy()
                    images = [Image.fromarray(picture) for picture in pixels]
                    made[name] = quality.Result(images, file.get_tensor(f"{name}.latents"))
            made["other_seed_psnr_db"] = json.loads(about["other_seed_psnr_db"])
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        say("reference", f"{path.name} cannot be read ({error}) and is made again")
        return None
    return made


def scores(result: quality.Result, reference: dict, args, prompts: list[str]) -> dict:
    """Compare a row with the reference: pictures and latents against bf16 eager and fp32."""
    eager, fp32 = reference["eager"], reference["fp32"]
    found = {"prompts": len(prompts), **quality.compare(result, eager)}
    found["other_seed_psnr_db"] = reference["other_seed_psnr_db"]
    for name, value in (("fp32_relative_l2", result), ("eager_fp32_relative_l2", eager)):
        found[name] = fp32 and quality.relative_l2(value.latents, fp32.latents)
    found["checker_right"] = checker_share(result.images, args, prompts)
    if clip := getattr(args, "clip_score", None):
        found["clip_score"] = quality.clip_score(result.images, prompts, clip)
        found["eager_clip_score"] = quality.clip_score(eager.images, prompts, clip)
    dtype = str(args.dtype).removeprefix("torch.")
    found["reference"] = f"{dtype} eager" + (", fp32 eager" if fp32 else "")
    return found


def checker_share(images: list, args, prompts: list[str]) -> float | None:
    """Count the pictures that show what their prompt says; None but for trained tiny ones."""
    if args.checkpoint.source != "bundled" or args.random_weights:
        return None
    from tiny_flux.checker import check_image, read_image
    from tiny_flux.edits import obey
    from tiny_flux.scenes import parse

    if args.checkpoint.kind == "kontext":
        before = read_image(args.pil_image)
        scenes = [before and obey(prompt, before.scene) for prompt in prompts]
    else:
        scenes = [parse(prompt) for prompt in prompts]
    if None in scenes:
        return None  # not in the language of the tiny checkpoints
    right = [all(check_image(i, s).values()) for i, s in zip(images, scenes, strict=True)]
    return sum(right) / len(right)

"""From flags to a run: every default, every refusal, before any weight is loaded.

Cheap checks come first (numbers, names, paths: no torch), then the device, then each step's own.
Every problem that is found is reported, one line each.
"""

import struct
import time
from pathlib import Path

from utils import (
    acceleration,
    card,
    checkpoints,
    checks,
    guidance,
    hardware,
    peers,
    pipeline_utils,
    schedulers,
)
from utils.benchmark_utils import set_rand_seeds
from utils.errors import UserError
from utils.prompts import report_cut_prompts
from utils.random_weights import weights_gib
from utils.steps import compile, gguf, memory, quant

# Kontext's picture over the checkpoint's own area: its tokens join those of the image in every step
MAX_REFERENCE_AREA = 4


def prepare(args) -> None:
    """Fill in what the flags leave open and settle what each step will do, in place.

    Adds: what settle_call() adds, and args.plan (step name -> Verdict, in the order of STEPS).

    Raises: UserError with one line per problem.
    """
    settle_call(args)
    if args.random_weights and args.load_device == args.device:
        _check_room(args)
    args.plan = peers.plan(args) if getattr(args, "peer", None) else _plan(args)


def settle_call(args) -> None:
    """Fill in what the flags leave open of checkpoint, machine and call, in place.

    Adds: args.checkpoint, args.machine, args.dtype, args.pil_image, args.started, and what step
    memory settles.

    Raises: UserError with one line per problem.
    """
    args.started = card.started()
    if problems := [*call_problems(args), *checks.path_problems(args)]:
        raise UserError("\n".join(problems))
    schedulers.settle(args)
    args.ckpt_is_default = args.ckpt is None
    if not args.ckpt_is_default:
        args.checkpoint = checkpoints.resolve(args.ckpt, args.random_weights)

    import torch

    args.machine = hardware.detect(args.device)
    args.device = args.device or args.machine.device
    if args.ckpt_is_default:
        args.ckpt = checkpoints.DEFAULT_CKPT[args.machine.device]
        args.checkpoint = checkpoints.resolve(args.ckpt, args.random_weights)
    acceleration.settle(args)
    fill_in(args)
    args.dtype = torch.float32 if args.disable_bf16 else torch.bfloat16
    if problems := _kind_problems(args):
        raise UserError("\n".join(problems))
    args.pil_image = open_image(args)
    _settle_mode(args)


def call_problems(args) -> list[str]:
    """Say what is wrong with a call whatever the checkpoint: one line a problem."""
    return [*checks.number_problems(args), *guidance.problems(args), *schedulers.problems(args)]


def announce_and_load(args, without: tuple[str, ...] = ()) -> tuple:
    """Print what a settled run is, and load its pipeline, `without` some components.

    Returns: the pipeline, untouched by any step, and the seconds that loading took.
    """
    print(card.render(args), flush=True)
    set_rand_seeds(args.seed)
    start = time.perf_counter()
    pipeline = pipeline_utils.load_pipeline(args, without)
    load_s = time.perf_counter() - start
    report_cut_prompts(pipeline, args)
    return pipeline, load_s


def fill_in(args) -> None:
    """Set what the flags leave open of the call to the checkpoint's own."""
    defaults, size = args.checkpoint.defaults, args.checkpoint.native_size
    args.prompt = args.prompt or [args.checkpoint.prompt]
    args.height, args.width = args.height or size, args.width or size
    args.num_inference_steps = args.num_inference_steps or defaults.steps
    if args.guidance_scale is None:
        args.guidance_scale = defaults.guidance
    args.max_sequence_length = args.max_sequence_length or defaults.max_sequence_length
    args.text_tokens = args.max_sequence_length  # text_padding may need fewer


def _settle_mode(args) -> None:
    """Choose the memory tier, and with it the default of the compile mode."""
    typed_scope = args.compile_scope
    args.compile_scope = typed_scope or ("blocks" if args.cache_dit_config else "full")
    memory.settle(args)
    args.mode_reason = ""
    if args.compile_export_mode is None:
        mode = memory.default_mode(args)
        mode = mode or compile.default_mode(args.machine, bool(args.cache_dit_config))
        if mode[0] == "export_aoti" and gguf.is_compressed(args):
            mode = "compile", "the default with a compressed GGUF, which cannot be exported"
        if mode[0] == "export_aoti" and quant.precision(quant.check(args)) in quant.BLOCK_FORMATS:
            why = f"the default with --quant_dtype {args.quant_dtype}, which cannot be exported"
            mode = "compile", why
        args.compile_export_mode, args.mode_reason = mode
    if args.compile_export_mode == "disabled" and typed_scope:  # a ladder's rows share flags
        without = f"--compile_scope {typed_scope} has no effect"
        args.mode_reason = f"{args.mode_reason}; {without}" if args.mode_reason else without


def _kind_problems(args) -> list[str]:
    problems = []
    kind = args.checkpoint.defaults
    if args.checkpoint.kind == "fill" and not getattr(args, "mask", None):
        problems.append(
            f"--ckpt {args.ckpt}: fills the masked part of a picture: "
            "python -m extras.inpaint --image PICTURE --mask MASK"
        )
    if args.guidance_scale is not None and kind.guidance is None:
        problems.append(
            f"--guidance_scale {args.guidance_scale:g}: {args.checkpoint.name} has no guidance "
            "embedding; leave the flag out"
        )
    if args.image and not kind.takes_image:
        problems.append(
            f"--image {args.image}: {args.checkpoint.name} takes no image (Kontext does, "
            "such as --ckpt tiny-kontext)"
        )
    if kind.takes_image and not args.image:
        problems.append(f"--image: {args.checkpoint.name} edits an image, none was given")
    return problems


def open_image(args):
    """Open and resize Kontext's image now, outside of anything that is timed.

    Returns: a PIL image (RGB) of the size that Kontext would give it, or None
    Raises: UserError for what is no picture, or too large for a checkpoint that resizes none.
    """
    if not args.image:
        return None
    from PIL import Image

    image = read_picture("--image", args.image)
    width, height = image.size
    if args.checkpoint.native_size >= 1024:  # trained at these sizes of about 1 Mpixel
        from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

        ratio = width / height
        width, height = min(
            PREFERRED_KONTEXT_RESOLUTIONS, key=lambda wh: abs(ratio - wh[0] / wh[1])
        )
    elif width * height > MAX_REFERENCE_AREA * args.checkpoint.native_size**2:
        raise UserError(_too_large(args, width, height))
    size = tuple(max(16, edge // 16 * 16) for edge in (width, height))
    return image.resize(size, Image.Resampling.LANCZOS)


def _too_large(args, width: int, height: int) -> str:
    """Refuse a picture that such a checkpoint would take as it is, and give a size that fits."""
    edge = args.checkpoint.native_size
    scale = edge / (width * height) ** 0.5
    fitting = "x".join(str(max(16, round(side * scale / 16) * 16)) for side in (width, height))
    return (
        f"--image {args.image}: found {width}x{height} pixels, expected at most "
        f"{MAX_REFERENCE_AREA} times the {edge}x{edge} of {args.checkpoint.name}, which takes them "
        f"as they are; scale the picture down, to {fitting} for instance"
    )


def to_rgb(image):
    """Convert to RGB; of grey with 16 bits the upper 8, where PIL makes all above 255 white."""
    if image.mode.startswith("I"):
        image = image.point(lambda level: level * (1 / 256), "L")
    return image.convert("RGB")


# What PIL's decoders raise for a broken file, beside UnidentifiedImageError, an OSError
BROKEN = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError)
BROKEN += (struct.error, NotImplementedError)


def read_picture(flag: str, path: str):
    """Read the picture that a flag names, as it is meant to be seen.

    Returns: a PIL image (RGB)
    Raises: UserError for what is no picture, or a broken one.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            return to_rgb(ImageOps.exif_transpose(opened))  # phones store rotated pictures
    except UnidentifiedImageError:
        size = Path(path).stat().st_size
        raise UserError(f"{flag} {path}: not an image ({size} bytes found)") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{flag} {path}: cannot be read ({why})") from None


def _check_room(args) -> None:
    """Refuse to build more weights than the device has memory, before it is filled."""
    needed, found = weights_gib(args.checkpoint, args.dtype), args.machine.memory_gib
    if needed > found:
        raise UserError(
            f"--random_weights: {args.ckpt} needs {needed:.1f} GiB for its weights alone, found "
            f"{found:.1f} GiB on {args.machine.short()}; use a larger --device, or --ckpt "
            f"{checkpoints.DEFAULT_CKPT['cpu']}"
        )


def ask_steps(args) -> dict:
    """Ask every step for its verdict on a settled call, by name and in order."""
    return {step.NAME: step.check(args) for step in pipeline_utils.STEPS}


def _plan(args) -> dict:
    """Ask every step, then stop if any refuses or a required one cannot run."""
    plan = ask_steps(args)
    problems = [verdict.reason for verdict in plan.values() if verdict.state == "refused"]
    for name in args.require or ():
        if name not in plan:
            problems.append(f"--require {name}: unknown step (expected one of {', '.join(plan)})")
        elif not plan[name].is_on and plan[name].state != "refused":
            verdict = plan[name]
            problems.append(f"--require {name}: {verdict.state}: {verdict.reason}")
    if problems:
        raise UserError("\n".join(problems))
    return plan

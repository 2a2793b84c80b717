"""Where the weights are while they are not used: tiers for small GPUs, chosen by what is free.

After everything that changes weights, before what compiles them. Each tier does what the one
before does, and more:

full        all weights stay on the device
encoders    T5 and CLIP are on the host and pass through the device layer by layer, once a call
tiled       the VAE works on one image at a time, in overlapping tiles of half the native size
group       the transformer's blocks pass through the device in every step, the next one while the
            last one computes (streams, CUDA only)
sequential  the same layer by layer: the least memory, the most transfers

The hooks are diffusers' group offloading. They change where weights are, never a number. Tiles do,
if a picture is larger than one of them; all else gives the same bits in every tier. Weights are
loaded, fused and quantised on the host then, so loading never needs more than the run.
"""

import argparse
from contextlib import contextmanager

from utils import card, embeddings
from utils.errors import UserError
from utils.gguf_file import read_header
from utils.memory import free_bytes, parse_size
from utils.memory_tiers import OFFLOADED, ON_A_CPU, TIERS, TILED, TILES, estimate
from utils.prompts import count_images
from utils.steps import Verdict, gguf, off, on, quant, refused, text_quant

NAME = "memory"
AFTER = ("quant", "text_quant")
PARTS = ("pipeline",)
NOT_TRIED = ("fused_kernels", "triton_float8", "swap_loras")  # with weights that move


def _tier_or_size(text: str) -> str:
    # A number alone, such as 24, means bytes to parse_size(), and GiB to who types it here
    if text in ("auto", *TIERS) or (not text[-1:].isdigit() and parse_size(text)):
        return text
    names = ", ".join(("auto", *TIERS))
    raise argparse.ArgumentTypeError(f"found {text!r}, expected {names}, or a size such as 10GiB")


def add_flags(parser) -> None:
    """Add the tier."""
    parser.add_argument(
        "--memory",
        type=_tier_or_size,
        default="auto",
        metavar="TIER",
        help=f"auto (by the free memory), {', '.join(TIERS)}, or a size such as 10GiB (auto, as if "
        "that were free)",
    )


def settle(args) -> None:
    """Choose the tier and where weights are loaded to, before the plan is made.

    Adds: args.tier, args.load_device, args.memory_why, args.memory_estimate, args.memory_problem.
    """
    args.memory_problem, args.memory_why = "", ""
    compressed = None
    if gguf.is_compressed(args) and gguf.check(args).is_on:
        compressed = read_header(gguf.local_file(args.gguf_file)).bytes
    linear = "" if compressed else quant.precision(quant.check(args))
    text = quant.precision(text_quant.check(args))
    loaded = not embeddings.are_known(args)
    found = {tier: estimate(args, tier, linear, compressed, text, loaded) for tier in TIERS}
    free = parse_size(args.memory) or free_bytes(args.device)
    args.tier = args.memory if args.memory in TIERS else "full"
    if args.memory not in TIERS and not getattr(args, "peer", None):
        on_cpu = args.machine.device == "cpu"
        fitting = [t for t in (ON_A_CPU if on_cpu else TIERS) if found[t].gib * 2**30 <= free]
        args.tier = fitting[0] if fitting else (ON_A_CPU if on_cpu else TIERS)[-1]
        seen = "as --memory says" if args.memory != "auto" else "free"
        args.memory_why = f"{free / 2**30:.1f}GiB {seen}"
        if not fitting:
            smaller = "" if compressed else ", a --gguf_file of fewer bits"
            least = f"{found[args.tier].gib:.1f} GiB (tier {args.tier})"
            args.memory_problem = (
                f"--memory {args.memory}: the least that this call needs is {least}, found "
                f"{free / 2**30:.1f} GiB; use {_less(args)}{smaller}, or --memory {args.tier} to "
                "try it all the same"
            )
    args.memory_estimate = found[args.tier]
    # Unquantised weights are on the device at once while it is quantised there
    loading = estimate(args, "full", "", compressed, "", loaded).gib * 2**30
    named = args.memory == "full" or getattr(args, "peer", None)
    resident = args.tier == "full" and (named or loading <= free)
    args.load_device = args.device if resident else "cpu"


def _less(args) -> str:
    """Name what makes a call smaller: images first, where there are several."""
    size = "a smaller --height and --width"
    return f"fewer images at once, {size}" if count_images(args) > 1 else size


def check(args) -> Verdict:
    """Say what the step will do in this run, or what does not go together with its tier."""
    if args.memory_problem:
        return refused(args.memory_problem)
    if args.tier == "full" and args.load_device == args.device:
        return off("everything stays on the device")
    if problem := _conflict(args):
        why = f" (chosen: {args.memory_why})" if args.memory_why else ""
        return refused(f"--memory {args.tier}{why}: {problem}")
    lossless = args.tier not in TILED or max(args.height, args.width) <= tile_edge(args)
    return on(lossless=lossless, tier=args.tier, estimate=str(args.memory_estimate))


def _conflict(args) -> str:
    mode, tier = args.compile_export_mode, args.tier
    if tier != "full" and args.compile_text_encoders:
        return "the text encoders' weights come and go; leave out --compile_text_encoders"
    if tier in OFFLOADED and mode != "disabled":
        return (
            "the transformer's weights come and go, which neither one compiled graph nor a CUDA "
            "graph survives; use --compile_export_mode disabled"
        )
    if tier in OFFLOADED and args.modulation_once:
        return (
            "--modulation_once calls the modulation outside of the forward that brings its "
            "weights; leave it out"
        )
    for flag in NOT_TRIED:
        if tier in OFFLOADED and getattr(args, flag):
            return f"--{flag} is not tried with weights that move; leave it out"
    if tier in OFFLOADED and quant.precision(quant.check(args)) in quant.BLOCK_FORMATS:
        return f"--quant_dtype {args.quant_dtype} is not tried with weights that move; leave it out"
    if tier in OFFLOADED and args.cache_dit_config:
        return "a step cache is not tried with weights that move; leave out --cache_dit_config"
    if tier in TILED and mode == "export_aoti":
        return (
            "tiles are of several sizes, and the first call exports one package a component; use "
            "--compile_export_mode compile"
        )
    return ""


def default_mode(args) -> tuple[str, str] | None:
    """Give the compile mode that a tier asks for, and the reason; None where it asks for none."""
    if args.tier in OFFLOADED:
        return "disabled", f"the default with --memory {args.tier}: weights move"
    if args.tier in TILED and args.machine.device != "cpu":
        return "compile", f"the default with --memory {args.tier}: tiles of several sizes"
    return None


def tile_edge(args) -> int:
    """Give the edge of a tile. Units: pixels"""
    return args.checkpoint.native_size // TILES


def apply(pipeline, args) -> None:
    """Put the weights where the tier has them."""
    place(pipeline, args, args.tier)
    if args.tier in TILED:
        vae, edge = pipeline.vae, tile_edge(args)
        vae.enable_slicing()
        vae.enable_tiling()
        vae.tile_sample_min_size = edge
        vae.tile_latent_min_size = edge // 2 ** (len(vae.config.block_out_channels) - 1)


def place(pipeline, args, tier: str) -> None:
    """Move the weights, or put hooks on the components that will move them."""
    import torch
    from diffusers.hooks import apply_group_offloading

    if tier == "full":
        pipeline.to(args.device)
        return
    how = {
        "onload_device": torch.device(args.device),
        "offload_device": torch.device("cpu"),
        "use_stream": args.machine.device == "cuda",
    }
    pipeline.vae.to(args.device)  # 0.2 GiB
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        if encoder is not None:  # the embeddings are there already
            apply_group_offloading(encoder, offload_type="leaf_level", **how)
    if tier == "group":
        blocks = {"offload_type": "block_level", "num_blocks_per_group": 1}
        apply_group_offloading(pipeline.transformer, **blocks, **how)
    elif tier == "sequential":
        apply_group_offloading(pipeline.transformer, offload_type="leaf_level", **how)
    else:
        pipeline.transformer.to(args.device)


@contextmanager
def out_of_memory_explained(args):
    """Turn running out of memory into one line with the next tier's command.

    Raises: UserError in place of the allocator's error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # CUDA's OutOfMemoryError is a RuntimeError
        found = f"{type(error).__name__}: {error}".splitlines()[0][:160]
        settled = hasattr(args, "tier")
        if not settled or not (isinstance(error, MemoryError) or _is_out_of_memory(error)):
            raise
    else:
        return
    raise UserError(f"out of memory in tier {args.tier} ({found}); {_next(args)}")


def _is_out_of_memory(error: Exception) -> bool:
    known = ("can't allocate memory", "out of memory", "Cannot allocate memory")
    return type(error).__name__ == "OutOfMemoryError" or any(k in str(error) for k in known)


def _next(args) -> str:
    tiers = ON_A_CPU if args.machine.device == "cpu" else TIERS
    lower = tiers[tiers.index(args.tier) + 1 :] if args.tier in tiers else ()
    if not lower:
        return f"no tier needs less: use {_less(args)}, or a --gguf_file"
    return f"next: {card.command()} --memory {lower[0]}"  # the last --memory is the one that counts

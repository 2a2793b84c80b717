"""Other projects on the very same call, measured like a row of ours: run_benchmark.py --peer NAME

A peer takes the place of `optimize()`; weights, prompt, seed, size, warm-up, timing, memory and
quality are those of every other row. `--peers` is the series: ours and every peer, one process
each, taking turns with `--rounds`.

Source: https://huggingface.co/docs/diffusers/optimization/fp16 for the recipes of diffusers
"""

from utils import flux_fast, pipeline_utils
from utils.errors import UserError
from utils.steps import (
    Verdict,
    compile,
    import_problem,
    inductor_tuning_flags,
    off,
    on,
    unavailable,
)

PEERS = ("diffusers-eager", "diffusers-compile", "diffusers-fa3", "flux-fast")


def lacking(name: str, machine) -> str:
    """Say what the hardware lacks for a peer; "" if nothing."""
    if name == "diffusers-fa3" and not machine.is_hopper:
        return f"FlashAttention-3 needs a Hopper GPU, found {machine.short()}"
    return ""


def _problem(args) -> str:
    if args.cache_dit_config or args.step_mask:
        return "no peer has a step cache here; leave out --cache_dit_config and --step_mask"
    if args.gguf_file:
        return "a peer has the checkpoint's own weights; leave out --gguf_file"
    if found := lacking(args.peer, args.machine):
        return found
    if args.peer == "flux-fast":
        return flux_fast.problem(args)
    if args.peer == "diffusers-fa3" and (found := import_problem("fa3_fwd_interface")):
        return f"found {found}; pip install fa3-fwd==0.0.3"
    return ""


def plan(args) -> dict[str, Verdict]:
    """Say in the words of our own steps what a peer does; a step that it lacks is off.

    Raises: UserError if the peer cannot make this call.
    """
    if problem := _problem(args):
        raise UserError(f"--peer {args.peer}: {problem}")
    args.modulation_once = False  # ours alone
    does = _flux_fast(args) if args.peer == "flux-fast" else _diffusers(args)
    steps = (step.NAME for step in pipeline_utils.STEPS)
    return {name: does.get(name, off(f"not in {args.peer}")) for name in steps}


def _diffusers(args) -> dict[str, Verdict]:
    if args.peer == "diffusers-eager":
        return {}
    mode = {"mode": "max-autotune"} if compile.compiler_mode(args) else {}  # minutes on a CPU
    does = {"fused_projections": on(), "channels_last": on()}
    does["compile"] = on(scope=args.compile_scope, fullgraph=True, **mode)
    if args.peer == "diffusers-fa3":
        does["fa3"] = on(backend="fa3", dtype="bf16", package="fa3_fwd_interface")
    return does


def _flux_fast(args) -> dict[str, Verdict]:
    own = flux_fast.flags(args)
    fp8 = on(lossless=False, backend="fa3", dtype="fp8", package="fa3_fwd_interface", scale="none")
    does = {
        "fused_projections": on(),
        "fa3": fp8,
        "channels_last": on(),
        "quant": on(lossless=False, granularity="tensor", filter="all", dtype="e4m3fn"),
        "inductor_tuning_flags": on(**inductor_tuning_flags.FLAGS),
    }
    for name in does:
        if getattr(args, f"disable_{name}"):
            does[name] = off(f"--disable_{name}")
        elif own[f"disable_{name}"]:
            does[name] = unavailable(
                f"{args.peer} has it for GPUs only, found {args.machine.short()}"
            )
    mode = own["compile_export_mode"]
    if mode == "disabled":
        does["inductor_tuning_flags"] = off("--compile_export_mode disabled")
    if mode == "compile":
        does["compile"] = on(scope="full", fullgraph=True, mode="max-autotune")
    elif mode == "export_aoti":
        does["export_aoti"] = on(max_autotune=True)
    return does


def about(args) -> dict:
    """Give what a row keeps of a peer beside its steps; empty for a row of ours."""
    if not getattr(args, "peer", None):
        return {}
    about = {"name": args.peer}
    if args.peer == "flux-fast":
        edits = [f"{flux_fast.SOURCE}:{edit.line}: {edit.why}" for edit in flux_fast.EDITS]
        about |= {"revision": flux_fast.REVISION, "mended": edits}
    return {"peer": about}


def optimize(pipeline, args):
    """Apply what a row is about: the peer's optimisations, or, without a peer, our steps."""
    if not getattr(args, "peer", None):
        return pipeline_utils.optimize(pipeline, args)
    if args.peer == "flux-fast":
        return flux_fast.apply(pipeline, args)
    if args.peer != "diffusers-eager":
        _compile_diffusers(pipeline, args)
    return pipeline


def _compile_diffusers(pipeline, args) -> None:
    """Follow diffusers' guide: fused QKV, channels-last, FA3 by its switch, torch.compile."""
    import torch

    transformer, vae = pipeline.transformer, pipeline.vae
    transformer.fuse_qkv_projections()
    vae.fuse_qkv_projections()
    transformer.to(memory_format=torch.channels_last)
    vae.to(memory_format=torch.channels_last)
    if args.peer == "diffusers-fa3":
        _let_diffusers_find_fa3()
        transformer.set_attention_backend("_flash_3")
    settings = args.plan["compile"].settings
    how = {key: settings[key] for key in ("fullgraph", "mode") if key in settings}
    if settings["scope"] == "blocks":
        transformer.compile_repeated_blocks(fullgraph=True)  # the guide names no mode here
    else:
        pipeline.transformer = torch.compile(transformer, **how)
    vae.decode = torch.compile(vae.decode, **how)


def _let_diffusers_find_fa3() -> None:
    """diffusers looks for the name under which FA3 builds itself; fa3-fwd has its own."""
    import fa3_fwd_interface
    from diffusers.models import attention_dispatch

    attention_dispatch.flash_attn_3_func = fa3_fwd_interface.flash_attn_func
    attention_dispatch._CAN_USE_FLASH_ATTN_3 = True

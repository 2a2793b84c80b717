"""The table of contents: load a FLUX.1 pipeline, apply every optimisation in order, make images.

args = create_parser().parse_args()     # utils/benchmark_utils.py
prepare(args)                           # utils/prepare.py: defaults, and every refusal
pipeline = optimize(load_pipeline(args), args)
images = generate(pipeline, args)
"""

import re

from utils import guidance, random_weights, schedulers
from utils.errors import UserError
from utils.prompts import count_images
from utils.quiet import heard, no_bars_without_terminal
from utils.steps import (
    PARTS,
    cache_dit,
    channels_last,
    compile,
    conv_algorithms,
    deferred_scales,
    device_images,
    export_aoti,
    fa3,
    fused_kernels,
    fused_mlp,
    fused_projections,
    fusion_limits,
    gguf,
    group_norm,
    image_encoder,
    inductor_tuning_flags,
    loop_graph,
    lora,
    memory,
    modulation,
    persistent_tma,
    quant,
    static_scales,
    step_mask,
    subpixel_upsampling,
    text_encoders,
    text_padding,
    text_quant,
    triton_float8,
    vae_attention,
)

STEPS = (
    gguf,  # the weights themselves: all below reads them
    lora,  # added to them
    fused_projections,  # fused matrices must exist before anything reads them
    fused_mlp,  # joins one of those with another
    fa3,  # calls the projections, fused or not
    fused_kernels,  # feeds the attention op above and the float8 products below
    vae_attention,  # calls the VAE's projections
    subpixel_upsampling,  # new weights, laid out by the next
    channels_last,  # compilation specialises on strides
    group_norm,  # made for that layout
    conv_algorithms,  # chosen for that layout
    cache_dit,  # wraps the blocks that are compiled below
    modulation,  # takes linear layers out of the blocks before they are quantised
    text_padding,  # decides how many text tokens all below is made for
    quant,  # after fusion, so that each fused matrix is quantised once
    text_quant,  # the same for T5
    deferred_scales,  # moves the scales and biases of the float8 products
    persistent_tma,  # moves the biases of the float8 products
    triton_float8,  # or takes those products over
    static_scales,  # lets some of those write float8
    memory,  # moves the final weights to where they stay, or puts hooks on them
    device_images,  # follows the decoder; the calls below warm it up
    inductor_tuning_flags,  # read when the compiler runs
    fusion_limits,  # the same
    text_encoders,  # warmed up by the calls of the two below
    image_encoder,  # one component more for the two below
    compile,  # freezes everything above ...
    export_aoti,  # ... or this does: one of the two, or neither
    loop_graph,  # decides only how that forward is queued
    step_mask,  # decides only whether that forward is called
)


def load_pipeline(args, without: tuple[str, ...] = ()):
    """Load or build the pipeline of `args.checkpoint`, bf16 unless turned off.

    It is on its device, or on the host if step `memory` is to place it. Components of stored
    weights that are named in `without` are None.

    Returns: diffusers.FluxPipeline or FluxKontextPipeline, unchanged by any step.
    Raises: UserError if the weights are missing, damaged or not to be had.
    """
    no_bars_without_terminal()
    if args.checkpoint.random_weights:
        pipeline = random_weights.build(args.checkpoint, args.dtype, args.load_device, args.seed)
    else:
        pipeline = _from_pretrained(args, without).to(args.load_device)
    schedulers.install(pipeline, args)
    pipeline.set_progress_bar_config(disable=None, leave=False)
    return pipeline


def _from_pretrained(args, without: tuple[str, ...]):
    """Load the weights of a checkpoint, all of them: both libraries go on with a part.

    What is missing diffusers leaves without memory, and transformers draws at random. What the
    file has beyond the config (a block more, say) both leave out with a warning.
    """
    import diffusers
    from safetensors import SafetensorError

    cls = getattr(diffusers, args.checkpoint.defaults.pipeline)
    source = args.checkpoint.path or args.checkpoint.name
    absent = (*without, "transformer") if args.gguf_file else without  # step gguf brings it
    try:
        with heard("transformers.modeling_utils", "diffusers.models.modeling_utils") as warned:
            pipeline = cls.from_pretrained(source, dtype=args.dtype, **dict.fromkeys(absent))
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        what = " ".join(str(error).split())
        raise UserError(f"--ckpt {args.ckpt}: cannot be loaded: {what[:300]}") from error
    said = "\n".join(warned)
    missing = re.findall(r"(?m)^(.+?) *\|.*MISSING", said)
    for part in filter(None, (pipeline.transformer, pipeline.vae)):
        missing += [name for name, tensor in part.named_parameters() if tensor.is_meta]
    if missing:
        raise UserError(
            f"--ckpt {args.ckpt}: cannot be loaded: {len(missing)} of its weights are missing "
            f"({missing[0]}, ...)"
        )
    extra = re.findall(r"(?m)^(.+?) *\|.*UNEXPECTED", said)
    for names in re.findall(r"were not used when initializing \w+: \s*\['(.*)'\]", said):
        extra += sorted(names.split(", "))
    if extra:
        raise UserError(
            f"--ckpt {args.ckpt}: cannot be loaded: {len(extra)} of its weights have no place in "
            f"its configs ({extra[0]}, ...)"
        )
    return pipeline


def optimize(pipeline, args, parts: tuple[str, ...] = PARTS):
    """Apply every step of the plan that is on, in order; the pipeline is changed in place.

    `parts`: of a pipeline that is not whole, what is there; steps that change none of it are left
    out.
    """
    for step in STEPS:
        if args.plan[step.NAME].is_on and set(step.PARTS) & set(parts):
            step.apply(pipeline, args)
    return pipeline


def reused_steps(pipeline, args) -> dict[str, list[int]] | None:
    """Tell which steps of the last call were computed and which reused; None without a cache."""
    return cache_dit.last_call(pipeline, args) or step_mask.last_call(pipeline, args)


def generate(pipeline, args, num_inference_steps: int | None = None, output_type: str = "pil"):
    """Run the call that `args` describes: prompts, seeds, size, guidance and text length.

    Image k has its own CPU generator, seeded `seed + k`, so that a batch equals its single images.

    Returns: a list of PIL images, or with output_type="latent" a tensor (B, image tokens, 64).
    """
    import torch

    seeds = range(args.seed, args.seed + count_images(args))
    call = {
        "prompt": args.prompt,
        "height": args.height,
        "width": args.width,
        "num_inference_steps": num_inference_steps or args.num_inference_steps,
        "max_sequence_length": args.max_sequence_length,
        "num_images_per_prompt": args.num_images_per_prompt,
        "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        "output_type": output_type,
        **guidance.call(args),
        **schedulers.call(args),
    }
    if args.guidance_scale is not None:
        call["guidance_scale"] = args.guidance_scale
    if args.pil_image is not None:
        # Resized already (prepare.py). Without max_area Kontext stretches any size to 1 Mpixel.
        call |= {"image": args.pil_image, "_auto_resize": False}
        call |= {"max_area": args.height * args.width}
    with torch.no_grad():
        return pipeline(**call).images

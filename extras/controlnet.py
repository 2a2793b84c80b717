"""Let a picture say where: python -m extras.controlnet --controlnet NET --control_image in.png

FluxControlNetPipeline; with --image its image-to-image form, with --mask as well its inpainting.
Several nets at once add up (FluxMultiControlNetModel); a union net takes --control_mode. A
ControlNet is made of the transformer's own blocks and runs in every step, so the steps of
`optimize()` that change blocks are applied to it too: QKV fusion, attention, fused kernels, float8,
torch.compile and its CUDA graph. Packages (export_aoti) hold transformer and decoder alone, and are
refused rather than leaving it eager.
"""

from types import SimpleNamespace

from extras import controls, derived
from extras.inpaint import read_mask
from utils.benchmark_utils import create_parser
from utils.errors import UserError, run_script
from utils.prompts import count_images


def parse(argv: list[str] | None = None):
    """Read the flags of gen_image.py and those of this command."""
    parser = create_parser("Make images whose layout a picture says, with every optimisation on.")
    controls.add_flags(parser)
    add = parser.add_argument_group("with a picture to begin with (--image)").add_argument
    add("--mask", help="redraw only its white part")
    add("--strength", type=float, help="noise added: above 0, up to 1 (0.6, with --mask 1)")
    return parser.parse_args(argv)


def load(args) -> tuple:
    """Settle the run, print its card, load, derive, and give the nets the steps of their blocks.

    Returns: the pipeline, untouched by any step itself, and the seconds that loading took.
    """
    from extras import preprocess
    from utils.prepare import announce_and_load, prepare
    from utils.random_weights import configs_of

    wanted = controls.read_controls(args)
    derived.refuse_own_loops(args, "ControlNets")
    derived.refuse_kinds(args, ("schnell", "dev"))
    _choose_mode(args)
    preprocess.check({control.kind for control in wanted}, args.depth_model)
    read = controls.pictures(wanted)
    name, beginning = _begin_with(args, read)
    derived.refuse_foreign(args, name)
    prepare(args)
    controls.check_nets(wanted, configs_of(args.checkpoint)["transformer"], args.ckpt)
    args.also = getattr(args, "also", {}) | {
        "controls": "; ".join(
            f"{c.net} {c.scale:g} by {c.kind} of {c.picture}"
            + ("" if c.mode is None else f", mode {c.mode}")
            for c in wanted
        ),
        "controlled": f"{args.control_guidance_start:g}-{args.control_guidance_end:g}",
    }
    nets = load_nets(wanted, args)  # a damaged one is found before the larger weights are read
    images = controls.control_images(wanted, read, args)
    pipeline, load_s = announce_and_load(args)
    call = arguments(wanted, images) | beginning(args)
    call |= {
        "control_guidance_start": args.control_guidance_start,
        "control_guidance_end": args.control_guidance_end,
    }
    pipeline = derived.derive(pipeline, args, name, {"controlnet": joined(wanted, nets)}, **call)
    optimize_nets(pipeline, nets, args)
    return pipeline, load_s


def _choose_mode(args) -> None:
    """Compile where gen_image.py would export; refuse what cannot hold a ControlNet."""
    from utils.hardware import detect

    if args.compile_export_mode == "export_aoti":
        raise UserError(
            "--compile_export_mode export_aoti: packages hold the transformer and the decoder "
            "alone, and the ControlNet would stay eager; use --compile_export_mode compile"
        )
    if args.compile_export_mode is None and detect(args.device).device == "cuda":
        args.compile_export_mode = "compile"


def _begin_with(args, read: list) -> tuple:
    """Read --image and --mask, or take the size of the first control picture.

    Returns: the pipeline's name, and a function of the settled run that gives its arguments
    """
    if not args.image:
        for flag in ("mask", "strength"):
            if getattr(args, flag) is not None:
                raise UserError(f"--{flag} {getattr(args, flag)}: expected with --image")
        derived.fit(args, read[0])
        return "FluxControlNetPipeline", lambda args: {}
    image = derived.read_image(args)
    mask = read_mask(args.mask, image.size) if args.mask else None
    if args.strength is None:
        args.strength = 0.6 if mask is None else 1.0
    derived.check_strength(args.strength)
    args.also |= {"strength": args.strength} | ({"mask": args.mask} if mask else {})

    def beginning(args) -> dict:
        images = [derived.to_size(image, args)] * count_images(args)
        masked = {"mask_image": derived.to_mask(mask, args)} if mask else {}
        return {"image": images, "strength": args.strength} | masked

    return f"FluxControlNet{'Inpaint' if mask else 'Img2Img'}Pipeline", beginning


def load_nets(wanted: list[controls.Control], args) -> dict:
    """Load every ControlNet once, on the run's device in its dtype.

    Raises: UserError if one cannot be loaded.
    """
    nets = {}
    for name in {control.net: None for control in wanted}:
        if name == controls.EDGES:
            from tiny_flux.controlnet import build

            net = build(args.dtype)
        else:
            net = _from_pretrained(name, args.dtype)
        # diffusers names the repeated blocks of the transformer only
        net._repeated_blocks = ["FluxTransformerBlock", "FluxSingleTransformerBlock"]
        nets[name] = net.to(args.device).eval()
    return nets


def _from_pretrained(name: str, dtype):
    """Load a net's weights, all of them: diffusers goes on with a part."""
    from diffusers import FluxControlNetModel
    from safetensors import SafetensorError

    problem = f"--controlnet {name}: cannot be loaded:"
    try:
        net, found = FluxControlNetModel.from_pretrained(
            name, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"{problem} {' '.join(str(error).split())[:300]}") from error
    wrong = {"missing_keys": "are missing", "unexpected_keys": "have no place in its config"}
    for keys, what in wrong.items():
        if names := sorted(found[keys]):
            raise UserError(f"{problem} {len(names)} of its weights {what} ({names[0]}, ...)")
    return net


def joined(wanted: list[controls.Control], nets: dict):
    """Give the one net, or all of them as diffusers adds them up."""
    from diffusers import FluxMultiControlNetModel

    if len(wanted) == 1:
        return nets[wanted[0].net]
    return FluxMultiControlNetModel([nets[control.net] for control in wanted])


def arguments(wanted: list[controls.Control], images: list) -> dict:
    """Give the controls as the pipelines take them: bare for one, lists for several."""
    if len(wanted) == 1:
        mode = {} if wanted[0].mode is None else {"control_mode": wanted[0].mode}
        return {
            "control_image": images[0],
            "controlnet_conditioning_scale": wanted[0].scale,
        } | mode
    return {
        "control_image": images,
        "controlnet_conditioning_scale": [control.scale for control in wanted],
        "control_mode": [control.mode for control in wanted],
    }


def optimize_nets(pipeline, nets: dict, args) -> None:
    """Apply the steps that change blocks to every net, and name the nets for the compiler."""
    from utils.pipeline_utils import optimize

    for net in nets.values():
        optimize(SimpleNamespace(transformer=net, vae=None), args, ("blocks",))
    pipeline.further = {f"controlnet_{k}": net for k, net in enumerate(nets.values())}


def main() -> None:
    """Parse, check, load, optimise, generate, save."""
    derived.make_pictures(parse(), load)


if __name__ == "__main__":
    run_script(main)

"""Other FLUX pipelines over the loaded one's weights, so that `optimize()` has one set to act on.

A derived pipeline takes exactly the calls of `generate()`: what is its own (pictures, mask,
strength, ControlNets) is bound to it beforehand. So every step warms up, records and exports with
the run's real call, and the rest of the stack need not know which pipeline it is.
"""

from utils import checkpoints
from utils.errors import UserError
from utils.prepare import read_picture
from utils.quiet import quiet_libraries
from utils.schedulers import SOLVERS

MOST_PIXELS = 2**20  # FLUX.1's own area: a larger picture without --height and --width is shrunk
OWN_LOOPS = {  # flag -> why it needs FluxPipeline's own loop
    "modulation_once": "its loop is FluxPipeline's, which starts from noise and adds nothing",
    "step_mask": "its mask counts the steps of FluxPipeline's loop, of which others leave some out",
    "cache_dit_config": "its cache counts the steps of FluxPipeline's loop, and knows no additions "
    "to the blocks",
}


def make_pictures(args, load) -> None:
    """Run a command: `load(args)` gives its pipeline; the rest is as in gen_image.py."""
    quiet_libraries()
    from gen_image import produce

    produce(*load(args), args)


def refuse_own_loops(args, what: str) -> None:
    """Refuse the steps that replace or count the loop of FluxPipeline.

    Raises: UserError with one line per flag.
    """
    lines = [
        f"--{flag}: not for {what}: {why}; leave it out"
        for flag, why in OWN_LOOPS.items()
        if getattr(args, flag)
    ]
    if lines:
        raise UserError("\n".join(lines))


def refuse_foreign(args, name: str) -> None:
    """Refuse what FluxPipeline takes and another pipeline of diffusers does not.

    Raises: UserError naming the pipeline.
    """
    import inspect

    import diffusers

    if SOLVERS[args.scheduler or "euler"].config:  # diffusion solvers, told to follow a flow
        raise UserError(
            f"--scheduler {args.scheduler}: diffusers' {name} hands the solver noise levels, and "
            "asks it to add noise, which this one cannot; use euler or heun"
        )
    taken = inspect.signature(getattr(diffusers, name).__call__).parameters
    if args.true_cfg_scale is not None and "negative_prompt" not in taken:
        raise UserError(
            f"--true_cfg_scale {args.true_cfg_scale:g}: diffusers' {name} takes no negative "
            "prompt; leave out --true_cfg_scale and --negative_prompt"
        )


def refuse_kinds(args, kinds: tuple[str, ...]) -> str:
    """Give the kind of checkpoint that --ckpt names; refuse those that are not for this command.

    Raises: UserError naming the command that is.
    """
    if args.ckpt is None:
        return "schnell"  # of both defaults
    kind = checkpoints.resolve(args.ckpt, args.random_weights).kind
    if kind not in kinds:
        other = {
            "kontext": "python gen_image.py --image",
            "fill": "python -m extras.inpaint --mask",
        }
        raise UserError(
            f"--ckpt {args.ckpt}: found a {kind} checkpoint, expected {' or '.join(kinds)}; this "
            f"one goes with {other[kind]}"
        )
    return kind


def check_strength(strength: float) -> None:
    """Refuse a strength that leaves no step, or is no share.

    Raises: UserError
    """
    if not 0 < strength <= 1:
        raise UserError(f"--strength {strength:g}: expected more than 0 and at most 1")


def steps_taken(steps: int, strength: float) -> int:
    """Count the steps that a call of this strength takes, as diffusers' get_timesteps does."""
    return steps - int(max(steps - min(steps * strength, steps), 0))


def read_image(args):
    """Read --image, take it from the flags, and let it decide the size that they leave open.

    Returns: a PIL image (RGB), as large as it is
    Raises: UserError without one, or for one that cannot be read.
    """
    if not args.image:
        raise UserError("--image: none was given, expected the picture to start from")
    image = read_picture("--image", args.image)
    args.also = {"image": args.image, **getattr(args, "also", {})}
    args.image = None  # the flag is Kontext's from here on
    fit(args, image)
    return image


def fit(args, image) -> None:
    """Let a picture decide the edges that --height and --width leave open."""
    shrink = min(1.0, (MOST_PIXELS / (image.width * image.height)) ** 0.5)
    if args.height and not args.width:
        shrink = args.height / image.height
    elif args.width and not args.height:
        shrink = args.width / image.width
    args.height = args.height or grid(image.height * shrink)
    args.width = args.width or grid(image.width * shrink)


def grid(edge: float) -> int:
    """Round an edge down to what FLUX draws. Units: px"""
    return max(16, round(edge) // 16 * 16)


def to_size(image, args):
    """Resize a picture to the run's size; it is stretched if its shape is another."""
    from PIL import Image

    return image.resize((args.width, args.height), Image.Resampling.LANCZOS)


def to_mask(mask, args):
    """Resize a mask to the run's size, black and white as it is."""
    from PIL import Image

    return mask.resize((args.width, args.height), Image.Resampling.NEAREST)


def derive(pipeline, args, name: str, components: dict | None = None, **call):
    """Make diffusers' pipeline `name` of the loaded components, with its own arguments bound.

    Before `optimize()`: diffusers casts all components, float8 weights included. `components` are
    those that it has beyond FluxPipeline's.
    """
    import diffusers

    kind = getattr(diffusers, name)
    if type(pipeline) is not kind:  # Fill is loaded as what it is
        pipeline = kind.from_pipe(pipeline, dtype=args.dtype, **(components or {}))
        pipeline.set_progress_bar_config(disable=None, leave=False)
    return bind(pipeline, **call)


def bind(pipeline, **call):
    """Give the pipeline arguments that every call has from here on, instead of those it had."""
    import diffusers

    name = type(pipeline).__name__
    kind = getattr(diffusers, name)

    def bound_call(self, **of_the_run):
        return kind.__call__(self, **call, **of_the_run)

    # A class of its own, of the same name: other pipelines stay as they are
    own = {"__module__": kind.__module__, "__call__": bound_call}
    pipeline.__class__ = type(name, (kind,), own)
    return pipeline

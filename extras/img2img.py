"""Begin with a picture: python -m extras.img2img --image in.png --strength 0.6 --prompt "..."

FluxImg2ImgPipeline: noise is added up to the level that --strength says, and the steps from there
are taken, so a strength of 0.6 takes 17 of 28 steps. All optimisations as in gen_image.py.
"""

from extras import derived
from utils.benchmark_utils import create_parser
from utils.errors import run_script
from utils.prompts import count_images


def parse(argv: list[str] | None = None):
    """Read the flags of gen_image.py and those of this command."""
    parser = create_parser("Make images that begin with a picture, with every optimisation on.")
    add = parser.add_argument_group("the picture to begin with (--image)").add_argument
    add("--strength", type=float, default=0.6, help="noise added: above 0, up to 1 (all is new)")
    return parser.parse_args(argv)


def load(args) -> tuple:
    """Settle the run, print its card, load and derive.

    Returns: the pipeline, untouched by any step, and the seconds that loading took.
    """
    from utils.prepare import announce_and_load, prepare

    derived.check_strength(args.strength)
    derived.refuse_own_loops(args, "image-to-image")
    derived.refuse_foreign(args, "FluxImg2ImgPipeline")
    derived.refuse_kinds(args, ("schnell", "dev"))
    image = derived.read_image(args)
    prepare(args)
    args.also |= {
        "strength": args.strength,
        "steps_taken": derived.steps_taken(args.num_inference_steps, args.strength),
    }
    pipeline, load_s = announce_and_load(args)
    images = [derived.to_size(image, args)] * count_images(args)  # each encoded with its own seed
    call = {"image": images, "strength": args.strength}
    return derived.derive(pipeline, args, "FluxImg2ImgPipeline", **call), load_s


def main() -> None:
    """Parse, check, load, optimise, generate, save."""
    derived.make_pictures(parse(), load)


if __name__ == "__main__":
    run_script(main)

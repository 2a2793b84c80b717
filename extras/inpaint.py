"""Redraw a part: python -m extras.inpaint --image in.png --mask mask.png --prompt "..."

White in the mask is redrawn, black is kept. With a Schnell or Dev checkpoint FluxInpaintPipeline:
after every step the kept part is put back as latents, with the noise of that step. With a Fill
checkpoint (FLUX.1-Fill-dev: a transformer of 384 input channels) FluxFillPipeline, which was
trained to see the mask. Both decode the whole picture, so kept pixels go through the VAE as well;
--paste puts the original's pixels back. Latents are 8 pixels wide: so are the mask's steps.
"""

from extras import derived
from utils.benchmark_utils import create_parser
from utils.errors import UserError, run_script
from utils.prompts import count_images

PIPELINES = {
    "schnell": "FluxInpaintPipeline",
    "dev": "FluxInpaintPipeline",
    "fill": "FluxFillPipeline",
}


def parse(argv: list[str] | None = None):
    """Read the flags of gen_image.py and those of this command."""
    parser = create_parser("Redraw the masked part of a picture, with every optimisation on.")
    add = parser.add_argument_group("what to redraw (of --image)").add_argument
    add("--mask", required=True, help="a picture of --image's size: white is redrawn")
    add("--strength", type=float, default=1.0, help="noise in the redrawn part: above 0, up to 1")
    add(
        "--paste",
        action="store_true",
        help="put the original's pixels back where the mask is black",
    )
    return parser.parse_args(argv)


def read_mask(path: str, size: tuple[int, int]):
    """Read the mask of a picture of this size.

    Returns: a PIL image (L) of 0 and 255
    Raises: UserError for another size, or a mask that selects nothing.
    """
    from utils.prepare import read_picture

    mask = read_picture("--mask", path).convert("L").point(lambda level: 255 * (level > 127))
    if mask.size != size:
        found, expected = ("x".join(map(str, edges)) for edges in (mask.size, size))
        raise UserError(f"--mask {path}: found {found}, expected the size of --image, {expected}")
    if mask.getbbox() is None:
        raise UserError(f"--mask {path}: all black, expected white where to redraw")
    return mask


def load(args) -> tuple:
    """Settle the run, print its card, load and derive.

    Returns: the pipeline, untouched by any step, and the seconds that loading took.
    """
    from utils.prepare import announce_and_load, prepare

    derived.check_strength(args.strength)
    derived.refuse_own_loops(args, "inpainting")
    kind = derived.refuse_kinds(args, tuple(PIPELINES))
    derived.refuse_foreign(args, PIPELINES[kind])
    image = derived.read_image(args)
    mask = read_mask(args.mask, image.size)
    prepare(args)
    image = derived.to_size(image, args)
    mask = derived.to_mask(mask, args)
    args.also |= {
        "mask": args.mask,
        "pipeline": PIPELINES[kind],
        "strength": args.strength,
        "steps_taken": derived.steps_taken(args.num_inference_steps, args.strength),
    } | ({"paste": True} if args.paste else {})
    pipeline, load_s = announce_and_load(args)
    images = [image] * count_images(args)  # each encoded with its own seed
    call = {"image": images, "mask_image": mask, "strength": args.strength}
    pipeline = derived.derive(pipeline, args, PIPELINES[kind], **call)
    if args.paste:
        _paste(pipeline, image, mask)
    return pipeline, load_s


def _paste(pipeline, image, mask) -> None:
    """Let the pipeline's last stage put the original's pixels back, and no others."""
    from PIL import ImageOps

    keep, processor = ImageOps.invert(mask), pipeline.image_processor

    def pasted(images) -> list:
        made = type(processor).numpy_to_pil(images)  # device_images may have changed the type
        for picture in made:
            picture.paste(image, mask=keep)
        return made

    processor.numpy_to_pil = pasted


def main() -> None:
    """Parse, check, load, optimise, generate, save."""
    derived.make_pictures(parse(), load)


if __name__ == "__main__":
    run_script(main)

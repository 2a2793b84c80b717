"""Structure, details, polish: python -m extras.stages --height 1536 --width 1536 --prompt "..."

A first picture at a low size, where the model was trained to compose; enlarged (Lanczos), it begins
an image-to-image call at the target size, which draws the details; a second one of low strength
polishes. The stages share one set of optimised weights. The last line, and the file's metadata, say
how the time went. Whether it is worth it: docs/extras-pipelines.md.
"""

import copy
import time

from extras import derived
from utils.benchmark_utils import create_parser, synchronize
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

SETTINGS = ("structure_scale", "details_strength", "polish_strength")


def parse(argv: list[str] | None = None):
    """Read the flags of gen_image.py and those of this command."""
    parser = create_parser("Make large images in stages, with every optimisation on.")
    add_flags(parser)
    return parser.parse_args(argv)


def add_flags(parser) -> None:
    """Add how large the first picture is, and how much the others change."""
    add = parser.add_argument_group("stages (--height and --width are the last ones')").add_argument
    add("--structure_scale", type=float, default=0.5, help="edges of the first picture, as a share")
    add("--details_strength", type=float, default=0.25, help="of the second: above 0, up to 1")
    add("--polish_strength", type=float, default=0.1, help="of the third; 0 leaves it out")


def check(args) -> None:
    """Refuse flags that give no stage, and steps that cannot follow one.

    Raises: UserError with one line per problem.
    """
    derived.refuse_own_loops(args, "stages")
    problems = []
    if not 0 < args.structure_scale <= 1:
        problems.append(f"--structure_scale {args.structure_scale:g}: expected above 0, at most 1")
    if not 0 < args.details_strength <= 1:
        problems.append(
            f"--details_strength {args.details_strength:g}: expected above 0, at most 1"
        )
    if not 0 <= args.polish_strength <= 1:
        problems.append(f"--polish_strength {args.polish_strength:g}: expected 0 to 1")
    if args.num_images_per_prompt != 1 or len(args.prompt or ()) > 1:
        problems.append("--prompt, --num_images_per_prompt: stages make one picture a call")
    if args.swap_loras:
        problems.append("--swap_loras: stages make one picture; use --lora alone, or gen_image.py")
    if problems:
        raise UserError("\n".join(problems))
    derived.refuse_kinds(args, ("schnell", "dev"))
    derived.refuse_foreign(args, "FluxImg2ImgPipeline")  # imports diffusers: seconds


class Stages:
    """The stages of a settled run over one loaded pipeline; `seconds` is the last call's."""

    def __init__(self, pipeline, args) -> None:
        """Derive the image-to-image pipeline; nothing is optimised yet."""
        self.args, self.first, self.clock = args, pipeline, time.perf_counter
        self.later = derived.derive(pipeline, args, "FluxImg2ImgPipeline")
        strengths = {"details": args.details_strength, "polish": args.polish_strength}
        self.strengths = {name: share for name, share in strengths.items() if share}
        self.seconds: dict[str, float] = {}
        self.small = copy.copy(args)
        self.fit()

    def fit(self) -> None:
        """Choose the first picture's size from the run's."""
        for edge in ("height", "width"):
            share = getattr(self.args, edge) * self.args.structure_scale
            setattr(self.small, edge, derived.grid(share))

    def optimize(self) -> None:
        """Apply every step; what warms up does so at the first stage's size."""
        from utils.pipeline_utils import optimize
        from utils.steps import device_images

        optimize(self.first, self.small)
        if self.args.plan[device_images.NAME].is_on:
            device_images.apply(self.later, self.args)
        self.later.encode_prompt = self.first.encode_prompt  # text_padding shortens it

    def run(self) -> list:
        """Make the picture, and time each stage."""
        image = self.timed("structure", lambda: self._generate(self.first, self.small))
        for name, strength in self.strengths.items():
            large = [derived.to_size(picture, self.args) for picture in image]
            derived.bind(self.later, image=large, strength=strength)
            image = self.timed(name, lambda: self._generate(self.later, self.args))
        return image

    def _generate(self, pipeline, args) -> list:
        from utils.pipeline_utils import generate

        return generate(pipeline, args)

    def timed(self, name: str, make) -> list:
        """Make a picture and keep its seconds under this name."""
        start = self.clock()
        image = make()
        synchronize(self.args.device)
        self.seconds[name] = self.clock() - start
        return image


def about(args) -> dict:
    """Say what the stages are, for the card and for the rows of a comparison."""
    return {name: getattr(args, name) for name in SETTINGS}


def shares(seconds: dict[str, float]) -> str:
    """Write each stage's seconds and share: "structure 0.10 s (25 %), details ..."."""
    total = sum(seconds.values())
    return ", ".join(f"{name} {s:.2f} s ({s / total:.0%})" for name, s in seconds.items())


def main() -> None:
    """Parse, check, load, optimise, make the picture, save it with its stages."""
    args = parse()
    quiet_libraries()  # the checks import diffusers
    check(args)
    from utils.images import save_images
    from utils.prepare import announce_and_load, prepare

    prepare(args)
    args.also = about(args)
    pipeline, load_s = announce_and_load(args)
    stages = Stages(pipeline, args)
    start = time.perf_counter()
    stages.optimize()
    optimize_s = time.perf_counter() - start
    images = stages.run()
    args.also["stages"] = shares(stages.seconds)
    for path in save_images(images, args):
        print(f"wrote {path}")
    print(f"stages      {args.also['stages']}")
    print(f"load {load_s:.2f} s, optimize {optimize_s:.2f} s (one call)")


if __name__ == "__main__":
    run_script(main)

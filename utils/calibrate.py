"""Fit a step mask to a checkpoint's own weights, and write it to a file.

    python -m utils.calibrate --ckpt tiny-dev --computed 10 --mask_file mask.json
    python gen_image.py --ckpt tiny-dev --step_mask mask.json

Two runs of a few prompts in one batch, and a search between them (utils/fit_mask.py): which steps
to compute, and with which weights the others follow from the last two computed ones.
"""

import shlex
import sys
from pathlib import Path

from utils import mask_file
from utils.benchmark_utils import create_parser, refuse_given
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

PROMPTS = 4  # the last of the eight quality prompts, so that the first four can judge
SEED = 1000  # added to --seed: no picture of a benchmark is one of the calibration's


def prompts_of(args) -> list[str]:
    """Give the prompts of a checkpoint's calibration: the last of those that measure quality."""
    from utils.prompts import quality_prompts

    return quality_prompts(args)[-PROMPTS:]


def on_prompts(args, settled):
    """Settle a run of the calibration's prompts and seeds, unless prompts were given.

    `settled`: the same call, settled without them
    Raises: UserError, one line a problem.
    """
    from utils.prepare import prepare

    args.prompt = args.prompt or prompts_of(settled)
    args.seed += SEED
    prepare(args)
    return args


def settle(argv: list[str], parser):
    """Settle a run of all steps on the calibration's prompts: a mask of ones, so that it can count.

    Raises: UserError for what no step mask is for (utils/steps/step_mask.py), one line a problem.
    """
    from utils.prepare import settle_call

    first = parser.parse_args(argv)
    if first.step_mask or first.cache_dit_config:
        raise UserError("--step_mask, --cache_dit_config: the calibration sets the mask itself")
    if first.random_weights:
        raise UserError("--random_weights: a mask belongs to the weights, and these mean nothing")
    refuse_given(first, ("output_file",), "the calibration keeps no picture")
    if not mask_file.is_file(first.mask_file):  # --step_mask would take it for a list of steps
        raise UserError(
            f"--mask_file {first.mask_file}: expected a name ending in {mask_file.SUFFIX}"
        )
    settle_call(first)
    steps = first.num_inference_steps
    if not 1 <= first.computed < steps:
        raise UserError(f"--computed {first.computed}: expected 1 to {steps - 1} of {steps} steps")
    return on_prompts(parser.parse_args([*argv, "--step_mask", f"0-{steps - 1}"]), first)


def ready(args):
    """Print what a settled calibration runs, load its pipeline and apply its steps."""
    from utils.pipeline_utils import optimize
    from utils.prepare import announce_and_load

    pipeline, _ = announce_and_load(args)
    return optimize(pipeline, args)


def parser():
    """Add what only the calibration needs to the common parser."""
    found = create_parser(__doc__.split("\n\n")[0])
    add = found.add_argument_group("the calibration").add_argument
    add("--computed", type=int, default=10, help="steps that the mask computes (default: 10)")
    add("--mask_file", metavar="JSON", default="step_mask.json", help="where the mask is written")
    found.set_defaults(ckpt="tiny-dev", output_file=None)
    return found


def main() -> None:
    """Calibrate, and write the file."""
    argv = sys.argv[1:]
    quiet_libraries()
    from utils import card
    from utils.fit_mask import fit, record
    from utils.report import write

    args = settle(argv, parser())
    pipeline = ready(args)
    full, step_sizes = record(pipeline, args)
    mask, weights, error = fit(pipeline, args, full, step_sizes, args.computed)
    found = mask_file.MaskFile(
        mask=mask,
        weights=weights,
        latents_error=error,
        checkpoint=args.ckpt,
        identity=args.checkpoint.identity(args.cache_dir),
        pixels=args.height * args.width,
        guidance=args.guidance_scale,
        command=shlex.join(["python", "-m", "utils.calibrate", *argv]),
        prompts=args.prompt,
        environment=card.environment(args),
    )
    write(Path(args.mask_file), mask_file.dump(found))
    print(f"mask        {mask}: {args.computed} of {len(mask)} steps computed")
    print(f"latents     off by {error:.1e} (relative L2) on the calibration's own prompts")
    print(f"wrote {args.mask_file}; use it: --step_mask {args.mask_file}")


if __name__ == "__main__":
    run_script(main)

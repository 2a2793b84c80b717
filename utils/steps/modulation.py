"""Modulation of all steps, rotary embeddings and embedded text computed once, before the loop.

A structural step: linear layers leave the blocks before quantisation and compiler look at them.
The pipeline's call is replaced by one with a loop of its own (utils/denoise.py), whose scheduler
never asks the device for a number; the modules are in utils/kernels/modulation.py. Lossless: the
same products, of more rows at a time, so that sums may be ordered otherwise.

Unmeasured on a GPU, and therefore off by default. What it may save of FLUX.1 in bf16 is reading
6.5 GB in all steps but one, 1.4 ms each at 4.8 TB/s. The products before the loop are part of a
call's total, not of `denoising_step`.
"""

from utils.schedulers import loop_problem
from utils.steps import Verdict, not_given, on, refused

NAME = "modulation"
AFTER = ()
PARTS = ("pipeline",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--modulation_once",
        action="store_true",
        help="compute all steps' modulation, rotary embeddings and embedded text before the loop "
        "(lossless; unmeasured on a GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flags: a step cache needs diffusers' own loop and blocks."""
    if not args.modulation_once:
        return not_given("--modulation_once")
    if args.cache_dit_config:
        return refused(
            "--modulation_once: a step cache calls the blocks itself, with one vector for all of "
            "them; leave out --modulation_once or --cache_dit_config"
        )
    if problem := loop_problem(args):
        return refused(f"--modulation_once: {problem}")
    if args.true_cfg_scale is not None:
        return refused(
            "--modulation_once: its loop calls the transformer once a step, true CFG twice; leave "
            "out --modulation_once or --true_cfg_scale"
        )
    return on()


def apply(pipeline, args) -> None:
    """Replace the pipeline's call and move the modulation out of the transformer's blocks."""
    from utils.denoise import install

    install(pipeline)

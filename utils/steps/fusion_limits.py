"""Inductor's limits on what one kernel may read and compute, raised: fewer tensors are stored.

Inductor writes an intermediate result to memory once its expression reads more than 4 tensors or
holds more than 30 operations, although all of its readers could compute it again from what is in
their registers anyway. FLUX.1's adaptive norms, rotary embeddings and row scales cross both limits
in every block. With raised limits the code for an H200 moves a tenth less between the products of
Dev's blocks in bf16 and a fifth less in float8 (`python -m tests.block_codegen`; nothing was run).
Nothing is quantised or reordered: lossless. What an expression twice as long does to registers only
a GPU can tell, so it is off.

Read when the compiler runs, as the flags of `inductor_tuning_flags`.
"""

from utils.steps import Verdict, not_given, on, refused, uncompiled

NAME = "fusion_limits"
AFTER = ("inductor_tuning_flags",)
PARTS = ("pipeline",)

LIMITS = {
    "realize_reads_threshold": 16,  # tensors that an expression may read; Inductor's own: 4
    "realize_opcount_threshold": 100,  # operations that it may hold; 30
    "realize_acc_reads_threshold": 16,  # tensors that a chain of sums may read; 8
}


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--fusion_limits",
        action="store_true",
        help="let the compiler fuse longer expressions (lossless; unmeasured on a GPU, so off by "
        "default)",
    )


def check(args) -> Verdict:
    """Decide from the flags alone: without a compiler there is nothing to tell."""
    if not args.fusion_limits:
        return not_given("--fusion_limits")
    if problem := uncompiled(args, "--fusion_limits"):
        return refused(problem)
    return on(**LIMITS)


def options(args) -> dict[str, int]:
    """Give the limits; compile and export pass them on, before there is a plan too."""
    return LIMITS if check(args).is_on else {}


def apply(pipeline, args) -> None:
    """Change nothing here: compile and export_aoti call `options()`."""

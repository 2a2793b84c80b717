"""The VAE's encoder, which reads Kontext's image, among what is compiled, exported and graphed.

By default only the transformer and the decoder are: Kontext encodes one image a call, 4.9 TFLOP at
1024x1024 (the decoder's are 10.5), in eager code. One more component to compile and store, so it is
asked for. Unmeasured on a GPU.

After the flags that the compiler reads, before the steps that compile, export and record.
"""

from utils.steps import Verdict, not_given, on, refused, uncompiled

NAME = "image_encoder"
AFTER = ("channels_last", "inductor_tuning_flags")
PARTS = ("pipeline",)


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--compile_image_encoder",
        action="store_true",
        help="compile the VAE's encoder too, which reads Kontext's image (lossless; unmeasured "
        "on a GPU)",
    )


def check(args) -> Verdict:
    """Decide from the flags: there has to be an image and a compiler."""
    if not args.compile_image_encoder:
        return not_given("--compile_image_encoder")
    if args.checkpoint.kind != "kontext":
        return refused(
            f"--compile_image_encoder: found {args.checkpoint.name}, which encodes no image, "
            "expected a Kontext checkpoint"
        )
    if problem := uncompiled(args, "--compile_image_encoder"):
        return refused(problem)
    return on()


def apply(pipeline, args) -> None:
    """Name the encoder as one component more; the steps below do the rest."""
    pipeline.further = getattr(pipeline, "further", {}) | {NAME: pipeline.vae.encoder}

"""LoRAs added to the transformer's weights, before anything reads them.

First of all steps: the matrices that QKV fusion joins, float8 casts and the compiler freezes are
those of the LoRA then, and nothing of it is left to compute. The sum is rounded to the model's
dtype once for each LoRA. What decides it, digests and weights, is part of this step's settings and
so of every package's identity. The baseline of quality is the same LoRAs in plain diffusers, not
fused.
"""

from contextlib import contextmanager

from utils.errors import UserError
from utils.steps import Verdict, off, on, refused

NAME = "lora"
AFTER = ()


def add_flags(parser) -> None:
    """Add the LoRAs of a run."""
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH_OR_ID[:WEIGHT]",
        help="add a LoRA to the transformer (weight 1 unless given; several are added up): a "
        ".safetensors file, or owner/name/file on the hub",
    )


def check(args) -> Verdict:
    """Read every LoRA and compare it with the transformer's layers; nothing is left out."""
    if not args.lora:
        return off("no --lora")
    if args.random_weights:
        return refused(
            f"--lora {args.lora[0]}: fused into random weights it changes neither speed nor a "
            "picture that means anything; leave out one of --lora and --random_weights"
        )
    from utils import loras
    from utils.steps import import_problem

    if problem := import_problem("peft"):
        return refused(f"--lora: {problem}; pip install peft==0.21.2")
    try:
        args.loras = [loras.find(text) for text in args.lora]
        layers = loras.layers_of(args.checkpoint)
        lines = [
            line
            for lora in args.loras
            for line in loras.problems(lora, loras.read(lora), layers)
        ]
    except UserError as error:
        return refused(str(error))
    if lines:
        return refused("\n".join(lines))
    return on(files=" + ".join(str(lora) for lora in args.loras))


def load(pipeline, found: list) -> None:
    """Load LoRAs through diffusers beside the weights, active together, not fused."""
    import warnings

    names = [f"lora_{at}" for at in range(len(found))]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # meant here
        for name, lora in zip(names, found, strict=True):
            file = lora.path.name
            pipeline.load_lora_weights(lora.path.parent, weight_name=file, adapter_name=name)
    pipeline.set_adapters(names, [lora.weight for lora in found])


@contextmanager
def beside(pipeline, args):
    """Let the body run with the LoRAs as plain diffusers has them; the pipeline is as before then.

    Without LoRAs it does nothing.
    """
    if not args.plan[NAME].is_on:
        yield
        return
    load(pipeline, args.loras)
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def apply(pipeline, args) -> None:
    """Add the LoRAs to the weights and remove what loaded them."""
    load(pipeline, args.loras)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()

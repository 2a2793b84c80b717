"""LoRAs added to the transformer's weights, before anything reads them.

After `gguf` alone, which brings the weights: the matrices that QKV fusion joins, float8 casts and
the compiler freezes are those of the LoRA then, and nothing of it is left to compute. The sum is
rounded to the model's dtype once for each LoRA. What decides it, digests and weights, is part of
this step's settings and so of every package's identity. The baseline of quality is the same LoRAs
in plain diffusers, not fused.

With --swap_loras they stay beside the weights, as tensors that are overwritten in place, so that
compiled code and CUDA graphs go on as they are with the next one. QKV fusion and float8 would not
see them and stay off.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from utils import acceleration, loras
from utils.errors import UserError
from utils.steps import Verdict, gguf, import_problem, not_given, on, refused

NAME = "lora"
AFTER = ("gguf",)
PARTS = ("pipeline",)

SWAPPED = "swapped"  # the one adapter of --swap_loras
NOT_BESIDE = ("fused_kernels", "modulation_once", "cache_dit_config")  # read or move the Linears


def add_flags(parser) -> None:
    """Add the LoRAs of a run, and the presets that bring one."""
    parser.add_argument(
        "--lora",
        action="append",
        metavar="PATH_OR_ID[:WEIGHT]",
        help="add a LoRA to the transformer (weight 1 unless given; several are added up): a "
        ".safetensors file, or owner/name/file on the hub",
    )
    parser.add_argument(
        "--swap_loras",
        action="store_true",
        help="instead of adding them up: make the pictures once with each --lora, exchanged "
        "between the calls without compiling again (computed beside the weights, so slower)",
    )
    acceleration.add_flags(parser)


def check(args) -> Verdict:
    """Read every LoRA and compare it with the transformer's layers; nothing is left out.

    Adds: args.loras and args.lora_rank, so that nothing is read and digested twice.
    """
    given = args.lora or []
    if args.swap_loras and (problem := _swap_problem(args)):
        return refused(f"--swap_loras: {problem}")
    if not given:
        return not_given("--lora")
    if args.random_weights:
        return refused(
            f"--lora {given[0]}: added to random weights it changes neither speed nor a picture "
            "that means anything; leave out one of --lora and --random_weights"
        )
    if gguf.is_compressed(args):
        return refused(
            f"--lora {given[0]}: cannot be added to a GGUF's weights while they stay compressed; "
            "use --gguf_mode dequantize"
        )
    if problem := import_problem("peft"):
        return refused(f"--lora: {problem}; pip install peft==0.21.2")
    try:
        args.loras = [loras.find(text) for text in given]
        tensors = [loras.read(lora) for lora in args.loras]
    except UserError as error:
        return refused(str(error))
    layers = loras.layers_of(args.checkpoint)
    pairs = list(zip(args.loras, tensors, strict=True))
    lines = [line for lora, found in pairs for line in loras.problems(lora, found, layers)]
    adapted = [] if lines else [loras.adapted(found) for found in tensors]
    if args.swap_loras and not lines:
        lines = _extra_layers(args.loras, adapted)
    if lines:
        return refused("\n".join(lines))
    args.lora_rank = max(rank for ranks in adapted for rank in ranks.values())
    files = [str(lora) for lora in args.loras]
    return on(swapped=" | ".join(files)) if args.swap_loras else on(files=" + ".join(files))


def _swap_problem(args) -> str:
    if len(args.lora or ()) < 2:
        return f"expected two --lora or more, found {len(args.lora or ())}"
    if args.compile_export_mode == "export_aoti":
        return (
            "a package is of one LoRA; use --compile_export_mode compile, or run once with each "
            "--lora"
        )
    for flag in NOT_BESIDE:
        if getattr(args, flag):
            return f"--{flag} would not see LoRAs beside the weights; leave one of the two out"
    return ""


def _extra_layers(found: list, adapted: list[dict[str, int]]) -> list[str]:
    """Name the layers that only a later LoRA has: the first one makes the places of all."""
    lines = []
    for lora, ranks in zip(found[1:], adapted[1:], strict=True):
        if extra := sorted(ranks.keys() - adapted[0].keys()):
            lines.append(
                f"--swap_loras: {lora.name} adapts {len(extra)} layers that {found[0].name} does "
                f"not ({extra[0]}, ...); give the one with all layers first"
            )
    return lines


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
def unfused(pipeline, args):
    """Run the body with the LoRAs as plain diffusers has them, then unload them again."""
    if not args.plan[NAME].is_on:
        yield
        return
    load(pipeline, args.loras)
    try:
        yield
    finally:
        pipeline.unload_lora_weights()


def apply(pipeline, args) -> None:
    """Add the LoRAs to the weights and remove what loaded them; or make place for swapping."""
    if args.swap_loras:
        pipeline.transformer.enable_lora_hotswap(target_rank=args.lora_rank)
        swap_lora(pipeline, args.loras[0], first=True)
        return
    load(pipeline, args.loras)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()


def swap_lora(pipeline, lora, first: bool = False) -> None:
    """Put one LoRA into the place of another: its tensors are overwritten, nothing is compiled.

    Raises: UserError if peft cannot exchange the two (rslora against plain scaling, say)
    """
    from peft.tuners.lora import LoraLayer

    file = lora.path.name
    try:
        pipeline.load_lora_weights(
            lora.path.parent, weight_name=file, adapter_name=SWAPPED, hotswap=not first
        )
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"--swap_loras: {lora.name} cannot be exchanged ({why})") from None
    for module in pipeline.transformer.modules():
        if isinstance(module, LoraLayer):
            module.scaling[SWAPPED].mul_(lora.weight)  # a tensor, which the swap has set anew


def turns(pipeline, args) -> Iterator[str]:
    """Yield once for each call to make, with the ending of its pictures' names.

    That is one call; with --swap_loras one for each LoRA, which is in place when it is yielded.
    """
    if not args.swap_loras:
        yield ""
        return
    for at, lora in enumerate(args.loras):
        if at:
            swap_lora(pipeline, lora)
        yield f"_{lora.path.stem}_{lora.weight:g}"

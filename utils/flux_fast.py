"""Drive huggingface/flux-fast from outside: its own optimize() on a pipeline that we built.

The copy lies in `.peers/flux-fast`, ignored by git, at exactly one revision. Five lines of its
`utils/pipeline_utils.py` cannot work with what is published today; they are mended in a file beside
it, in that copy alone, and everything else runs as it is written there: its unscaled float8
attention, every Linear in float8 with one scale, Inductor's own CUDA graphs or its own.
"""

import hashlib
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from utils.prompts import count_images
from utils.steps import import_problem, quant

COPY = Path(__file__).resolve().parent.parent / ".peers" / "flux-fast"
REVISION = "5027798d7f69a8e0e478df92f48663c40727f8ea"
SHA256 = "52d1d9d7fddbc9326ecff820d9d1558b5a1132e288924cfb878c0a65404a8135"
SOURCE, MENDED = Path("utils/pipeline_utils.py"), Path("utils/pipeline_utils_mended.py")
FETCH = (
    "git clone https://github.com/huggingface/flux-fast .peers/flux-fast && "
    f"git -C .peers/flux-fast checkout {REVISION[:12]}"
)
TOKENS = {"schnell": 256, "dev": 512, "kontext": 512}  # what its export is written for


@dataclass(frozen=True)
class Edit:
    """One word of one line, replaced; the digest above says that the line is the right one."""

    line: int
    found: str
    instead: str
    why: str


_FA3 = ("flash_attn.flash_attn_interface import ", "fa3_fwd_interface import flash_attn_func as ")
_TORCHAO = "float8_dynamic_activation_float8_weight"
EDITS = (
    Edit(43, *_FA3, "no package has a function of this name"),
    Edit(74, ")[0]", ")", "fa3-fwd gives the output alone, not a tuple"),
    Edit(101, *_FA3, "no package has a function of this name"),
    Edit(
        427,
        _TORCHAO,
        f"Float8DynamicActivationFloat8WeightConfig as {_TORCHAO}",
        "torchao renamed it; one scale per tensor is the default of both",
    ),
    Edit(451, "is not None", "is None", "it exported with a step cache only"),
)


def copy_problem(copy: Path = COPY) -> str:
    """Say what is wrong with the copy, and how to get it; "" if it is the one that we know."""
    file = copy / SOURCE
    if not file.is_file():
        return f"no copy of it in {copy.parent.name}/{copy.name}; {FETCH}"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != SHA256:
        return (
            f"{SOURCE} of the copy has sha256 {found[:12]}, expected {SHA256[:12]} (revision "
            f"{REVISION[:12]}); {FETCH}"
        )
    return ""


def mend(copy: Path = COPY) -> Path:
    """Write the mended file beside the original, which stays as it is.

    Raises: ValueError if a line does not hold what is to be replaced exactly once.
    """
    lines = (copy / SOURCE).read_text().splitlines(keepends=True)
    for edit in EDITS:
        if lines[edit.line - 1].count(edit.found) != 1:
            raise ValueError(f"{SOURCE}:{edit.line}: expected {edit.found!r} once")
        lines[edit.line - 1] = lines[edit.line - 1].replace(edit.found, edit.instead)
    (copy / MENDED).write_text("".join(lines))
    return copy / MENDED


def flags(args) -> dict:
    """Give its flags, which are named as ours; what it cannot do on this machine is turned off."""
    return {
        "ckpt": args.ckpt,
        "cache_dit_config": None,
        "compile_export_mode": args.compile_export_mode,
        "use_cached_model": False,  # it would fetch a missing package and run it unchecked
        "disable_fused_projections": args.disable_fused_projections,
        "disable_fa3": args.disable_fa3 or not args.machine.is_hopper,
        "disable_channels_last": args.disable_channels_last,
        "disable_quant": args.disable_quant or bool(quant.lacking(args.machine)),
        "disable_inductor_tuning_flags": args.disable_inductor_tuning_flags,
    }


def problem(args) -> str:
    """Say why it cannot make this call; "" if it can."""
    own = flags(args)
    if found := copy_problem():
        return found
    if not own["disable_fa3"]:
        if own["disable_fused_projections"]:
            return "its attention needs fused projections; add --disable_fa3"
        if found := import_problem("fa3_fwd_interface"):
            return f"found {found}; pip install fa3-fwd==0.0.3, or --disable_fa3"
    if own["compile_export_mode"] != "export_aoti":
        return ""
    call = {  # name -> found, expected
        "device": (args.machine.device, "cuda"),
        "height": (args.height, 1024),
        "width": (args.width, 1024),
        "max_sequence_length": (args.max_sequence_length, TOKENS[args.checkpoint.kind]),
        "images": (count_images(args), 1),
        "dtype": (str(args.dtype), "torch.bfloat16"),
        "native_size": (args.checkpoint.native_size, 1024),
    }
    for name, (found, expected) in call.items():
        if found != expected:
            return (
                f"its export is written for {name} {expected}, found {found}; use "
                "--compile_export_mode compile"
            )
    if args.random_weights and args.quality_source == "bundled":
        return "its export takes no bundled checkpoint; add --quality_source none"
    return ""


def apply(pipeline, args):
    """Hand the pipeline to the mended copy's optimize(), whose warm-up calls are its own."""
    from argparse import Namespace

    from utils.aoti import name_toolkit

    name_toolkit()  # for its export
    # not as a package: its `utils` and ours have one name
    spec = importlib.util.spec_from_file_location("flux_fast_pipeline_utils", mend())
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with tempfile.TemporaryDirectory() as packages:  # 12 GB of weights inside; loaded, then gone
        return module.optimize(pipeline, Namespace(**flags(args), cache_dir=packages))

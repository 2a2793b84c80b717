"""Float8 linear layers through torchao: weights cast once, activations scaled as they come.

After the projections are fused, so that each fused matrix is quantised once. By default one scale
per row (token) and per output channel, and only the Linears of the blocks: modulation has one row
per image, embedders and the last projections are small and carry the error straight into the
picture. Measured on a CPU (docs/performance.md): relative error 0.021, against 0.053 per tensor
and with every Linear. The single blocks' proj_out, 28 % of all the blocks' work, stays in.
`--quant_granularity tensor --quant_filter all` is flux-fast's choice, for comparison.

No blockwise scales (1x128, 128x128): emulated, pictures are no closer than with one scale per row
(tests/lossy_pictures.py --variants), and torchao multiplies blocks by a Triton kernel that takes
half as long again as bf16 on an H100 (torch's own product takes 0.6 of bf16's time:
utils/kernel_bench/ has it). Static ones only where they save a pass: step static_scales.
Source: pytorch/ao pull request 2784 (the kernel's time, by its authors).

Blackwell (sm100 and newer) also multiplies numbers that share a scale in small blocks:
`--quant_dtype mxfp8` (e4m3, 32 numbers a power of two) and `nvfp4` (e2m1, 16 numbers an e4m3 scale,
a tensor one more, which spans the images of a batch). Opt-in: unmeasured, torchao's prototypes, and
nvfp4 costs pictures: PSNR 38 to 41 dB on the bundled checkpoints, 9 to 12 dB below float8. Only
under torch.compile: torch 2.11's packages know no such types.
"""

import sys
from importlib.util import find_spec

from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import Verdict, gguf, import_problem, off, on, refused, unavailable

NAME = "quant"
AFTER = ("fused_projections", "fused_mlp")
PARTS = ("blocks",)

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
INSTALL = "pip install torchao==0.18.0 (0.17 for torch 2.11)"
BLOCK_FORMATS = ("mxfp8", "nvfp4")
NEEDED = {  # of torchao, by module
    "torchao.quantization": (
        *("Float8DynamicActivationFloat8WeightConfig", "Float8MMConfig", "PerRow", "quantize_"),
    ),
    "torchao.prototype.mx_formats": (
        *("MXDynamicActivationMXWeightConfig", "NVFP4DynamicActivationNVFP4WeightConfig"),
    ),
}


def add_flags(parser) -> None:
    """Add the flags of float8 quantisation."""
    parser.add_argument(
        "--disable_quant", action="store_true", help="no float8, neither linear nor attention"
    )
    parser.add_argument(
        "--quant_dtype",
        choices=["float8", *BLOCK_FORMATS],
        help="numbers of the products; mxfp8 and nvfp4 need a Blackwell GPU and are unmeasured "
        "(default: float8)",
    )
    parser.add_argument(
        "--quant_granularity",
        choices=["row", "tensor"],
        default="row",
        help="one float8 scale per row or per tensor (default: row)",
    )
    parser.add_argument(
        "--quant_filter",
        choices=["blocks", "all"],
        default="blocks",
        help="quantise the blocks' Linears without modulation, or every Linear (default: blocks)",
    )


def lacking(machine: Machine, dtype: str = "float8") -> str:
    """Say why a machine has no such products; "" if it has them."""
    capability = machine.capability or (0, 0)
    if dtype in BLOCK_FORMATS:
        if machine.is_cuda and capability >= (10, 0):
            return ""
        return f"{dtype} products need a Blackwell GPU (sm100 or newer), found {machine.short()}"
    if machine.hip is not None:  # gfx94x and gfx95x; MI200 reports 9.0 and has none
        if (9, 4) <= capability < (10, 0):
            return ""
        return f"float8 products need gfx94x or gfx95x (MI300, MI350), found {machine.short()}"
    if capability < (8, 9):
        return f"float8 products need a GPU of capability 8.9 or newer, found {machine.short()}"
    return ""


def missing_torchao(dtype: str = "float8") -> str:
    """Refuse in one line without a usable torchao; "" if there is one."""
    modules = list(NEEDED)[: 2 if dtype in BLOCK_FORMATS else 1]
    if not (found := import_problem("torchao", *modules)):
        absent = [n for m in modules for n in NEEDED[m] if not hasattr(sys.modules[m], n)]
        if not absent:
            return ""
        version = getattr(sys.modules["torchao"], "__version__", "of unknown version")
        found = f"torchao {version} without {', '.join(absent)}"
    return f"quant: found {found}; expected torchao 0.17 or newer: {INSTALL}, or --disable_quant"


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if args.disable_quant:
        return off("--disable_quant")
    if gguf.is_compressed(args):
        return off("a GGUF's weights stay compressed; --gguf_mode dequantize lets float8 take over")
    if args.swap_loras:
        return off("--swap_loras: LoRAs beside the weights stay in the model's own dtype")
    dtype = args.quant_dtype or "float8"
    in_blocks = dtype in BLOCK_FORMATS
    for flag, value in (("granularity", "tensor"), ("filter", "all")):
        if in_blocks and getattr(args, f"quant_{flag}") == value:
            return refused(
                f"--quant_dtype {dtype}: found --quant_{flag} {value}, expected none (a scale a "
                "block, the blocks' Linears only); leave one of the two out"
            )
    reason = lacking(args.machine, dtype)
    if reason and args.quant_dtype:  # what was named and cannot run stops the run, as in fa3
        return refused(
            f"--quant_dtype {dtype}: {reason}; leave out --quant_dtype, or --disable_quant"
        )
    if reason:
        return unavailable(reason)
    if str(args.dtype) == "torch.float32" and args.quant_granularity == "row":
        what = dtype if in_blocks else "row-wise float8"
        return refused(
            f"quant: {what} needs bf16 weights, found --disable_bf16; add --disable_quant"
        )
    if problem := missing_torchao(dtype):
        return refused(problem)
    if in_blocks:
        # the same numbers by one kernel of MSLK or by torch's, which Inductor fuses
        cast = {"cast": "mslk" if find_spec("mslk") else "torch"} if dtype == "nvfp4" else {}
        return on(False, granularity="block", filter=args.quant_filter, dtype=dtype, **cast)
    return on(
        lossless=False,
        granularity=args.quant_granularity,
        filter=args.quant_filter,
        dtype=dtype_of(args.machine),
    )


def dtype_of(machine: Machine) -> str:
    """Name the float8 that torchao casts to: MI300 has its own, without an infinity, up to 240."""
    fnuz = machine.hip is not None and machine.capability < (9, 5)
    return "e4m3fnuz" if fnuz else "e4m3fn"


def precision(verdict: Verdict) -> str:
    """Name the numbers of the products as utils/layers.py does; "" if the step is not on."""
    if not verdict.is_on:
        return ""
    dtype = verdict.settings.get("dtype")
    return dtype if dtype in BLOCK_FORMATS else "fp8"


def _wanted(name: str, which: str) -> bool:
    parts = name.split(".")
    in_block = any(part in BLOCKS for part in parts)
    modulation = any(part.startswith("norm") for part in parts)
    return which == "all" or (in_block and not modulation)


def select(transformer, granularity: str, which: str) -> tuple[list[str], dict[str, str]]:
    """Name the Linears to quantise, and those of them that cannot be, with the reason."""
    return fitting(transformer, granularity, lambda name: _wanted(name, which))


def fitting(model, granularity: str, wanted) -> tuple[list[str], dict[str, str]]:
    """Name a model's wanted Linears that can be float8, and those that cannot, with the reason."""
    import torch

    columns_of = 32 if granularity == "block" else 16  # FP4 counts in pairs
    chosen, left_out = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not wanted(name):
            continue
        rows, columns = module.weight.shape
        if rows % 16 or columns % columns_of:
            left_out[name] = f"{rows}x{columns} is not divisible by {columns_of}"
        elif granularity == "tensor" and (rows, columns) == (128, 128):
            # torchao knows a scale layout by its block: a whole 128x128 looks like blockwise
            left_out[name] = "128x128 with one scale is taken for blockwise"
        else:
            chosen.append(name)
    return chosen, left_out


def is_float8(module) -> bool:
    """Say whether a Linear's weight really is a float8 tensor with fp32 scales."""
    return _kind(module) == "float8"


def _kind(module) -> str:
    """Tell the formats apart by their scales; "" for a plain weight."""
    scale = getattr(module.weight, "scale", None)
    kinds = {"float32": "float8", "float8_e8m0fnu": "mxfp8", "float8_e4m3fn": "nvfp4"}
    return "" if scale is None else kinds[str(scale.dtype).removeprefix("torch.")]


def _config(settings: dict):
    """Give torchao's configuration."""
    from torchao import quantization

    if settings["granularity"] == "block":
        from torchao.prototype import mx_formats

        if settings["dtype"] == "mxfp8":
            return mx_formats.MXDynamicActivationMXWeightConfig()
        by_mslk = settings["cast"] == "mslk"
        return mx_formats.NVFP4DynamicActivationNVFP4WeightConfig(use_triton_kernel=by_mslk)
    by_row = settings["granularity"] == "row"
    return quantization.Float8DynamicActivationFloat8WeightConfig(
        granularity=quantization.PerRow() if by_row else quantization.PerTensor(),
        mm_config=quantization.Float8MMConfig(use_fast_accum=True),
        set_inductor_config=False,  # it would change Inductor's global flags; ours are passed
    )


def apply(pipeline, args) -> str:
    """Quantise, and say how many layers it was.

    Raises: UserError if there was nothing to quantise; RuntimeError as `cast`.
    """
    settings, transformer = args.plan[NAME].settings, pipeline.transformer
    chosen, left_out = select(transformer, settings["granularity"], settings["filter"])
    if not chosen:
        kind = kind_of(settings)
        raise UserError(f"quant: no layer can be {kind}: {left_out}; use --disable_quant")
    cast(transformer, chosen, settings)
    return report(f"quant: {len(chosen)} Linears", settings, left_out)


def cast(model, chosen: list[str], settings: dict) -> None:
    """Quantise the named Linears of a model, by the settings of a verdict.

    Raises: RuntimeError if torchao left one as it was.
    """
    from torchao.quantization import quantize_

    names = set(chosen)
    quantize_(model, _config(settings), filter_fn=lambda module, name: name in names)
    missed = [name for name in chosen if _kind(model.get_submodule(name)) != kind_of(settings)]
    if missed:
        raise RuntimeError(f"quant: torchao left {len(missed)} layers unquantised: {missed[:3]}")


def kind_of(settings: dict) -> str:
    """Name the format of a verdict's settings."""
    return settings["dtype"] if settings["granularity"] == "block" else "float8"


def report(what: str, settings: dict, left_out: dict[str, str]) -> str:
    """Say what was quantised, and what could not be."""
    summary = f"{what} in {kind_of(settings)}, one scale per {settings['granularity']}"
    if left_out:
        summary += "; left out: " + ", ".join(f"{n} ({why})" for n, why in left_out.items())
    print(summary)
    return summary

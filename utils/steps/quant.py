"""Float8 linear layers through torchao: weights cast once, activations scaled as they come.

After the projections are fused, so that each fused matrix is quantised once. By default one scale
per row (token) and per output channel, and only the Linears of the blocks: modulation has one row
per image, embedders and the last projections are small and carry the error straight into the
picture. Measured on a CPU (docs/performance.md): relative error 0.021, against 0.053 per tensor
and with every Linear. The
single blocks' proj_out, 28 % of all the blocks' work, stays in. `--quant_granularity tensor
--quant_filter all` is flux-fast's choice, for comparison.

No blockwise scales (1x128, 128x128): emulated, their error is 0 to 10 % below one scale per row,
and torchao multiplies them by a Triton kernel that takes half as long again as bf16 on an H100.
Source: pytorch/ao pull request 2784 (the kernel's time, by its authors).
"""

from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import Verdict, gguf, import_problem, off, on, refused, unavailable

NAME = "quant"
AFTER = ("fused_projections", "fused_mlp")

BLOCKS = ("transformer_blocks", "single_transformer_blocks")
INSTALL = "pip install torchao==0.18.0 (0.17 for torch 2.11)"


def add_flags(parser) -> None:
    """Add the flags of float8 quantisation."""
    parser.add_argument(
        "--disable_quant", action="store_true", help="no float8, neither linear nor attention"
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


def lacking(machine: Machine) -> str:
    """Say why a machine has no float8 products; "" if it has them."""
    capability = machine.capability or (0, 0)
    if machine.device == "cpu":
        return "float8 products need a GPU of capability 8.9 or newer, found a CPU"
    if machine.hip is not None:  # gfx94x and gfx95x; MI200 reports 9.0 and has none
        if (9, 4) <= capability < (10, 0):
            return ""
        return f"float8 products need gfx94x or gfx95x (MI300, MI350), found {machine.short()}"
    if capability < (8, 9):
        return f"float8 products need a GPU of capability 8.9 or newer, found {machine.short()}"
    return ""


def torchao_problem() -> str:
    """Import torchao: what was found instead of a usable one; "" if nothing is wrong."""
    if problem := import_problem("torchao", "torchao.quantization"):
        return problem
    import torchao.quantization

    names = ("Float8DynamicActivationFloat8WeightConfig", "Float8MMConfig", "PerRow", "quantize_")
    absent = [name for name in names if not hasattr(torchao.quantization, name)]
    version = getattr(torchao, "__version__", "of unknown version")
    return f"torchao {version} without {', '.join(absent)}" if absent else ""


def missing_torchao() -> str:
    """Refuse in one line without a usable torchao; "" if there is one."""
    if not (problem := torchao_problem()):
        return ""
    return f"quant: found {problem}; expected torchao 0.17 or newer: {INSTALL}, or --disable_quant"


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if args.disable_quant:
        return off("--disable_quant")
    if gguf.is_compressed(args):
        return off("a GGUF's weights stay compressed; --gguf_mode dequantize lets float8 take over")
    if args.swap_loras:
        return off("--swap_loras: LoRAs beside the weights stay in the model's own dtype")
    reason = lacking(args.machine)
    if reason:
        return unavailable(reason)
    if str(args.dtype) == "torch.float32" and args.quant_granularity == "row":
        return refused(
            "quant: row-wise float8 needs bf16 weights, found --disable_bf16; add --disable_quant"
        )
    if problem := missing_torchao():
        return refused(problem)
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

    chosen, left_out = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or not wanted(name):
            continue
        rows, columns = module.weight.shape
        if rows % 16 or columns % 16:
            left_out[name] = f"{rows}x{columns} is not divisible by 16"
        elif granularity == "tensor" and (rows, columns) == (128, 128):
            # torchao knows a scale layout by its block: a whole 128x128 looks like blockwise
            left_out[name] = "128x128 with one scale is taken for blockwise"
        else:
            chosen.append(name)
    return chosen, left_out


def is_float8(module) -> bool:
    """Say whether a Linear's weight really is a float8 tensor."""
    data = getattr(module.weight, "qdata", module.weight)
    return str(data.dtype).startswith("torch.float8")


def apply(pipeline, args) -> str:
    """Quantise, and say how many layers it was.

    Raises: UserError if there was nothing to quantise; RuntimeError as `cast`.
    """
    settings = args.plan[NAME].settings
    granularity, transformer = settings["granularity"], pipeline.transformer
    chosen, left_out = select(transformer, granularity, settings["filter"])
    if not chosen:
        raise UserError(f"quant: no layer can be float8: {left_out}; use --disable_quant")
    cast(transformer, chosen, granularity)
    return report(f"quant: {len(chosen)} Linears", granularity, left_out)


def cast(model, chosen: list[str], granularity: str) -> None:
    """Make the named Linears of a model float8, with one scale per row or per tensor.

    Raises: RuntimeError if torchao left one as it was.
    """
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8MMConfig,
        PerRow,
        PerTensor,
        quantize_,
    )

    config = Float8DynamicActivationFloat8WeightConfig(
        granularity=PerRow() if granularity == "row" else PerTensor(),
        mm_config=Float8MMConfig(use_fast_accum=True),
        set_inductor_config=False,  # it would change Inductor's global flags; ours are passed
    )
    names = set(chosen)
    quantize_(model, config, filter_fn=lambda module, name: name in names)
    missed = [name for name in chosen if not is_float8(model.get_submodule(name))]
    if missed:
        raise RuntimeError(f"quant: torchao left {len(missed)} layers unquantised: {missed[:3]}")


def report(what: str, granularity: str, left_out: dict[str, str]) -> str:
    """Say what became float8, and what could not."""
    summary = f"{what} in float8, one scale per {granularity}"
    if left_out:
        summary += "; left out: " + ", ".join(f"{n} ({why})" for n, why in left_out.items())
    print(summary)
    return summary

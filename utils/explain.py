"""FLUX.1 block by block, as text: shapes, parameters, FLOP, bytes, and what bounds each layer.

Arithmetic alone: no weights, no download, no GPU.
"""

import copy

from utils import acceleration, checkpoints, hardware, schedulers
from utils.errors import UserError
from utils.hardware import Machine
from utils.layers import Layer, total
from utils.peaks import CARDS, Peaks, datasheet
from utils.prepare import call_problems, fill_in, open_image
from utils.random_weights import configs_of
from utils.report_table import si, significant
from utils.roofline import bound, elementwise_s, floor_s, main_bound, precision_of, times_s, work_of
from utils.steps import Verdict, fa3, not_given, off, on, quant, step_mask, subpixel_upsampling
from utils.work import STAGES, Work, image_tokens

HEADER = (
    *("part", "layer", "n", "shape", "dtype", "parameters", "FLOP", "bytes", "FLOP/B"),
    *("bound by", "floor"),
)
LEFT = ("part", "layer", "shape", "dtype", "bound by")
COUNTED = """\
A row is n equal layers. Shapes are rows x inputs -> outputs, for attention batch x heads x tokens x
head. FLOP are those of products, 2 per multiply-add; bytes are weights, inputs and outputs, each
once. The floor is the longer of FLOP at the dense peak and bytes at the memory's rate. Elementwise
passes stand in brackets: a compiler may fuse them into the products, so no sum counts them, but as
kernels of their own they cost what the brackets say."""


def explain(args, machine: str = "") -> str:
    """Write FLUX.1 block by block for the checkpoint and the call of `args`, as parsed.

    `machine` names one of utils/peaks.py; without it, it is this one's GPU if its data sheet is
    known, else an H200. Default checkpoint: FLUX.1-schnell.

    Raises: UserError for an unknown machine or checkpoint, and for a call that could not run.
    """
    where, peaks, why = _machine(args, machine)
    args = _settle(args, where)
    work, precision = work_of(args), precision_of(args)
    return "\n\n".join(
        [
            _head(args, work, precision, peaks, why),
            *(_component(name, work, peaks) for name in work.layers if work.layers[name]),
            _stages(work, peaks),
            COUNTED,
        ]
    )


def _machine(args, name: str) -> tuple[Machine, Peaks, str]:
    """Find the machine to explain for, its rates, and why it is this one."""
    if name:
        known = {key.lower(): card for key, card in CARDS.items()}
        if name.lower() not in known:
            raise UserError(
                f"--explain {name}: unknown machine (expected one of {', '.join(CARDS)})"
            )
        card = known[name.lower()]
        return card.machine, card.peaks, "as named"
    here = hardware.detect(args.device)
    if found := datasheet(here):
        return here, found, "this machine"
    card = CARDS["H200"]
    return card.machine, card.peaks, f"by default: no data sheet of {here.name} is known here"


def _settle(args, machine: Machine):
    """Do for a call on another machine what utils/prepare.py does for a run on this one."""
    if problems := call_problems(args):
        raise UserError("\n".join(problems))
    args = copy.copy(args)
    schedulers.settle(args)
    args.ckpt = args.ckpt or checkpoints.DEFAULT_CKPT["cuda"]
    published = args.ckpt in checkpoints.HUB_KINDS  # their configs are known: no need for the hub
    args.checkpoint = checkpoints.resolve(args.ckpt, args.random_weights or published)
    acceleration.settle(args)
    fill_in(args)
    if args.step_mask:
        try:
            step_mask.mask_of(args.step_mask, schedulers.evaluations(args))
        except ValueError as error:
            raise UserError(f"--step_mask {args.step_mask}: {error}") from None
    args.dtype = "torch.float32" if args.disable_bf16 else "torch.bfloat16"
    takes_image, size = args.checkpoint.defaults.takes_image, args.checkpoint.native_size
    args.pil_image = open_image(args) if takes_image else None
    if takes_image and args.pil_image is None:
        from PIL import Image

        args.pil_image = Image.new("RGB", (size, size))

    attention: Verdict = off("--disable_fa3")
    if not args.disable_fa3:
        attention = fa3.choose(
            machine,
            args.dtype,
            args.disable_quant,
            args.fa3_dtype,
            args.attention_backend,
            probe=lambda backend, fp8: (backend, ""),  # what would run if it were installed
            rotation=args.fa3_rotation,
        )
    if attention.state == "refused":
        raise UserError(attention.reason)
    off_by_flag = args.disable_quant or args.disable_bf16
    dtype = args.quant_dtype or "float8"
    linear = on(filter=args.quant_filter, dtype=dtype)
    if off_by_flag or quant.lacking(machine, dtype):
        linear = off(f"no {dtype}")
    text = on() if args.quant_text_encoder else not_given("--quant_text_encoder")
    if off_by_flag or quant.lacking(machine):
        text = off("no float8")
    args.plan = {"fa3": attention, "quant": linear, "text_quant": text}
    args.plan["subpixel_upsampling"] = subpixel_upsampling.check(args)
    return args


def _head(args, work: Work, precision, peaks: Peaks, why: str) -> str:
    call, vae = work.call, configs_of(args.checkpoint)["vae"]
    tokens = str(image_tokens(vae, (call.height, call.width)))
    if call.reference:
        height, width = call.reference
        assumed = "" if args.image else ", assumed"
        tokens += f" + {image_tokens(vae, call.reference)} (--image of {width}x{height}{assumed})"
    rates = ", ".join(f"{rate:.4g} {dtype}" for dtype, rate in peaks.tflop_per_s.items())
    ridges = " and ".join(f"{peaks.ridge(dtype):.0f} ({dtype})" for dtype in peaks.tflop_per_s)
    fast = {
        "block linear layers": precision.linear,
        "attention": precision.attention,
        "all other linear layers": precision.other,
        "T5's linear layers": precision.text,
    }
    names = {dtype: [n for n, d in fast.items() if d == dtype] for dtype in fast.values() if dtype}
    fewer = "".join(
        f"; {'float8' if dtype == 'fp8' else dtype}: {', '.join(who)}"
        for dtype, who in names.items()
    )
    return "\n".join(
        [
            f"checkpoint  {args.ckpt}, {args.checkpoint.kind}",
            f"call        {call.width}x{call.height} (width x height), {call.images} image(s), "
            f"{call.steps} evaluations{', each twice: true CFG' if call.true_cfg else ''}",
            f"tokens      {tokens} image, {call.text_tokens} text",
            f"precision   {precision.base}{fewer}",
            f"machine     {peaks.machine} ({why})",
            f"rates       {rates} TFLOP/s, {peaks.tb_per_s:.3g} TB/s: {peaks.source}",
            f"            bound by memory below {ridges} FLOP per byte",
        ]
    )


def duration(seconds: float | None) -> str:
    """Write seconds with three digits in the unit that suits."""
    if not seconds:
        return "-"
    units = (("s", 1), ("ms", 1e3))
    unit, factor = next((u for u in units if seconds * u[1] >= 1), ("us", 1e6))
    return f"{significant(seconds * factor)} {unit}"


def amount(value: float) -> str:
    """Write a count with three digits and its prefix; "-" for none."""
    if not value:
        return "-"
    return si(value, "").strip() if value >= 1e3 else f"{value:g}"


def cells(layer: Layer, peaks: Peaks) -> dict[str, str]:
    """Give a layer's row, by column."""
    flop, moved = layer.flop * layer.count, layer.bytes * layer.count
    times = times_s(layer, peaks)
    floor = duration(None if times is None else max(times))
    return {
        "part": layer.part,
        "layer": layer.name,
        "n": str(layer.count),
        "shape": layer.shape,
        "dtype": layer.dtype,
        "parameters": amount(layer.parameters * layer.count),
        "FLOP": amount(flop),
        "bytes": amount(moved),
        "FLOP/B": significant(flop / moved) if flop else "-",
        "bound by": bound(layer, peaks),
        "floor": f"({floor})" if layer.kind == "elementwise" else floor,
    }


def _component(name: str, work: Work, peaks: Peaks) -> str:
    layers = work.layers[name]
    stage = next(stage for stage, parts in STAGES.items() if name in parts)
    often = f"{work.runs(stage)} times a call" if work.runs(stage) > 1 else "once a call"
    title = (
        f"{name.upper().replace('_', ' ')}, {often}: {amount(total(layers, 'parameters'))} "
        f"parameters, {amount(total(layers, 'flop'))} FLOP, floor "
        f"{duration(floor_s(layers, peaks))}"
    )
    rows = [tuple(cells(layer, peaks).values()) for layer in layers]
    return title + "\n" + aligned(HEADER, rows, LEFT)


def _stages(work: Work, peaks: Peaks) -> str:
    """Sum up the stages and the call."""
    rows, sums = [], [0, 0.0, 0.0]
    whole = [(work.runs(name), work.stage(name)) for name in STAGES]
    floors = [floor_s(layers, peaks) for _, layers in whole]
    call = None if None in floors else sum(n * f for (n, _), f in zip(whole, floors, strict=True))
    for name, (runs, layers), floor in zip(STAGES, whole, floors, strict=True):
        if layers:
            flop, passes = total(layers, "flop"), elementwise_s(layers, peaks)
            share = "-" if call is None else f"{100 * runs * floor / call:.1f} %"
            row = (name, str(runs), amount(flop), duration(floor), main_bound(layers, peaks))
            rows.append((*row, f"({duration(passes)})", share))
            sums = [sums[0] + runs * flop, sums[1] + runs * passes]
    rows.append(
        ("call", "1", amount(sums[0]), duration(call), "", f"({duration(sums[1])})", "100 %")
    )
    header = ("stage", "n", "FLOP of one", "floor of one", "bound by", "elementwise", "of the call")
    return aligned(header, rows, ("stage", "bound by"))


def aligned(header: tuple[str, ...], rows: list[tuple[str, ...]], left: tuple[str, ...]) -> str:
    """Set a table in columns; those named in `left` to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    out = []
    for line in lines:
        columns = zip(header, line, widths, strict=True)
        text = (cell.ljust(w) if name in left else cell.rjust(w) for name, cell, w in columns)
        out.append("  ".join(text).rstrip())
    return "\n".join(out)

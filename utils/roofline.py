"""How far a run is from the hardware's limit: its floor, and what it reached of it.

The floor of a layer is the longer of two times: its FLOP at the peak rate of the dtype that it runs
in, its bytes at the memory's rate. Floors of layers add up, since layers run one after the other.
Elementwise passes are kept apart (`elementwise_s`): a compiler may fuse them into the products on
either side, so they are no bound, but whoever leaves them separate pays that much on top.

A floor is given only for rates that are known: a data sheet's (utils/peaks.py) or measured ones.
With a step cache the floor stays that of computing every step, so that time over floor may fall
below 1: that is what the cache saves.
"""

from dataclasses import replace

from utils.layers import Layer, Precision, products, total
from utils.peaks import Peaks
from utils.random_weights import configs_of
from utils.schedulers import evaluations
from utils.steps.quant import precision
from utils.steps.step_mask import mask_of
from utils.work import STAGES, Call, Work, count


def times_s(layer: Layer, peaks: Peaks) -> tuple[float, float] | None:
    """Give a layer's two times, of arithmetic and of memory; None for a dtype without a rate."""
    memory = layer.count * layer.bytes / (peaks.tb_per_s * 1e12)
    if not layer.flop:
        return 0.0, memory
    rate = peaks.tflop_per_s.get(layer.dtype)
    return None if rate is None else (layer.count * layer.flop / (rate * 1e12), memory)


def bound(layer: Layer, peaks: Peaks) -> str:
    """Say what bounds a layer: "arithmetic" or "memory"; "" where its rate is unknown."""
    times = times_s(layer, peaks)
    return "" if times is None else "arithmetic" if times[0] >= times[1] else "memory"


def main_bound(layers, peaks: Peaks | None) -> str:
    """Say what bounds most of the floor of the products among the layers."""
    if floor_s(layers, peaks) is None:
        return ""
    by = {"arithmetic": 0.0, "memory": 0.0}
    for layer in products(layers):
        by[bound(layer, peaks)] += max(times_s(layer, peaks))
    return max(by, key=by.get)


def _sum(layers, peaks: Peaks | None, time) -> float | None:
    """Add up one time of every layer; None if that of any is unknown."""
    if peaks is None:
        return None
    found = [times_s(layer, peaks) for layer in layers]
    return None if None in found else sum(time(both) for both in found)


def floor_s(layers, peaks: Peaks | None) -> float | None:
    """Give the shortest time of the products among the layers, one after the other."""
    return _sum(products(layers), peaks, max)


def elementwise_s(layers, peaks: Peaks | None) -> float | None:
    """Give the time of the elementwise passes at the memory's rate, if nothing fuses them away."""
    return _sum([layer for layer in layers if layer.kind == "elementwise"], peaks, max)


def arithmetic_s(layers, peaks: Peaks | None) -> float | None:
    """Give the time of the FLOP alone, each at the peak rate of its dtype."""
    return _sum(products(layers), peaks, lambda both: both[0])


def rows_of(work: Work, peaks: Peaks | None, stages_s: dict, total_s: dict | None = None) -> dict:
    """Compare measured times with the work and its floor, per stage and for the whole call.

    `stages_s` and `total_s` are those of run_benchmark.py's rows: spreads with a "median";
    a stage without one (an image's encoding) has work and floor only. "call" is all of it.

    Returns: stage -> flop, bytes (of the products), elementwise_bytes, floor_s, elementwise_s,
    bound (of most of the floor), seconds, tflop_per_s, mfu (FLOP time at the dense peaks over
    seconds), time_over_floor; None where a rate or a time is unknown.
    """
    rows, parts = {}, []
    for name in STAGES:
        if not (layers := work.stage(name)):
            continue
        spread = stages_s.get(name) or {}
        rows[name] = _row([(1, layers)], peaks, spread.get("median"))
        parts.append((work.runs(name), layers))
    rows["call"] = _row(parts, peaks, (total_s or {}).get("median"))
    return rows


def _row(parts: list[tuple[int, list]], peaks: Peaks | None, seconds: float | None) -> dict:
    every = [replace(layer, count=runs * layer.count) for runs, layers in parts for layer in layers]
    flop, floor = total(every, "flop"), floor_s(every, peaks)
    arithmetic = arithmetic_s(every, peaks)

    def ratio(a: float | None, b: float | None) -> float | None:
        return float(f"{a / b:.6g}") if a is not None and b else None

    return {
        "flop": flop,
        "bytes": total(products(every), "bytes"),
        "elementwise_bytes": total(every, "bytes", "elementwise"),
        "floor_s": ratio(floor, 1),
        "elementwise_s": ratio(elementwise_s(every, peaks), 1),
        "bound": main_bound(every, peaks) or None,
        "seconds": seconds,
        "tflop_per_s": ratio(flop / 1e12, seconds),
        "mfu": ratio(arithmetic, seconds),
        "time_over_floor": ratio(seconds, floor),
    }


def precision_of(args) -> Precision:
    """Tell from the plan what runs in which dtype."""
    quant, fa3, text = (args.plan[name] for name in ("quant", "fa3", "text_quant"))
    linear = precision(quant)
    attention = fa3.settings["dtype"] if fa3.is_on else ""
    return Precision(
        base="fp32" if str(args.dtype) == "torch.float32" else "bf16",
        linear=linear,
        attention=attention if attention in ("fp8", "int8") else "",
        other=linear if quant.is_on and quant.settings["filter"] == "all" else "",
        text="fp8" if text.is_on else "",
    )


def call_of(args) -> Call:
    """Collect the shapes of the run's call; steps that a mask predicts are no work."""
    steps = evaluations(args)
    return Call.of(
        args,
        args.text_tokens,
        steps=sum(mask_of(args.step_mask, steps)) if args.step_mask else steps,
        modulation_once=args.modulation_once,
        subpixel_upsampling=args.plan["subpixel_upsampling"].is_on,
        true_cfg=args.true_cfg_scale is not None,
    )


def work_of(args) -> Work:
    """List the work of the run that `args` describes (after utils/prepare.py), without weights."""
    return count(configs_of(args.checkpoint), call_of(args), precision_of(args))

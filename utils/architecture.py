"""Write the tables of docs/architecture.md: python -m utils.architecture

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test fails when one is out of date.
"""

import math
from dataclasses import replace
from pathlib import Path

from utils import checkpoints
from utils.benchmark_utils import Parser
from utils.errors import run_script
from utils.explain import amount, cells, duration
from utils.layers import Precision, products, total
from utils.peaks import CARDS
from utils.random_weights import SCHEDULER, configs_of
from utils.readme import render as fill
from utils.report_table import piped, significant
from utils.roofline import elementwise_s, floor_s, main_bound, rows_of
from utils.work import Call, Work, count, image_tokens

PAGE = Path(__file__).resolve().parent.parent / "docs" / "architecture.md"
H200 = CARDS["H200"].peaks
BF16 = Precision()
FLOAT8 = Precision(linear="fp8", attention="fp8")  # what the stack does on Hopper
SCHNELL = "black-forest-labs/FLUX.1-schnell"
DEV = "black-forest-labs/FLUX.1-dev"
KONTEXT = "black-forest-labs/FLUX.1-Kontext-dev"
NAMES = {SCHNELL: "Schnell", DEV: "Dev", KONTEXT: "Kontext"}
NAMES |= {name: name for name in checkpoints.BUNDLED}
KINDS = ("linear", "attention", "modulation", "elementwise")


def work_for(name: str, precision: Precision = BF16) -> Work:
    """List the work of a checkpoint's own call: its native size, steps and text length, 1 image."""
    checkpoint = checkpoints.resolve(name, random_weights=True)
    kind, size = checkpoint.defaults, checkpoint.native_size
    reference = (size, size) if kind.takes_image else None
    call = Call(size, size, kind.max_sequence_length, kind.steps, reference=reference)
    return count(configs_of(checkpoint), call, precision)


def components() -> str:
    """List the four networks: what goes in and out, weights, work and floor."""
    shapes = {
        "clip": ("CLIP-L", "(1, 77) ids", "(1, 768)"),
        "t5": ("T5-XXL encoder", "(1, 512) ids", "(1, 512, 4096)"),
        "vae_encoder": ("VAE encoder (Kontext)", "(1, 3, 1024, 1024)", "(1, 16, 128, 128)"),
        "transformer": ("transformer, one step", "(1, 4096, 64)", "(1, 4096, 64)"),
        "vae_decoder": ("VAE decoder", "(1, 16, 128, 128)", "(1, 3, 1024, 1024)"),
    }
    found = work_for(DEV).layers | {"vae_encoder": work_for(KONTEXT).layers["vae_encoder"]}
    rows = []
    for part, (name, into, out) in shapes.items():
        layers = found[part]
        weights = total(layers, "parameters")
        rows.append(
            (
                name,
                into,
                out,
                f"{weights:,}",
                f"{2 * weights / 2**30:.2f}",
                f"{total(layers, 'flop'):,}",
                duration(floor_s(layers, H200)),
                main_bound(layers, H200),
                duration(elementwise_s(layers, H200)),
            )
        )
    header = ("network", "in", "out", "parameters", "GiB", "FLOP", "floor", "bound by")
    return piped((*header, "elementwise"), rows)


def step() -> str:
    """Split one step of Dev by part and kind, in bf16 and in float8."""
    plain, fast = (work_for(DEV, precision).layers["transformer"] for precision in (BF16, FLOAT8))
    parts = dict.fromkeys(layer.part for layer in plain)
    rows = []
    for part, kind in ((part, kind) for part in parts for kind in KINDS):
        here = [[x for x in side if (x.part, x.kind) == (part, kind)] for side in (plain, fast)]
        if not here[0]:
            continue
        flop, moved = total(here[0], "flop"), total(here[0], "bytes")
        floor = elementwise_s if kind == "elementwise" else floor_s
        rows.append(
            (
                part,
                kind,
                amount(total(here[0], "parameters")),
                amount(flop),
                amount(moved),
                significant(flop / moved) if flop else "-",
                *(duration(floor(side, H200)) for side in here),
            )
        )
    sums = [duration(floor_s(side, H200)) for side in (plain, fast)]
    passes = [duration(elementwise_s(side, H200)) for side in (plain, fast)]
    rows.append(("**all products**", "", *_sum(products(plain)), "", *sums))
    rows.append(("**all elementwise passes**", "", "", "", "", "", *passes))
    header = ("part", "kind", "parameters", "FLOP", "bytes", "FLOP/B", "bf16 floor", "float8 floor")
    return piped(header, rows)


def _sum(layers) -> tuple[str, str, str]:
    return tuple(amount(total(layers, what)) for what in ("parameters", "flop", "bytes"))


def _block(part: str) -> str:
    """List the layers of one block of Dev, in the order in which they run."""
    columns = ("layer", "n", "shape", "parameters", "FLOP", "bytes", "FLOP/B", "bound by", "floor")
    layers = [layer for layer in work_for(DEV).layers["transformer"] if layer.part == part]
    blocks = next(layer.count for layer in layers if layer.kind == "attention")
    rows = [cells(replace(layer, count=layer.count // blocks), H200) for layer in layers]
    return piped(columns, [tuple(row[column] for column in columns) for row in rows])


def double_block() -> str:
    """List the layers of one of the 19 double blocks."""
    return _block("double blocks")


def single_block() -> str:
    """List the layers of one of the 38 single blocks."""
    return _block("single blocks")


def decoder() -> str:
    """Sum up the VAE decoder's blocks."""
    layers, rows = work_for(DEV).layers["vae_decoder"], []
    for part in dict.fromkeys(layer.part for layer in layers):
        here = [layer for layer in layers if layer.part == part]
        shapes = [layer.shape for layer in here if layer.name.startswith("conv")]
        rows.append(
            (
                part,
                "; ".join(dict.fromkeys((shapes[0], shapes[-1]))),
                amount(total(here, "parameters")),
                amount(total(here, "flop")),
                duration(floor_s(here, H200)),
                duration(elementwise_s(here, H200)),
            )
        )
    header = ("part", "first and last convolution", "parameters", "FLOP", "floor", "elementwise")
    return piped(header, rows)


def variants() -> str:
    """Set the published checkpoints and the bundled ones side by side."""
    facts = {name: _facts(name) for name in NAMES}
    header = ("", *(NAMES[name] for name in facts))
    keys = facts[DEV]
    return piped(header, [(key, *(fact[key] for fact in facts.values())) for key in keys])


def _facts(name: str) -> dict[str, str]:
    checkpoint = checkpoints.resolve(name, random_weights=True)
    configs, kind, work = configs_of(checkpoint), checkpoint.defaults, work_for(name)
    transformer = work.layers["transformer"]
    vae, t5 = configs["vae"], configs["text_encoder_2"]
    tokens = image_tokens(vae, (work.call.height, work.call.width))
    heads = next(layer.shape for layer in transformer if layer.kind == "attention").split(" x ")
    blocks = {
        part: next(x.count for x in transformer if x.part == part and x.kind == "attention")
        for part in ("double blocks", "single blocks")
    }
    flop = total(transformer, "flop")
    guided = "guidance" in " ".join(layer.name for layer in transformer)
    floors = [
        duration(rows_of(work_for(name, precision), H200, {})["call"]["floor_s"])
        for precision in (BF16, FLOAT8)
    ]
    text = [*work.layers["t5"], *work.layers["clip"]]
    return {
        "pixels": f"{work.call.width}x{work.call.height}",
        "steps": str(kind.steps),
        "guidance embedding": f"yes, {kind.guidance}" if guided else "no",
        "text tokens": str(work.call.text_tokens),
        "image tokens": f"{tokens} + {tokens} reference" if work.call.reference else str(tokens),
        "double + single blocks": " + ".join(str(n) for n in blocks.values()),
        "width d = heads x head": f"{int(heads[1]) * int(heads[3])} = {heads[1]} x {heads[3]}",
        "T5 blocks, width": f"{t5['num_layers']}, {t5['d_model']}",
        "VAE channels": " ".join(str(c) for c in vae["block_out_channels"]),
        "transformer parameters": amount(total(transformer, "parameters")),
        "text encoder parameters": amount(total(text, "parameters")),
        "FLOP of a step": amount(flop),
        "of it attention": f"{100 * total(transformer, 'flop', 'attention') / flop:.0f} %",
        "floor of a call, bf16": floors[0],
        "floor of a call, float8": floors[1],
    }


def machines() -> str:
    """List the known machines: rates, where memory stops being the bound, floors of two calls.

    The float8 floors are those of what the stack runs there: attention in float8 on Hopper only.
    """
    rows = []
    for name, card in CARDS.items():
        peaks = card.peaks
        rates = [peaks.tflop_per_s.get(dtype) for dtype in ("bf16", "fp8")]
        ridges = [peaks.ridge(dtype) for dtype in ("bf16", "fp8")]
        fast = FLOAT8 if card.machine.is_hopper else replace(FLOAT8, attention="")
        floors = [
            rows_of(work_for(ckpt, precision), peaks, {})["call"]["floor_s"]
            for ckpt in (SCHNELL, DEV)
            for precision in (BF16, fast)
        ]
        rows.append(
            (
                name,
                *("-" if rate is None else f"{rate:g}" for rate in rates),
                f"{peaks.tb_per_s:g}",
                *("-" if ridge is None else f"{ridge:.0f}" for ridge in ridges),
                *(duration(floor) for floor in floors),
                peaks.source,
            )
        )
    header = (
        *("machine", "bf16 TFLOP/s", "fp8 TFLOP/s", "TB/s", "bf16 ridge", "fp8 ridge"),
        *("Schnell bf16", "Schnell float8", "Dev bf16", "Dev float8", "source"),
    )
    return piped(header, rows)


def shift(tokens: int, scheduler: dict) -> float | None:
    """Give mu of dynamic shifting for so many image tokens; None where the shift is constant.

    Source: diffusers, pipeline_flux.calculate_shift
    """
    if not scheduler["use_dynamic_shifting"]:
        return None
    least, most = scheduler["base_image_seq_len"], scheduler["max_image_seq_len"]
    slope = (scheduler["max_shift"] - scheduler["base_shift"]) / (most - least)
    return scheduler["base_shift"] + slope * (tokens - least)


def timesteps(steps: int, tokens: int, scheduler: dict) -> list[float]:
    """Give the timesteps of a call, 1000 at pure noise.

    Source: diffusers, FlowMatchEulerDiscreteScheduler.set_timesteps
    """
    mu = shift(tokens, scheduler)
    factor = scheduler["shift"] if mu is None else math.exp(mu)
    even = [1 - i / steps for i in range(steps)]
    return [1000 * factor * s / (1 + (factor - 1) * s) for s in even]


def schedule() -> str:
    """List the shift and the first steps of some sizes."""
    rows = []
    for name, kind, size in (
        ("Schnell", "schnell", 1024),
        ("Dev", "dev", 1024),
        ("Dev", "dev", 512),
        ("tiny-dev", "dev", 128),
    ):
        tokens, scheduler = (size // 16) ** 2, SCHEDULER[kind]
        mu = shift(tokens, scheduler)
        factor = scheduler["shift"] if mu is None else math.exp(mu)
        four = ", ".join(f"{t:.0f}" for t in timesteps(4, tokens, scheduler))
        rows.append(
            (
                f"{name}, {size}x{size}",
                str(tokens),
                "-" if mu is None else f"{mu:.3f}",
                f"{factor:.2f}",
                four,
            )
        )
    return piped(("call", "image tokens", "mu", "shift", "timesteps of 4 steps"), rows)


SECTIONS = {
    "components": components,
    "step": step,
    "double_block": double_block,
    "single_block": single_block,
    "schedule": schedule,
    "decoder": decoder,
    "variants": variants,
    "machines": machines,
}


def render(text: str) -> str:
    """Put every generated section into the text between its markers; ValueError without them."""
    return fill(text, SECTIONS, PAGE.name)


def main() -> None:
    """Write the page's tables; there is nothing to choose."""
    Parser(description=__doc__.split("\n\n")[0]).parse_args()
    PAGE.write_text(render(PAGE.read_text()))


if __name__ == "__main__":
    run_script(main)

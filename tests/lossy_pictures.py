"""What each lossy number format does to the pictures of the trained checkpoints, on a CPU.

    python -m tests.lossy_pictures --ckpt tiny-dev   # a row a format, to results/quality/cpu.jsonl
    python -m tests.lossy_pictures --ckpt tiny-dev --format "int8 attention"   # this row alone
    python -m tests.lossy_pictures --table           # the table of docs/performance.md
    python -m tests.lossy_pictures --table --variants   # both also for tests/lossy_variants.py

Casts and scales are those of a GPU (tests/emulation.py; attention by the twins in utils/kernels/),
sums are fp32, so a GPU's pictures differ from these by rounding. Scores are those of any row: eight
pictures against bf16 eager's, with another seed's distance for scale.
"""

import argparse
import copy
import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from tests import emulation
from tests.lossy_variants import attention, behind_gelu, by_block, by_row, linears, rotation, static
from utils import card, results
from utils.kernels import attention_processor
from utils.kernels.rotation import rotate_heads
from utils.steps import on, text_padding

CKPTS = ("tiny-schnell", "tiny-dev", "tiny-kontext")
RESULTS = Path(__file__).parents[1] / "results/quality/cpu.jsonl"
E4M3 = {"dtype": "e4m3fn", "granularity": "row"}
LINEAR = on(False, filter="blocks", **E4M3)
ATTENTION = on(False, backend="fa3", dtype="fp8")
UNSCALED = on(False, backend="fa3", dtype="fp8", scale="none")
ROTATED = on(False, backend="fa3", dtype="fp8", rotation="Hadamard")
ALL = on(False, filter="all", **E4M3 | {"granularity": "tensor"})
FORMATS = {  # the steps that are on
    "float8 Linears (row)": {"quant": LINEAR},
    "float8 Linears (tensor)": {
        "quant": on(False, **E4M3 | {"granularity": "tensor"}, filter="blocks")
    },
    "float8 for every Linear (tensor)": {"quant": ALL},
    "float8 attention": {"fa3": ATTENTION},
    "float8 Linears (row) and attention": {"quant": LINEAR, "fa3": ATTENTION},
    "float8 attention, rotated": {"fa3": ROTATED},
    "float8 Linears (row) and attention, rotated": {"quant": LINEAR, "fa3": ROTATED},
    "as flux-fast: every Linear (tensor), attention unscaled": {"quant": ALL, "fa3": UNSCALED},
    "int8 attention": {"fa3": on(False, backend="int8", dtype="int8")},
    "T5 in float8": {"text_quant": on(False, **E4M3)},
    "MXFP8 Linears": {"quant": on(False, granularity="block", filter="blocks", dtype="mxfp8")},
    "NVFP4 Linears": {
        "quant": on(False, granularity="block", filter="blocks", dtype="nvfp4", cast="torch")
    },
    "text padding dropped": {"text_padding": on(False, multiple=text_padding.MULTIPLE)},
}
PLAIN = on(True, backend="sdpa", dtype="bf16")


def _turned(x: torch.Tensor) -> torch.Tensor:
    return by_row(rotate_heads(x))


TURNED = partial(linears, weights=_turned, activations=_turned)


def _rounded_otherwise(largest: float):
    """Round to within 3 % as precisely as with 448: how large a difference between rows is none."""
    rows = partial(by_row, largest=largest)
    return {}, partial(linears, weights=rows, activations=rows)


KERNELS = {"fa3": PLAIN, "fused_kernels": on(float8=True), "quant": LINEAR, "triton_float8": on()}
BLOCKWISE = partial(
    linears,
    weights=partial(by_block, rows=128, columns=128),
    activations=partial(by_block, rows=1, columns=128),
)
VARIANTS = {  # the steps that are on, and what is changed then
    "Linears (row), largest number 416, not 448": _rounded_otherwise(416),
    "Linears (row), largest number 384, not 448": _rounded_otherwise(384),
    "Linears, activations: a scale per tensor": ({}, partial(linears, activations=by_block)),
    "Linears, activations: a static scale": ({}, static),
    "Linears, our kernels": (KERNELS, None),
    "Linears, our kernels, static behind GELU": (KERNELS, behind_gelu),
    "Linears: scales of 1x128 and 128x128": ({}, BLOCKWISE),
    "Linears, rotated": ({}, TURNED),
    "Linears and attention, rotated": ({"fa3": ROTATED}, TURNED),
    "attention: Q alone": ({"fa3": PLAIN}, partial(attention, parts=("q",))),
    "attention: K alone": ({"fa3": PLAIN}, partial(attention, parts=("k",))),
    "attention: V alone": ({"fa3": PLAIN}, partial(attention, parts=("v",))),
    "attention: softmax alone": ({"fa3": PLAIN}, partial(attention, parts=("softmax",))),
    "attention, mixed: 8 neighbours": ({"fa3": ROTATED}, partial(rotation, channels=8, apart=1)),
    "attention, mixed: 4, 32 apart": ({"fa3": ROTATED}, partial(rotation, channels=4, apart=32)),
    "attention, mixed: all 128": ({"fa3": ROTATED}, partial(rotation, channels=128, apart=1)),
}


def settled(ckpt: str):
    """Settle a run of a bundled checkpoint on a CPU."""
    from utils.benchmark_utils import create_parser
    from utils.checkpoints import BUNDLED_DIR
    from utils.prepare import prepare

    image = ["--image", str(BUNDLED_DIR / "source.png")] * (ckpt == "tiny-kontext")
    args = create_parser().parse_args(["--device", "cpu", "--ckpt", ckpt, *image])
    prepare(args)
    return args


def _cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x.to(torch.float8_e4m3fn), x.new_ones((x.shape[0], x.shape[2]), dtype=torch.float32)


def measure(args, prompts: list[str], plan: dict, kept: dict, change=None) -> dict:
    """Draw the prompts with these steps on, and compare them with the reference.

    `change`: one of tests/lossy_variants.py's.
    Returns: scores, as utils/reference.py gives them.
    """
    from utils import quality, reference
    from utils.pipeline_utils import STEPS, load_pipeline

    pipeline, args = load_pipeline(args), copy.copy(args)
    args.plan = args.plan | plan
    unscaled = "fa3" in plan and plan["fa3"].settings.get("scale") == "none"
    with ExitStack() as stack:
        for part in ("float8", "products", "blocks", "softmax"):
            stack.enter_context(getattr(emulation, part)())
        if unscaled:
            stack.enter_context(mock.patch.object(attention_processor, "quantize_heads", _cast))
        for step in STEPS:
            if step.NAME in plan:
                step.apply(pipeline, args)
        if change:
            stack.enter_context(change(pipeline, args))
        result = quality.run(pipeline, args, prompts)
    return reference.scores(result, kept, args, prompts)


def table(rows: list[dict], names=FORMATS) -> str:
    """Render rows in Markdown: a line a format, two columns a checkpoint."""
    kinds = list(dict.fromkeys(row["ckpt"] for row in rows))
    lines = ["| format | " + " | ".join(f"{kind}, dB | latents" for kind in kinds) + " |"]
    lines.append("| --- |" + " --- | --- |" * len(kinds))
    for name in names:
        cells = []
        for kind in kinds:
            (row,) = (row for row in rows if (row["ckpt"], row["format"]) == (kind, name))
            q = row["quality"]
            above = q["psnr_db_mean"] - q["other_seed_psnr_db"]
            cells.append(f"{q['psnr_db_mean']:.1f} ({q['psnr_db_worst']:.1f}), +{above:.0f}")
            cells.append(f"{q['fp32_relative_l2'] / q['eager_fp32_relative_l2']:.1f}x")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure every format or variant on one checkpoint, or print their table."""
    from utils import reference
    from utils.pipeline_utils import load_pipeline
    from utils.prompts import quality_prompts

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", choices=CKPTS)
    what.add_argument("--table", action="store_true")
    parser.add_argument("--variants", action="store_true", help="these instead of the formats")
    parser.add_argument("--format", choices=FORMATS | VARIANTS, help="one of them (default: all)")
    own = parser.parse_args()
    names = VARIANTS if own.variants else FORMATS
    if own.table:
        print(table([json.loads(line) for line in RESULTS.read_text().splitlines()], names))
        return
    args = settled(own.ckpt)
    prompts = quality_prompts(args)
    kept, _ = reference.load_or_make(load_pipeline(args), args, prompts, with_fp32=True)
    about = {"command": card.command(), "commit": card.commit(), "versions": card.versions()}
    about["machine"] = args.machine.name
    for name in [own.format] if own.format else names:
        plan, change = VARIANTS.get(name) or (FORMATS[name], None)
        scores = measure(args, prompts, plan, kept, change)
        row = {"ckpt": own.ckpt, "format": name, "quality": scores, **about}
        print(name, scores["psnr_db_mean"], scores["psnr_db_worst"], flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        results.append(RESULTS, [row])


if __name__ == "__main__":
    main()

"""Write the README's tables from what they describe: python -m utils.readme

That of starts is in docs/packages.md, of GGUF files in docs/memory.md, all that was measured in
results/README.md. Each stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test fails when one
is out of date.
"""

from argparse import Namespace
from pathlib import Path

from utils import startup
from utils.benchmark_utils import Parser, flags_of_step
from utils.errors import run_script
from utils.hardware import Machine
from utils.pipeline_utils import STEPS
from utils.quiet import quiet_libraries
from utils.report import TABLES, fill, measured, summed_up
from utils.report_rows import get, read
from utils.report_table import piped
from utils.steps import compile, fa3, quant

README = Path(__file__).resolve().parent.parent / "README.md"
PACKAGES = README.parent / "docs" / "packages.md"
MEMORY = README.parent / "docs" / "memory.md"
GGUF = README.parent / "results" / "gguf" / "tiny-schnell.jsonl"
MACHINES = {  # what `hardware.detect` finds there; tests go through it
    "H100, H200": Machine("cuda", "NVIDIA H200", (9, 0)),
    "L20, L40S, RTX 4090": Machine("cuda", "NVIDIA L40S", (8, 9)),
    "A100": Machine("cuda", "NVIDIA A100-SXM4-80GB", (8, 0)),
    "B200": Machine("cuda", "NVIDIA B200", (10, 0)),
    "RTX 5090": Machine("cuda", "NVIDIA GeForce RTX 5090", (12, 0)),
    "T4": Machine("cuda", "Tesla T4", (7, 5)),
    "V100": Machine("cuda", "Tesla V100-SXM2-32GB", (7, 0)),
    "MI300X": Machine("cuda", "AMD Instinct MI300X", (9, 4), hip="7.0"),
    "CPU": Machine("cpu", "any"),
}


def steps() -> str:
    """List the steps in their order: what each does, and the flags that turn and tune it."""
    rows = []
    for step in STEPS:
        first = " ".join(step.__doc__.split("\n\n")[0].split())
        named = " ".join(f"`{flag}`" for flag in flags_of_step(step))
        rows.append((f"`{step.NAME}`", first.rstrip("."), named))
    return piped(("step", "what it does", "flags"), rows)


def choices(machine: Machine) -> tuple[str, ...]:
    """Tell what the steps choose on a machine when every package is installed there.

    Returns: attention, which other packages' kernels may be named, linear layers, which other
    numbers may be named, compile mode, shapes.
    """
    import torch

    attention = fa3.choose(machine, torch.bfloat16, probe=lambda backend, fp8: (backend, ""))
    backend = attention.settings["backend"]
    named = [
        name
        for name in fa3.INSTALL
        if name != backend and not fa3._expected(machine, name, fp32=False)
    ]
    args = Namespace(
        machine=machine,
        dtype=torch.bfloat16,
        disable_quant=False,
        gguf_file=None,
        swap_loras=False,
        quant_dtype=None,
        quant_granularity="row",
        quant_filter="blocks",
    )
    float8 = quant.check(args)
    return (
        f"{backend}, {attention.settings['dtype']}",
        ", ".join(named) or "-",
        float8.settings["dtype"] if float8.is_on else "unavailable",
        ", ".join(name for name in quant.BLOCK_FORMATS if not quant.lacking(machine, name)) or "-",
        compile.default_mode(machine, step_cache=False)[0],
        "dynamic" if compile.dynamic(machine) else "static first",
    )


def hardware() -> str:
    """List what is chosen on each kind of machine."""
    header = (
        *("machine", "attention (`fa3`)", "`--attention_backend`", "linear (`quant`)"),
        *("`--quant_dtype`", "default mode", "compiled shapes"),
    )
    return piped(header, [(name, *choices(machine)) for name, machine in MACHINES.items()])


def gguf() -> str:
    """List what each type and mode of a GGUF takes and gives, against the checkpoint in eager."""
    found = []
    for row in read(GGUF):
        about = get(row, "steps", "gguf", "settings") or {"types": "-", "mode": "the checkpoint"}
        scores, total = row["quality"], row["total_s"]
        found.append(
            (
                about["types"],
                about["mode"],
                f"{get(row, 'memory_gib', 'weights'):.3f}",
                f"{get(row, 'memory_gib', 'host_peak'):.2f}",
                f"{scores['psnr_db_mean']:.1f} (worst {scores['psnr_db_worst']:.1f})",
                f"{scores['latents_relative_l2']:.4f}",
                f"{total['median']:.2f} ({total['min']:.2f}-{total['max']:.2f})",
            )
        )
    header = ("matrices", "mode", "weights GiB", "host peak GiB", "PSNR dB", "latents' error")
    return piped((*header, "s per call"), found)


SECTIONS = {"steps": steps, "hardware": hardware, "measured": summed_up}
STARTS = {"starts": startup.measured}
FILES = {"gguf": gguf}
ROWS = {"measured": measured}


def render(text: str, sections: dict | None = None, where: str = "README") -> str:
    """Put every generated section into the text between its markers.

    Raises: ValueError if a marker is missing.
    """
    for name, section in (sections or SECTIONS).items():
        text = fill(text, name, section(), where)
    return text


def main() -> None:
    """Write every table into its page; there is nothing to choose."""
    Parser(description=__doc__.split("\n\n")[0]).parse_args()
    quiet_libraries()
    README.write_text(render(README.read_text()))
    PACKAGES.write_text(render(PACKAGES.read_text(), STARTS, PACKAGES.name))
    MEMORY.write_text(render(MEMORY.read_text(), FILES, MEMORY.name))
    TABLES.write_text(render(TABLES.read_text(), ROWS, "results/README.md"))


if __name__ == "__main__":
    run_script(main)

"""Write the README's tables from the code that they describe: python -m utils.readme

Each stands between `<!-- NAME -->` and `<!-- /NAME -->`; a test fails when one is out of date.
"""

import json
import re
from argparse import Namespace
from pathlib import Path

from utils.hardware import Machine
from utils.pipeline_utils import STEPS
from utils.quiet import quiet_libraries

README = Path(__file__).resolve().parent.parent / "README.md"
MACHINES = {  # what `hardware.detect` finds there; tests go through it
    "H100, H200": Machine("cuda", "NVIDIA H200", (9, 0)),
    "L20, L40S, RTX 4090": Machine("cuda", "NVIDIA L40S", (8, 9)),
    "A100": Machine("cuda", "NVIDIA A100-SXM4-80GB", (8, 0)),
    "B200": Machine("cuda", "NVIDIA B200", (10, 0)),
    "RTX 5090": Machine("cuda", "NVIDIA GeForce RTX 5090", (12, 0)),
    "V100, T4": Machine("cuda", "Tesla T4", (7, 5)),
    "MI300X": Machine("cuda", "AMD Instinct MI300X", (9, 4), hip="7.0"),
    "CPU": Machine("cpu", "any"),
}


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def steps() -> str:
    """List the steps in their order: what each does, and the flags that turn and tune it."""
    rows = []
    for step in STEPS:
        step.add_flags(_Recorder(flags := []))
        first = " ".join(step.__doc__.split("\n\n")[0].split())
        rows.append((f"`{step.NAME}`", first.rstrip("."), " ".join(f"`{f}`" for f in flags)))
    return _table(("step", "what it does", "flags"), rows)


class _Recorder:
    """Stands for a parser and notes the names of the flags that it is given."""

    def __init__(self, flags: list[str]):
        self.flags = flags

    def add_argument(self, name: str, **_) -> None:
        self.flags.append(name)


def choices(machine: Machine) -> tuple[str, ...]:
    """Tell what the steps choose on a machine when every package is installed there."""
    import torch

    from utils.steps import compile, fa3, quant

    attention = fa3.choose(machine, torch.bfloat16, probe=lambda backend, fp8: (backend, ""))
    args = Namespace(
        machine=machine,
        dtype=torch.bfloat16,
        disable_quant=False,
        quant_granularity="row",
        quant_filter="blocks",
    )
    float8 = quant.check(args)
    return (
        f"{attention.settings['backend']}, {attention.settings['dtype']}",
        float8.settings["dtype"] if float8.is_on else "unavailable",
        compile.default_mode(machine, step_cache=False)[0],
        "dynamic" if compile.dynamic(machine) else "static first",
    )


def hardware() -> str:
    """List what is chosen on each kind of machine."""
    header = ("machine", "attention (`fa3`)", "linear (`quant`)", "default mode", "compiled shapes")
    return _table(header, [(name, *choices(machine)) for name, machine in MACHINES.items()])


def measured() -> str:
    """List every committed row: what was run, its speed, its quality and its memory."""
    parts = []
    for file in sorted((README.parent / "results").glob("*.jsonl")):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        where = rows[0]["environment"]
        torch = where["versions"]["torch"]
        parts.append(
            f"{where['device']}, torch {torch} "
            f"([results/{file.name}](results/{file.name})); median (min-max) of one call:\n\n"
            + _table(
                ("command", "seconds", "ready after", "PSNR, dB", "latents' error", "peak, GiB"),
                [_measured_row(row) for row in rows],
            )
        )
    return "\n\n".join(parts)


def _measured_row(row: dict) -> tuple[str, ...]:
    total, quality = row["total_s"], row["quality"]
    psnr = quality["psnr_db_worst"]
    memory = row["memory_gib"]
    return (
        f"`{row['command'].removeprefix('python ')}`",
        f"{total['median']:.3f} ({total['min']:.3f}-{total['max']:.3f})",
        f"{row['load_s'] + row['optimize_s']:.1f} s",
        "identical" if psnr is None else f"{psnr:.1f}",
        f"{quality['latents_relative_l2']:.1e}",
        f"{memory.get('allocated_peak', memory['host_peak']):.2f}",
    )


SECTIONS = {"steps": steps, "hardware": hardware, "measured": measured}


def render(text: str) -> str:
    """Put every generated section into the text between its markers.

    Raises: ValueError if a marker is missing.
    """
    for name, section in SECTIONS.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README: no markers for {name}")
        text = pattern.sub(lambda found, s=section: found[1] + s() + "\n" + found[2], text)
    return text


if __name__ == "__main__":
    quiet_libraries()
    README.write_text(render(README.read_text()))

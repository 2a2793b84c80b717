"""What stands behind a row of a table: its stages against the roofline, its steps, its machine."""

from collections.abc import Callable

from utils.card import named
from utils.report_rows import MEMORY, OF_LOOP, distinct, get, name
from utils.report_series import Series
from utils.report_table import MISSING, si, significant, spread

STAGES = (  # in the order of a call; what is not listed comes last
    "prompt_encoding",
    "image_encoding",
    "before_the_loop",
    "denoising_step",
    "decoding",
    "postprocessing",
    "pil_conversion",
    "call",
)
LIMIT = "of the limit"  # the column that a page shows as a bar


def stage_table(series: Series) -> tuple[tuple[str, ...], list[tuple[str, list[tuple]]]]:
    """List per row where its time goes, stage by stage, and how far each is from the limit.

    Returns: the header of a stage's cells, and per row its name and its stages' cells: text, but
    for LIMIT's, a share or None. Columns of which no stage knows anything are left out.
    """
    rows = []
    for row in series.rows:
        known = {**(row.get("stages_s") or {}), **(row.get("roofline") or {})}
        stages = sorted(known, key=lambda stage: (*STAGES, stage).index(stage))
        if stages and not row.get("failed"):
            rows.append((name(row), [_stage(row, stage) for stage in stages]))
    cells = [stage for _, stages in rows for stage in stages]
    header = [
        key for key in (cells or [{}])[0] if any(c[key] not in (None, MISSING) for c in cells)
    ]
    return tuple(header), [
        (row, [tuple(stage[key] for key in header) for stage in stages]) for row, stages in rows
    ]


def _stage(row: dict, stage: str) -> dict[str, str | float | None]:
    work = get(row, "roofline", stage) or {}
    times = row.get("total_s") if stage == "call" else get(row, "stages_s", stage)
    seconds, floor = work.get("seconds"), work.get("floor_s")
    over = work.get("time_over_floor") or (seconds / floor if seconds and floor else None)
    rate, mfu = work.get("tflop_per_s"), work.get("mfu")
    loop = get(row, *OF_LOOP) if stage == "denoising_step" else None
    return {
        "stage": stage.replace("_", " ") + (f" ({loop})" if loop else ""),
        "ms": spread(times, 1e3) if times else _ms(seconds),
        LIMIT: 1 / over if over else None,
        "floor, ms": _ms(floor),
        "over floor": MISSING if over is None else f"{over:.2f}x",
        "MFU": MISSING if mfu is None else f"{100 * mfu:.0f} %",
        "TFLOP/s": MISSING if rate is None else significant(rate),
        "bound by": work.get("bound") or MISSING,
        "work": si(work.get("flop"), "FLOP"),
        "traffic": si(work.get("bytes"), "B"),
        "elementwise, ms": _ms(work.get("elementwise_s")),
    }


def _ms(seconds: float | None) -> str:
    return MISSING if seconds is None else significant(1e3 * seconds)


def facts(rows: list[dict]) -> list[tuple[str, str]]:
    """List what the machine and the software of some rows were; differing values side by side."""

    def values(*keys: str, write: Callable = str) -> str:
        return "; ".join(write(value) for value in distinct(rows, "environment", *keys))

    packages = dict.fromkeys(p for row in rows for p in get(row, "environment", "versions") or {})
    found = [
        ("device", values("device")),
        ("capability", values("capability", write=lambda pair: ".".join(map(str, pair)))),
        ("memory", values("memory_gib", write="{:g} GiB".format)),
        ("driver", values("driver")),
        ("power limit", values("power_limit_w", write="{:g} W".format)),
        ("clocks seen", values("clocks_mhz", write=_clocks)),
        ("threads", values("threads", write="{:g}".format)),
        ("variables", values("variables", write=named)),
        ("load when a row began", _range(distinct(rows, "environment", "load_average"))),
        ("system", values("os")),
        ("versions", ", ".join(f"{p} {values('versions', p)}" for p in packages)),
        ("commit", values("commit")),
    ]
    return [(key, value) for key, value in found if value]


def _range(loads: list[float]) -> str:
    """Write the least and the most; a row's own work is in that of the next."""
    return "-".join(dict.fromkeys(f"{end(loads):.1f}" for end in (min, max))) if loads else ""


def _clocks(clocks: dict) -> str:
    return "-".join(f"{clocks[k]:g}" for k in ("min", "max") if clocks.get(k) is not None) + " MHz"


def memory_text(row: dict) -> str:
    """List every memory figure of a row."""
    memory = row.get("memory_gib") or {}
    known = [(key, memory[key]) for key in MEMORY if memory.get(key) is not None]
    return ", ".join(f"{key.replace('_', ' ')} {gib:.2f} GiB" for key, gib in known)


def steps_text(row: dict) -> str:
    """List the steps that are on with their settings, then the others with why."""
    on, off = [], []
    for step, verdict in (row.get("steps") or {}).items():
        state = (verdict or {}).get("state")
        if state == "on":
            settings = (verdict.get("settings") or {}).items()
            said = " ".join(f"{k}={v}" for k, v in settings if k != "why")
            on.append(f"{step} ({said})" if said else step)
        else:
            why = (verdict or {}).get("reason")
            off.append(f"{step} ({why})" if why else step)
    lists = (("on", on), ("off", off))
    return "; ".join(f"{state}: {', '.join(steps)}" for state, steps in lists if steps)

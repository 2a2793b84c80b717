"""Rows as tables: what a reader wants to see of a row, as text, for Markdown and HTML alike."""

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from utils.card import named
from utils.compare import MIN_BETWEEN, MIN_EFFECT, is_identical, judge
from utils.report_rows import SESSION, distinct, get, is_same_session, name, samples
from utils.report_series import Series

MISSING = "-"
LEGEND = (
    "Seconds are the median of one call (min-max, number of timed runs), the speed-up is over the "
    "row eager of the same commit, ours is ahead by a peer's time over ours; in a selection a row "
    "is compared with the runs, before and after it, of the row it was tried on. PSNR and SSIM are "
    "those of the worst picture against bf16 eager with the same seed; in brackets, how far that "
    "PSNR stands above the PSNR of another seed. The latents' error is relative (L2), where it was "
    "measured from fp32, in brackets over bf16 eager's own; lossless allows 1.25. A CLIP score "
    "stands beside its distance from eager's. Peak memory is the device's, on a CPU the process's. "
    "Over floor is the time over the least that the machine's peak rates allow, MFU the share of "
    "its peak arithmetic. Ready after is loading, optimising and compiling."
)


class Code(str):
    """A cell to be set as code."""


@dataclass(frozen=True)
class Table:
    """A header and rows of cells of the same length."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def piped(header: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Set cells of Markdown between pipes."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def significant(value: float, like: float | None = None) -> str:
    """Write 0.035287 as 0.0353 and 123.4 as 123; with the decimals that `like` would get."""
    like = abs(value if like is None else like)
    decimals = 0 if like == 0 else max(0, 2 - math.floor(math.log10(like)))
    return f"{value:.{min(decimals, 12)}f}"


def si(value: float | None, unit: str) -> str:
    """Write 74.4e12 FLOP as 74.4 TFLOP."""
    if value is None:
        return MISSING
    for prefix, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if abs(value) >= factor:
            return f"{significant(value / factor)} {prefix}{unit}"
    return f"{significant(value / 1e3)} k{unit}"


def spread(times: dict | None, unit: float = 1.0, with_n: bool = True) -> str:
    """Write median (min-max, n)."""
    if not times or None in (times.get("median"), times.get("min"), times.get("max")):
        return MISSING
    median = times["median"] * unit
    low, mid, high = (significant(times[k] * unit, like=median) for k in ("min", "median", "max"))
    n = f", n {times['n']:g}" if with_n and times.get("n") is not None else ""
    return f"{mid} ({low}-{high}{n})"


def seconds(row: dict) -> str:
    if failed := row.get("failed"):
        return f"failed: {' '.join(failed.split())}"
    return spread(row["total_s"])


def ratio(row: dict, base: dict | None) -> float | None:
    """Give how many times faster than the base a row is; None across sessions."""
    if base is None or row.get("failed") or not is_same_session(row, base):
        return None
    return base["total_s"]["median"] / row["total_s"]["median"]


def _worth(row: dict, base: dict | None) -> str:
    """Say what the step that a row leaves out is worth: the time that its absence costs."""
    if base is None or row is base or ratio(row, base) is None:
        return MISSING
    with_it, without = base["total_s"]["median"], row["total_s"]["median"]
    decimals = len(significant(with_it).partition(".")[2])
    return f"{without - with_it:+.{decimals}f} s, {without / with_it:.2f}x{_doubt(base, row)}"


def gain(row: dict) -> float | None:
    """Give how many times faster a row is than the one it was tried on, before and after it."""
    if row.get("failed") or not row.get("without_s"):
        return None
    return row["without_s"]["median"] / row["total_s"]["median"]


def _gain(row: dict) -> str:
    if (times := gain(row)) is None:
        return MISSING
    return f"{times:.3f}x {row['base']}{_doubt({'total_s': row['without_s']}, row, MIN_BETWEEN)}"


def _doubt(a: dict, b: dict, least: float = MIN_EFFECT) -> str:
    verdict = judge(samples(a), samples(b), least=least).verdict
    notes = {"unchanged": " (within the spread)", "cannot tell": " (too few runs to tell)"}
    return notes.get(verdict, "")


def psnr(row: dict) -> str:
    quality = row.get("quality") or {}
    worst, other, ssim = (
        quality.get(k) for k in ("psnr_db_worst", "other_seed_psnr_db", "ssim_worst")
    )
    if is_identical(quality):
        return "identical"
    if worst is None:
        return MISSING
    above = "" if other is None else f" ({worst - other:+.0f})"
    return f"{worst:.1f}{above}" + ("" if ssim is None else f" / {ssim:.4f}")


def _latents(row: dict) -> str:
    exact, eager, relative = (
        get(row, "quality", k)
        for k in ("fp32_relative_l2", "eager_fp32_relative_l2", "latents_relative_l2")
    )
    if exact is not None:
        over = f" ({exact / eager:.2f}x)" if eager else ""
        return f"{exact:.1e}{over}"
    return MISSING if relative is None else f"{relative:.1e} from eager"


def _checker(row: dict) -> str:
    right = get(row, "quality", "checker_right")
    return MISSING if right is None else f"{100 * right:.0f} %"


def _clip(row: dict) -> str:
    found, eager = (get(row, "quality", k) for k in ("clip_score", "eager_clip_score"))
    return MISSING if None in (found, eager) else f"{found:.2f} ({found - eager:+.2f})"


def loss(row: dict) -> str:
    """Say whether a row is lossless or lossy."""
    return {True: "lossless", False: "lossy"}.get(row.get("lossless"), MISSING)


def peak_gib(row: dict) -> float | None:
    """Give the peak on the device; where there is none, the process's. Units: GiB."""
    memory = row.get("memory_gib") or {}
    found = (memory.get("allocated_peak"), memory.get("host_peak"))
    return next((gib for gib in found if gib is not None), None)


def peak(row: dict) -> str:
    gib = peak_gib(row)
    return MISSING if gib is None else f"{gib:.2f}"


def _floor(row: dict) -> str:
    over, mfu = (get(row, "roofline", "call", k) for k in ("time_over_floor", "mfu"))
    parts = [f"{over:.2f}x"] if over is not None else []
    parts += [f"{100 * mfu:.0f} %"] if mfu is not None else []
    return " / ".join(parts) or MISSING


def _ready(row: dict) -> str:
    load, optimize = row.get("load_s"), row.get("optimize_s")
    return MISSING if None in (load, optimize) else f"{load + optimize:.1f} s"


def table(series: Series) -> Table:
    """Put a series into a table; columns of which no row knows anything are left out."""
    if series.kind == "single":
        return _single(series)

    def speedup(row: dict) -> str:
        times = ratio(row, series.base)
        return MISSING if times is None else f"{times:.2f}x"

    def ahead(row: dict) -> str:
        times = None if row is series.base else ratio(row, series.base)
        return MISSING if times is None else f"{1 / times:.2f}x"

    second = {
        "ladder": ("speed-up", speedup),
        "leave_one_out": ("worth of the step", lambda row: _worth(row, series.base)),
        "peers": ("ours is ahead", ahead),
        "forward_selection": ("times as fast as", _gain),
    }
    columns: list[tuple[str, Callable[[dict], str]]] = [
        ("row", name),
        ("seconds", seconds),
        second[series.kind],
        ("PSNR, dB / SSIM", psnr),
        ("latents' error", _latents),
        ("checker", _checker),
        ("CLIP score", _clip),
        ("picture", loss),
        ("peak, GiB", peak),
        ("over floor / MFU", _floor),
        ("ready after", _ready),
    ]
    filled = [(title, [cell(row) for row in series.rows]) for title, cell in columns]
    filled = [(title, cells) for title, cells in filled if any(c != MISSING for c in cells)]
    rows = zip(*(cells for _, cells in filled), strict=True)
    return Table(tuple(title for title, _ in filled), tuple(rows))


def _single(series: Series) -> Table:
    """Give single runs columns of their own: their command names them, none is another's base."""

    def worst_psnr(row: dict) -> str:
        worst = get(row, "quality", "psnr_db_worst")
        return psnr(row) if worst is None else f"{worst:.1f}"

    def three_digits(row: dict) -> str:
        if row.get("failed"):
            return seconds(row)
        return "{median:.3f} ({min:.3f}-{max:.3f})".format(**row["total_s"])

    def error(row: dict) -> str:
        found = get(row, "quality", "latents_relative_l2")
        return MISSING if found is None else f"{found:.1e}"

    header = ("command", "seconds", "ready after", "PSNR, dB", "latents from eager", "peak, GiB")
    rows = []
    for row in series.rows:
        command = Code(name({**row, "row": None}))
        timed, scores = (three_digits(row), _ready(row)), (worst_psnr(row), error(row))
        rows.append((command, *timed, *scores, peak(row)))
    return Table(header, tuple(rows))


def title(series: Series) -> str:
    """Say what a series is."""
    kinds = {
        "ladder": "Ladder, one step more per row: ",
        "leave_one_out": "Everything on but one step: ",
        "peers": "Beside other projects on the same call: ",
        "forward_selection": "Forward selection, one flag more per row, kept if it pays: ",
        "single": "Single runs",
    }
    return kinds[series.kind] + series.call


def notes(series: Series) -> list[str]:
    """Say what a reader has to know about some of the rows."""
    found = {}
    for row in series.rows:
        if source := get(row, "quality", "quality_source"):
            found.setdefault(f"quality measured elsewhere: {source}", []).append(name(row))
        elif get(row, "call", "random_weights"):
            found.setdefault("random weights, the pictures mean nothing", []).append(name(row))
        if failed := row.get("failed_rounds"):
            said = f"{len(failed)} of {row['rounds']} rounds failed: {failed[-1]}"
            found.setdefault(said, []).append(name(row))
    sessions = {
        "commit": "measured at commit {}",
        "threads": "measured with {} thread(s)",
        "variables": "measured with the variables {}",
    }
    differ = [key for key in SESSION if len(distinct(series.rows, "environment", key)) > 1]
    differ = differ if series.kind != "single" else []
    for key, row in itertools.product(differ, series.rows):
        value = get(row, "environment", key)
        value = "unknown" if value is None else value
        value = (named(value) or "none") if isinstance(value, dict) else value
        found.setdefault(sessions[key].format(value), []).append(name(row))
    every = len(series.rows)
    lines = [
        f"{'All rows' if len(names) == every else ', '.join(names)}: {' '.join(text.split())}."
        for text, names in found.items()
    ]
    if differ:
        lines.append(f"No ratio is given across {' or '.join(SESSION[key] for key in differ)}.")
    return lines

"""Sum up the ladders for the README: eager beside the fastest row, and what that one costs."""

from utils.report_rows import device, name
from utils.report_series import Series, series_of
from utils.report_table import Table, loss, peak, psnr, ratio, seconds

HEADER = (
    *("machine", "call", "eager, s", "fastest row, s", "its speed-up", "PSNR, dB", "picture"),
    "peak, GiB",
)


def fastest(series: Series) -> dict | None:
    """Find the row that is furthest ahead of the baseline; None for rows of several sessions."""
    timed = [row for row in series.rows if not row.get("failed")]
    if not timed or any(ratio(row, series.base) is None for row in timed):
        return None
    return max(timed, key=lambda row: ratio(row, series.base))


def summary(results: dict[str, list[dict]]) -> Table:
    """Give a line per ladder that one session measured. `results`: file name to its rows"""
    lines = []
    for rows in results.values():
        for series in series_of(rows):
            if series.kind != "ladder" or (best := fastest(series)) is None:
                continue
            lines.append(
                (
                    device(rows),
                    series.call,
                    seconds(series.base),
                    f"{name(best)}: {seconds(best)}",
                    f"{ratio(best, series.base):.2f}x",
                    psnr(best),
                    loss(best),
                    peak(best),
                )
            )
    return Table(HEADER, tuple(lines))

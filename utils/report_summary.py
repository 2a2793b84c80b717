"""Sum up the ladders for the README: eager beside the fastest row, and what that one costs."""

from utils.report_rows import device, name
from utils.report_series import Series, series_of
from utils.report_table import Table, loss, peak, psnr, ratio, seconds

HEADER = (
    *("machine", "call", "eager, s", "fastest row, s", "its speed-up", "PSNR, dB", "picture"),
    "peak, GiB",
)


def fastest(series: Series) -> dict | None:
    """Find the row that is furthest ahead of the baseline, among those of its session."""
    timed = [(ratio(row, series.base), at) for at, row in enumerate(series.rows)]
    timed = [pair for pair in timed if pair[0] is not None]
    return series.rows[max(timed)[1]] if timed else None


def summary(results: dict[str, list[dict]]) -> Table:
    """Give a line per ladder of every results file. `results`: file name to its rows"""
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

"""Sort rows into ladders, leave-one-outs and single runs, each row once.

A row may stand in its file several times: measured in rounds, which are pooled; again, at a later
commit, which replaces what was there; or failed at first.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

from utils.report_rows import apart, get, name

KINDS = ("ladder", "leave_one_out", "peers", "forward_selection")


def call_text(row: dict) -> str:
    """Describe the call of a row, as far as it decides the time."""
    if not (call := row.get("call")):
        return "unknown call"
    count = int(len(call.get("prompt") or [""]) * (call.get("num_images_per_prompt") or 1))
    steps = call.get("num_inference_steps")
    parts = [
        call.get("ckpt") or "?",
        f"{call['width']:g}x{call['height']:g}" if call.get("width") and call.get("height") else "",
        f"{steps:g} steps" if steps else "",
        f"{count} image{'s' if count > 1 else ''}",
        f"guidance {call['guidance_scale']:g}" if call.get("guidance_scale") is not None else "",
        f"{call['max_sequence_length']:g} text tokens" if call.get("max_sequence_length") else "",
        "random weights" if call.get("random_weights") else "",
        f"with {row['with']}" if row.get("with") else "",
    ]
    return ", ".join(filter(None, parts))


@dataclass(frozen=True)
class Series:
    """Rows that belong into one table."""

    kind: str  # one of KINDS, or "single"
    call: str
    rows: tuple[dict, ...]
    base: dict | None  # the row that the others are measured against, if it was timed


def series_of(rows: list[dict]) -> list[Series]:
    """Sort rows into one series per kind and call, in the order in which the file begins them.

    A ladder is measured against its row "eager" (fp32 may come before it), or its first; peers
    against ours; a selection against what was typed. What leaving a step out costs is measured
    against the series' own row with everything on (one that does not begin with "without"), or the
    last rung of the ladder of the same call.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    series = completed([row for row in rows if row.get("series") in KINDS])
    for row in newest(series, lambda row: (row["series"], call_text(row), name(row))):
        groups.setdefault((row["series"], call_text(row)), []).append(row)
    found: list[Series] = []
    for (kind, call), group in sorted(groups.items(), key=lambda item: item[0][0] != "ladder"):
        if kind == "forward_selection":
            group = _with_neighbours(group, [row for row in series if call_text(row) == call])
        ordered = sorted(group, key=lambda row: row.get("position") or 0)
        if kind == "ladder":
            base = next((row for row in ordered if name(row) == "eager"), ordered[0])
        elif kind in ("peers", "forward_selection"):
            own = "ours" if kind == "peers" else "as typed"
            base = next((row for row in ordered if name(row) == own), None)
        else:
            whole = [row for row in ordered if not name(row).startswith("without")]
            ladder = next((s.rows for s in found if s.call == call), ())
            base = (whole or [*ladder][-1:] or [None])[0]
        timed = base is not None and not base.get("failed")
        found.append(Series(kind, call, tuple(ordered), base if timed else None))
    if single := [row for row in rows if row.get("series") not in KINDS]:
        found.append(Series("single", "", tuple(single), None))
    return found


def _with_neighbours(group: list[dict], measured: list[dict]) -> list[dict]:
    """Give rows that were tried on another the runs of that one before and after them.

    Its other runs are of other hours. Adds: without_s, of the same shape as total_s.
    """
    found: dict[str, list[dict]] = {}
    of_kind = [row for row in measured if row["series"] == "forward_selection"]
    for at, row in enumerate(of_kind):
        base = row.get("base")
        if at and base == name(of_kind[at - 1]):
            beside = [one for one in of_kind[at - 1 : at + 2] if base == name(one)]
            beside = [one for one in beside if not one.get("failed") and not apart(row, one)]
            found.setdefault(name(row), []).extend(beside)
    timed = {who: _join([row["total_s"] for row in rows]) for who, rows in found.items() if rows}
    return [row | {"without_s": timed.get(name(row))} for row in group]


def completed(rows: list[dict]) -> list[dict]:
    """Give rows that failed before they could say their call and steps those of their command."""
    known: dict[str, dict] = {}
    for row in rows:
        found = {key: row[key] for key in ("call", "steps") if row.get(key)}
        known.setdefault(row.get("command"), {}).update(found)
    known.pop(None, None)
    return [
        row | {k: v for k, v in known.get(row.get("command"), {}).items() if not row.get(k)}
        for row in rows
    ]


def newest(rows: list[dict], key: Callable[[dict], object]) -> list[dict]:
    """Keep the newest measurement of each key, its rounds pooled into one row.

    Rounds come in order, so a round replaces itself and those after it, and another session all.
    """
    kept: dict[object, list[dict]] = {}
    for row in rows:
        turn, rounds = row.get("round") or 0, []
        for earlier in kept.get(key(row), []):
            if not apart(row, earlier) and (earlier.get("round") or 0) < turn:
                rounds.append(earlier)
        kept[key(row)] = [*rounds, row]
    return [_pool(rounds) for rounds in kept.values()]


def _pool(rounds: list[dict]) -> dict:
    """Put the rounds of a row together: all their timed runs, the rest as in the last."""
    timed = [row for row in rounds if not row.get("failed")]
    if not timed or len(rounds) == 1:
        return rounds[-1]
    last = timed[-1]
    row = last | {"rounds": len(rounds)}
    row["failed_rounds"] = [row["failed"] for row in rounds if row.get("failed")]
    row["total_s"] = _join([r["total_s"] for r in timed])
    stages = last.get("stages_s") or {}
    row["stages_s"] = {k: _join([get(r, "stages_s", k) for r in timed]) for k in stages}
    times = row["stages_s"] | {"call": row["total_s"]}
    work = last.get("roofline") or {}
    row["roofline"] = {k: _retimed(w, get(times, k, "median")) for k, w in work.items()}
    return row


def _join(spreads: list[dict | None]) -> dict | None:
    """Pool timed runs; the last round's alone where one kept none."""
    samples = [s for spread in spreads for s in (spread or {}).get("samples") or []]
    if not all(spread and spread.get("samples") for spread in spreads):
        return spreads[-1]
    ends = {"min": min(samples), "max": max(samples), "n": len(samples)}
    return {"median": statistics.median(samples), **ends, "samples": samples}


def _retimed(work: dict | None, seconds: float | None) -> dict | None:
    """Give a stage's rates for the pooled time."""
    if not work or not work.get("seconds") or not seconds:
        return work
    slower = seconds / work["seconds"]
    scaled = {
        "tflop_per_s": 1 / slower,
        "mfu": 1 / slower,
        "time_over_floor": slower,
        "seconds": slower,
    }
    return work | {k: work[k] * factor for k, factor in scaled.items() if work.get(k) is not None}

"""Say which rows of two results files differ beyond the spread: commits, versions or machines.

Timings are few, skewed and never normal, so ranks are compared, not means: the exact Mann-Whitney
U test (ties included: every split of the pooled ranks is counted, none is drawn). The chance of any
false alarm in a comparison of two files is held at ALPHA by dividing it among the rows
(Bonferroni), so three runs against three can never tell and are reported as such.

Significance is not size, and runs that follow one another resemble one another, which the test
does not know: it calls 30 of 60 pairs of quarters of one and the same row different (ten rows on
two CPU cores, commit 1a6293f07cae). So a change also has to be larger than MIN_EFFECT, than the
quartile deviation of either row and than the distance of the medians of its thirds; that leaves 7
of the 60, and with --rounds 3 the thirds are processes. Quality has no samples; it is held to
BOUNDS.
"""

import functools
import math
import statistics
from collections import Counter
from dataclasses import dataclass, replace

from utils import report_rows
from utils.quality import LOSSLESS_FACTOR
from utils.report_rows import get, name
from utils.report_series import call_text, completed, newest

ALPHA = 0.05  # chance of one or more false alarms in a comparison, all rows together
MIN_EFFECT = 0.03  # relative; a smaller change is no finding, however significant
MIN_BETWEEN = 0.005  # the same between two runs of the other side, whose spread holds the drift
EXACT_UP_TO = 100  # runs of both rows together; beyond, the normal approximation is as good

BOUNDS = (  # what is worse, and by how much it may be so
    ("fp32_relative_l2", "factor", LOSSLESS_FACTOR),
    ("latents_relative_l2", "factor", LOSSLESS_FACTOR),
    ("psnr_db_worst", "drop", 1.0),
    ("ssim_worst", "drop", 0.01),
    ("checker_right", "drop", 0.1),
)


@dataclass(frozen=True)
class Change:
    """What the samples of two rows say."""

    verdict: str  # "faster", "slower", "unchanged" or "cannot tell"
    shift: float | None  # relative: 0.05 is 5 % slower
    p: float | None
    needed: int = 0  # runs of each row, where there are too few


def p_value(a: list[float], b: list[float]) -> float:
    """Give the two-sided p-value of the Mann-Whitney U test, conditional on the ties.

    Every subset of the pooled ranks is counted through its generating function: one big integer
    per subset size, whose digits are the counts per rank sum.
    Source: Streitberg and Roehmel 1986, the shift algorithm
    """
    few, many = sorted((a, b), key=len)
    pooled = sorted(a + b)
    ranks, at = {}, 0
    for value, count in sorted(Counter(pooled).items()):
        ranks[value] = 2 * at + count + 1  # twice the mid-rank of equal values: an integer
        at += count
    n, total = len(few), len(pooled)
    found, expected = sum(ranks[v] for v in few), n * (total + 1)
    if total > EXACT_UP_TO:
        variance = n * len(many) * statistics.pvariance([ranks[v] for v in pooled]) / (total - 1)
        if variance == 0:
            return 1.0
        return math.erfc(max(0, abs(found - expected) - 1) / math.sqrt(2 * variance))
    width = math.comb(total, n).bit_length() // 8 + 1  # bytes of a digit
    sums = [1] + [0] * n
    for i, value in enumerate(pooled, 1):
        for k in range(min(n, i), 0, -1):
            sums[k] += sums[k - 1] << (8 * width * ranks[value])
    digits = sums[n].to_bytes(width * (n * 2 * total + 1), "little")
    far = abs(found - expected)
    extreme = sum(
        int.from_bytes(digits[s * width : (s + 1) * width], "little")
        for s in range(len(digits) // width)
        if abs(s - expected) >= far
    )
    return extreme / math.comb(total, n)


def spread(samples: list[float]) -> float:
    """Give the relative change that a row's own runs show, in their order.

    The larger of half the distance of the quartiles (the spread without outliers) and the distance
    of the medians of its thirds (a machine that drifts, or rounds that differ).
    """
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    n = len(samples)
    thirds = [samples[k * n // 3 : (k + 1) * n // 3] for k in range(3)]
    medians = [statistics.median(third) for third in thirds if third]
    return max((high - low) / 2, max(medians) - min(medians)) / median


def judge(
    a: list[float], b: list[float], alpha: float = ALPHA, least: float = MIN_EFFECT
) -> Change:
    """Say whether b is faster or slower than a: significant at alpha, and a change of some size.

    Of `least`, and of more than either's own spread. The shift is the median of all ratios b / a,
    less 1 (Hodges and Lehmann's estimate).
    """
    if min(len(a), len(b)) < 2 or 2 / math.comb(len(a) + len(b), len(a)) > alpha:
        needed = next(n for n in range(2, 1000) if 2 / math.comb(2 * n, n) <= alpha)
        return Change("cannot tell", None, None, needed)
    shift = statistics.median(y / x for x in a for y in b) - 1
    p = p_value(a, b)
    if p > alpha or abs(shift) < max(least, spread(a), spread(b)):
        return Change("unchanged", shift, p)
    return Change("slower" if shift > 0 else "faster", shift, p)


@dataclass(frozen=True)
class Finding:
    """One row of the comparison."""

    row: str
    call: str
    verdict: str  # Change's, or "failed", "works again", "fails in both", "only in a / b"
    seconds: tuple[float | None, float | None] = (None, None)  # medians
    change: Change | None = None
    quality: str = "-"  # "worse", "better", "unchanged", "not comparable"
    notes: tuple[str, ...] = ()

    @property
    def is_worse(self) -> bool:
        """Whether this is what a comparison is there to find."""
        return self.verdict in ("slower", "failed") or self.quality == "worse"


def quality_change(a: dict, b: dict, bounds: tuple = BOUNDS) -> tuple[str, list[str]]:
    """Compare the quality of two rows: the verdict, and what moved beyond its bound."""
    old, new = a.get("quality") or {}, b.get("quality") or {}
    if not old or not new:
        return "-", []
    how = [
        f"{key} {old.get(key)} and {new.get(key)}"
        for key in ("prompts", "images", "reference", "quality_source")
        if old.get(key) != new.get(key) and (key in old) == (key in new)
    ]
    if how:
        return "not comparable", ["quality was measured differently: " + "; ".join(how)]
    worse, better = [], []
    match a.get("lossless"), b.get("lossless"):
        case True, False:
            worse.append("lossless -> lossy")
        case False, True:
            better.append("lossy -> lossless")
    exact = [scores.get("fp32_relative_l2") for scores in (old, new)]
    rounding = a.get("lossless") and b.get("lossless") and None not in exact
    for key, kind, bound in bounds[:1] if rounding else bounds:
        x, y = (_score(scores, key) for scores in (old, new))
        if x is None or y is None:
            continue
        if kind == "drop":
            x, y = -x, -y
            down, up = y - x > bound, x - y > bound
        else:
            down, up = y > bound * x, x > bound * y
        if down or up:
            (worse if down else better).append(f"{key} {_plain(old, key)} -> {_plain(new, key)}")
    return ("worse" if worse else "better" if better else "unchanged"), worse + better


def _score(scores: dict, key: str) -> float | None:
    """Read a score; PSNR is infinite (stored as null) where every picture is its reference."""
    if key == "psnr_db_worst" and is_identical(scores):
        return math.inf
    return scores.get(key)


def is_identical(scores: dict) -> bool:
    """Whether every picture was equal to its reference, which PSNR stores as null."""
    count = scores.get("identical_images")
    return bool(count) and count == scores.get("images") and scores.get("psnr_db_worst") is None


def _plain(scores: dict, key: str) -> str:
    value = _score(scores, key)
    return "identical" if value == math.inf else f"{value:.4g}"


def _key(row: dict, with_steps: bool) -> tuple:
    """Say what makes two rows the same measurement: series, name, call and the steps' settings."""
    call = sorted((k, str(v)) for k, v in (row.get("call") or {}).items() if v is not None)
    steps = sorted(_settings(row).items()) if with_steps else ()
    return (row.get("series"), name(row), tuple(call), tuple(steps))


def _settings(row: dict) -> dict[str, str]:
    """List the steps that are on, flat, without what explains a choice."""
    flat = {}
    for step, verdict in (row.get("steps") or {}).items():
        if get(verdict, "state") == "on":
            flat[step] = "on"
            settings = {k: v for k, v in (verdict.get("settings") or {}).items() if k != "why"}
            flat |= {f"{step}.{k}": str(v) for k, v in settings.items()}
    return flat


def match(a: list[dict], b: list[dict]) -> tuple[list[tuple[dict, dict]], list[dict], list[dict]]:
    """Pair the rows of two files; of equal ones in a file the newest stands, its rounds pooled.

    First by name, call and settings; then, for what is left, by name and call alone, as on another
    machine where a step chose another kernel. Returns: pairs, only in a, only in b.
    """
    both = completed([*a, *b])
    a, b, pairs = both[: len(a)], both[len(a) :], []
    for with_steps in (True, False):
        key = functools.partial(_key, with_steps=with_steps)
        left, right = ({key(row): row for row in newest(rows, key)} for rows in (a, b))
        pairs += [(left[k], right[k]) for k in left if k in right]
        a = [row for k, row in left.items() if k not in right]
        b = [row for k, row in right.items() if k not in left]
    return pairs, a, b


def _pair(a: dict, b: dict, alpha: float) -> Finding:
    about = {"row": name(a), "call": call_text(a)}
    failed = [row.get("failed") for row in (a, b)]
    if any(failed):
        verdict = "fails in both" if all(failed) else "failed" if failed[1] else "works again"
        return Finding(**about, verdict=verdict, notes=tuple(filter(None, failed[-1:])))
    change = judge(report_rows.samples(a), report_rows.samples(b), alpha)
    quality, notes = quality_change(a, b)
    if change.verdict == "cannot tell":
        counts = " and ".join(f"{len(report_rows.samples(row))}" for row in (a, b))
        notes.append(f"cannot tell from {counts} runs: {change.needed} of each are needed")
    old, new = (_settings(row) | report_rows.variables(row) for row in (a, b))
    differing = [k for k in {**old, **new} if old.get(k) != new.get(k)]
    notes += [f"{k}: {old.get(k, 'off')} -> {new.get(k, 'off')}" for k in differing]
    seconds = (a["total_s"]["median"], b["total_s"]["median"])
    return Finding(**about, verdict=change.verdict, seconds=seconds, change=change,
                   quality=quality, notes=tuple(notes))  # fmt: skip


def compare_rows(a: list[dict], b: list[dict]) -> list[Finding]:
    """Compare two lists of rows; what only one of them has comes last."""
    pairs, only_a, only_b = match(a, b)
    alone = [(row, "only in a") for row in only_a] + [(row, "only in b") for row in only_b]
    return [_pair(*pair, ALPHA / len(pairs)) for pair in pairs] + [
        Finding(name(row), call_text(row), verdict) for row, verdict in alone
    ]


def pair_of_any(a: dict, b: dict) -> Finding:
    """Compare two rows of different names or calls, and say by which flags they differ."""
    old, new = report_rows.flags(a), report_rows.flags(b)
    changed = [
        f"{flag}: {old.get(flag, 'not given')} -> {new.get(flag, 'not given')}"
        for flag in {**old, **new}
        if old.get(flag) != new.get(flag)
    ]
    found = _pair(a, b, ALPHA)
    return replace(found, notes=(f"b is {name(b)}", *(changed or ["same flags"]), *found.notes))

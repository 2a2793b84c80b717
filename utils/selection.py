"""Forward selection: which steps that are off by default pay on this machine, one on the other.

The run as it was typed is the base. Each candidate joins it in turn, between two runs of the base;
what is faster than these beyond the spread, by the rule of --compare but from half a percent on
(many steps bring one or two), and errs no more, stays on for the candidates after it. One that is
refused beside what was kept is tried instead of that. At the end what was typed and what was kept
take turns once more.

Greedy: of steps that pay only together it finds the pairs that are listed. Lossy steps are no
candidates: whether their pictures are good enough is for people to say.
"""

import shlex
from collections import Counter
from dataclasses import dataclass

from utils.benchmark_utils import flags_of_step
from utils.compare import ALPHA, BOUNDS, MIN_BETWEEN, judge, quality_change
from utils.errors import UserError
from utils.pipeline_utils import STEPS
from utils.report_rows import flags, samples
from utils.series_rows import Log, Row, command_of, prepared

CANDIDATES = {  # flags -> the step that they are about; in the order of STEPS, pairs behind both
    ("--fused_mlp",): "fused_mlp",
    ("--fa3_rotation",): "fa3",
    ("--fused_kernels",): "fused_kernels",
    ("--vae_attention",): "vae_attention",
    ("--subpixel_upsampling", "transposed"): "subpixel_upsampling",
    ("--subpixel_upsampling", "phases"): "subpixel_upsampling",
    ("--channel_group_norm",): "group_norm",
    ("--conv_benchmark",): "conv_algorithms",
    ("--modulation_once",): "modulation",
    ("--deferred_scales",): "deferred_scales",
    ("--persistent_tma",): "persistent_tma",
    ("--triton_float8",): "triton_float8",
    ("--fusion_limits",): "fusion_limits",
    ("--deferred_scales", "--fusion_limits"): "deferred_scales",
    ("--compile_text_encoders",): "text_encoders",
    ("--compile_image_encoder",): "image_encoder",
    ("--modulation_once", "--loop_graph"): "loop_graph",
}
AS_TYPED, REFUSED = "as typed", "refused: "
ERRORS = tuple(bound for bound in BOUNDS if bound[1] == "factor")  # dB move by rounding alone


def candidates() -> list[Row]:
    """List the rows that are tried: the flags that each adds, and their step."""
    return [Row(f"+ {' '.join(words)}", words, step) for words, step in CANDIDATES.items()]


def typed_steps(common: list[str]) -> str:
    """Give the words that were typed for steps: with others it is another selection."""
    of_steps = {flag for step in STEPS for flag in flags_of_step(step)}
    return " ".join(_words({k: v for k, v in _typed(common).items() if k in of_steps}))


@dataclass(frozen=True)
class Choice:
    """What became of a candidate."""

    row: Row
    verdict: str  # "kept", "left" or "skipped"
    why: str


class Selection:
    """One forward selection: what is on, and the rows that were measured for it."""

    def __init__(self, rows: list[Row], common: list[str], log: Log):
        self.rows, self.common, self.log = rows, common, log
        self.start = self.base = Row(AS_TYPED, ())
        self.kept: list[tuple[str, ...]] = []  # flags of the candidates that are part of the base
        self.places = [row.name for row in (self.start, *candidates())]
        self.turns: Counter = Counter()  # how often each row was measured
        self.beside: dict[str, dict] = {}  # row -> the base that it was tried on, as labels
        self.choices: list[Choice] = []

    def measure(self, row: Row) -> dict:
        """Measure a row once more. Raises: UserError if it is the base, and failed"""
        turn, own = self.turns[row.name], row.name.partition(" instead of ")[0]
        self.turns[row.name] += 1
        labels = {"position": self.places.index(own)}
        labels |= self.beside.get(row.name, {})
        found = self.log.measure(row, self.common, turn, **labels)
        if row is self.base and found.get("failed"):
            raise UserError(f"row {row.name!r} of the selection failed, on which others are tried")
        return found

    def run(self, rounds: int) -> None:
        """Try each candidate on top of what was kept before it."""
        last = None
        for candidate in self.rows:
            tried, kept, why = self.joining(candidate)
            if why:
                self.note(candidate, "skipped", why)
                continue
            self.beside[tried.name] = {"base": self.base.name}
            without, with_it = [last or self.measure(self.base)], []
            for _ in range(rounds):
                with_it.append(self.measure(tried))
                without.append(self.measure(self.base))
            last = without[-1]
            pays, why = judged(without, with_it, ALPHA / len(self.rows))
            self.note(tried, "kept" if pays else "left", why)
            if pays:
                self.base, self.kept, last = tried, kept, None

    def joining(self, candidate: Row) -> tuple[Row, list[tuple[str, ...]], str]:
        """Put a candidate beside what was kept, or instead of the part that excludes it.

        Returns: the row to measure, what it is made of, and why it is not to be measured, if so
        """
        kept = [*self.kept, candidate.flags]
        row = Row(candidate.name, joined(*kept), candidate.step)
        why = self.idle(row)
        if why.startswith(REFUSED):
            for gone in self.kept:
                others = [words for words in kept if words is not gone]
                name = f"{candidate.name} instead of {' '.join(gone)}"
                instead = Row(name, joined(*others), candidate.step)
                if not self.idle(instead):
                    return instead, others, ""
        return row, kept, why

    def idle(self, row: Row) -> str:
        """Say why a candidate changes nothing here, or is refused; "" if it is to be measured."""
        try:
            plan = prepared([*self.common, *row.flags]).plan
        except UserError as error:
            return f"{REFUSED}{str(error).splitlines()[0]}"
        if not plan[row.step].is_on:
            return f"{plan[row.step].state}: {plan[row.step].reason}"
        same = plan == prepared([*self.common, *self.base.flags]).plan
        return "changes nothing of this run" if same else ""

    def note(self, row: Row, verdict: str, why: str) -> None:
        """Remember what became of a candidate, and say it."""
        self.choices.append(Choice(row, verdict, why))
        print(f"{verdict:8s}{row.name}: {why}", flush=True)

    def confirm(self, rounds: int) -> str:
        """Let the run as typed and what was kept take turns, and sum up what to type."""
        tried = [one for one in self.choices if one.verdict != "skipped"]
        lines = [f"{one.verdict:8s}{one.row.name}: {one.why}" for one in tried]
        if self.base is self.start:
            return "\n".join([*lines, "nothing pays beside what was typed"])
        runs = [(self.measure(self.start), self.measure(self.base)) for _ in range(rounds)]
        before, after = zip(*runs, strict=True)
        pays, why = judged(list(before), list(after), ALPHA)
        said = "" if pays else "; what was kept is not confirmed, take more --rounds"
        lines.append(f"together against what was typed: {why}{said}")
        return "\n".join([*lines, command_of([*self.common, *self.base.flags])])


def run(rows: list[Row], rounds: int, common: list[str], log: Log) -> None:
    """Select among rows of candidates(), and print what to type.

    Raises: UserError if what was typed cannot run
    """
    selection = Selection(rows, common, log)
    selection.run(rounds)
    print(selection.confirm(rounds), flush=True)


def judged(without: list[dict], with_it: list[dict], alpha: float) -> tuple[bool, str]:
    """Say whether rows with a candidate are faster than those without, and err no more.

    Returns: the answer, and the reason in words
    """
    if failed := [row["failed"] for row in with_it if row.get("failed")]:
        return False, f"failed: {failed[-1]}"
    a, b = ([s for row in rows for s in samples(row)] for rows in (without, with_it))
    change = judge(a, b, alpha, MIN_BETWEEN)
    if change.verdict == "cannot tell":
        counts = f"{len(a)} and {len(b)} runs"
        return False, f"cannot tell from {counts}: {change.needed} of each are needed"
    quality, moved = quality_change(without[-1], with_it[-1], ERRORS)
    worse = f", but errs more: {'; '.join(moved)}" if quality == "worse" else ""
    times = f"{1 / (1 + change.shift):.3f}x as fast"
    within = "" if change.verdict in ("faster", "slower") else ", which is within the spread"
    return change.verdict == "faster" and not worse, f"{times}{within}{worse}"


def joined(*candidates: tuple[str, ...]) -> tuple[str, ...]:
    """Put the flags of candidates behind one another, each flag once, with its last value."""
    found: dict[str, str] = {}
    for words in candidates:
        found |= _typed(words)
    return tuple(_words(found))


def _typed(words) -> dict[str, str]:
    return flags({"command": shlex.join(words)})


def _words(typed: dict[str, str]) -> list[str]:
    alone = {"given": ()}  # what flags() says of one without a value
    return [word for k, v in typed.items() for word in (k, *alone.get(v, v.split()))]

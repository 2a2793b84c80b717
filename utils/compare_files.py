"""Compare two results files and write it down: run_benchmark.py --compare a.jsonl b.jsonl"""

from pathlib import Path

from utils import report_rows
from utils.compare import ALPHA, MIN_EFFECT, Finding, compare_rows, match, pair_of_any
from utils.errors import UserError
from utils.report_rows import name
from utils.report_series import call_text


def _rows(file: str) -> list[dict]:
    """Read the rows of a file. Raises: UserError if there are none."""
    if rows := report_rows.read(file, "--compare"):
        return rows
    empty = not Path(file).read_bytes().strip()
    raise UserError(f"--compare {file}: {'is empty' if empty else 'no row that could be read'}")


def _names(rows: list[dict]) -> str:
    return ", ".join(dict.fromkeys(f"{name(row)} ({call_text(row)})" for row in rows))


def render(findings: list[Finding]) -> str:
    """Write the findings as text: one line a row, what moved below it, then the sum."""
    lines, call = [], None
    for finding in findings:
        if finding.call != call:
            lines.append(call := finding.call)
        a, b = (f"{s:.4g} s" if s is not None else "" for s in finding.seconds)
        shift, p = "", ""
        if finding.change and finding.change.shift is not None:
            shift, p = f"{100 * finding.change.shift:+.1f} %", f"p {finding.change.p:.2g}"
        quality = "" if finding.quality == "-" else f"quality {finding.quality}"
        lines.append(
            f"{'!' if finding.is_worse else ' '} {a:>9s}  {b:>9s}  {shift:>8s}  {p:9s}  "
            f"{finding.verdict:12s}  {quality:22s}  {finding.row}"
        )
        lines += [f"      {note}" for note in finding.notes]
    verdicts = [finding.verdict for finding in findings]
    counts = [f"{verdicts.count(v)} {v}" for v in dict.fromkeys(verdicts)]
    counts.append(f"quality worse in {sum(f.quality == 'worse' for f in findings)}")
    return "\n".join([*lines, ", ".join(counts)])


def main(a_file: str, b_file: str) -> int:
    """Print the comparison; 1 if something got slower or worse beyond the spread, else 0.

    Raises: UserError for a file that cannot be read or holds no row, or files without a row in
        common, unless each holds a single one: these are compared whatever their flags.
    """
    rows = [_rows(file) for file in (a_file, b_file)]
    findings = compare_rows(*rows)
    if all(finding.verdict.startswith("only in") for finding in findings):
        if sorted(finding.verdict for finding in findings) != ["only in a", "only in b"]:
            a, b = map(_names, rows)
            raise UserError(
                f"no row in common (same name and call): {a_file} has {a}; {b_file} has {b}"
            )
        _, (a,), (b,) = match(*rows)
        findings = [pair_of_any(a, b)]
    for letter, file, found in zip("ab", (a_file, b_file), rows, strict=True):
        print(f"{letter}  {file}: {report_rows.where(found)}")
    print(render(findings))
    print(
        f"faster, slower: by more than {100 * MIN_EFFECT:g} % and than either row's own "
        f"spread and drift, at a {100 * ALPHA:g} % chance of any false alarm (exact Mann-Whitney "
        "U). Another process may differ by more: with --rounds 3 that counts as drift."
    )
    return int(any(finding.is_worse for finding in findings))

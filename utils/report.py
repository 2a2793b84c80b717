"""Render the measurements: python -m utils.report [--results FILE ...] [--out FOLDER]

From results/<machine>.jsonl: Markdown tables, a plot per machine (PNG) and one HTML page. Without
flags it renders the committed results: a line per ladder into the README, every table into
results/README.md, plots and page beside the results.
"""

import re
from pathlib import Path

from utils import report_plot
from utils.artifacts import replacing
from utils.benchmark_utils import Parser
from utils.checks import folder_problem
from utils.errors import UserError, run_script
from utils.report_page import page
from utils.report_rows import ROOT, device, distinct, name, read
from utils.report_series import Series, series_of
from utils.report_summary import summary
from utils.report_table import LEGEND, Code, Table, notes, piped, table, title

README, RESULTS = ROOT / "README.md", ROOT / "results"
TABLES = RESULTS / "README.md"
PAGE, MARKDOWN = "report.html", "report.md"


def fill(text: str, marker: str, content: str, where: str = "README") -> str:
    """Put content between `<!-- marker -->` and `<!-- /marker -->`.

    Raises: ValueError if the markers are missing, naming `where`.
    """
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{where}: no markers for {marker}")
    return pattern.sub(lambda found: found[1] + content + "\n" + found[2], text)


def markdown_text(text: str) -> str:
    """Escape what Markdown would read as markup or as the end of a table's cell."""
    text = " ".join(text.split())
    return re.sub(r"[\\`*\[\]<>|~]|(?<!\w)_|_(?!\w)|&(?=[\w#]+;)", r"\\\g<0>", text)


def _code(text: str) -> str:
    """Set text as code, inside a table: more backticks around it than in it, no bare pipe."""
    text = " ".join(text.split()).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    space = " " if longest else ""
    return f"{'`' * (longest + 1)}{space}{text}{space}{'`' * (longest + 1)}"


def markdown_table(content: Table) -> str:
    """Write a table as Markdown."""
    rows = [
        [_code(cell) if isinstance(cell, Code) else markdown_text(cell) for cell in row]
        for row in content.rows
    ]
    return piped(content.header, rows)


def _commands(series: Series) -> str:
    """Fold the rows' commands away, in a fence longer than any that they contain."""
    lines = [f"{row.get('command') or '?'}  # {' '.join(name(row).split())}" for row in series.rows]
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", "\n".join(lines))), 3)
    summary = "<details><summary>The commands, row by row</summary>"
    return "\n".join([summary, "", f"{fence}bash", *lines, fence, "", "</details>"])


def has_plot(rows: list[dict]) -> bool:
    """Whether there is a ladder, or what leaving steps out costs, to draw."""
    return any(series.kind != "single" for series in series_of(rows))


def plot(rows: list[dict]) -> bytes:
    """Draw every ladder and leave-one-out of one machine as a PNG, one below the other."""
    panels = [series for series in series_of(rows) if series.kind != "single"]
    return report_plot.to_png(report_plot.draw(panels))


def markdown(file: str, rows: list[dict]) -> str:
    """Write one machine's series as Markdown, file and plot beside it."""
    everything = series_of(rows)
    torch = "; ".join(distinct(rows, "environment", "versions", "torch")) or "?"
    parts = [
        f"{markdown_text(device(rows))}, torch {markdown_text(torch)} "
        f"([{file}]({file})); median (min-max) of one call:"
    ]
    if has_plot(rows):
        stem = Path(file).stem
        parts.append(f"![seconds of every row of {stem}]({stem}.png)")
    for series in everything:
        if len(everything) > 1 or series.kind != "single":
            parts.append(f"{markdown_text(title(series))}:")
        parts.append(markdown_table(table(series)))
        parts += [markdown_text(note) for note in notes(series)]
        if series.kind != "single":
            parts.append(_commands(series))
    if has_plot(rows):
        parts.append(markdown_text(LEGEND))
    return "\n\n".join(parts)


def load(files: list[Path]) -> dict[str, list[dict]]:
    """Read results files, by their names.

    Raises: UserError if one cannot be read, holds no row, or shares its name with another.
    """
    results: dict[str, list[dict]] = {}
    for file in files:
        if file.name in results:
            raise UserError(f"--results: two files are named {file.name}; plots go by that name")
        results[file.name] = read(file, "--results")
        if not results[file.name]:
            raise UserError(f"--results {file}: no row that could be read")
    if not results:
        raise UserError(f"no results: {RESULTS} holds no .jsonl; make some with run_benchmark.py")
    return results


def committed() -> list[Path]:
    """List the repository's own results."""
    return sorted(RESULTS.glob("*.jsonl"))


def measured() -> str:
    """List every committed row for results/README.md: what was run, speed, quality and memory."""
    return "\n\n".join(markdown(file, rows) for file, rows in load(committed()).items())


def summed_up() -> str:
    """Give the README's table: a line per committed ladder."""
    return markdown_table(summary(load(committed())))


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises: UserError if the folder cannot be written or the disk is full.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as new:
            new.write_bytes(content)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def main() -> None:
    """Parse, read, render, write, and name what was written."""
    parser = Parser(
        prog="python -m utils.report", description="Render results: tables, plots and one page."
    )
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="JSONL", help="default: results/*.jsonl"
    )
    parser.add_argument(
        "--out", type=Path, help="default: results/, and the tables in both README.md"
    )
    args = parser.parse_args()
    if args.out and (problem := folder_problem(args.out)):
        raise UserError(f"--out {args.out}: {problem}")
    results = load(args.results or committed())
    out = args.out or RESULTS
    files = {f"{Path(k).stem}.png": plot(rows) for k, rows in results.items() if has_plot(rows)}
    folders = {file.name: file.parent for file in args.results or committed()}
    files[PAGE] = page(results, folders).encode()
    if args.results or args.out:
        texts = (markdown(file, rows) for file, rows in results.items())
        files[MARKDOWN] = ("\n\n".join(texts) + "\n").encode()
    for file, content in files.items():
        write(out / file, content)
        print(f"{out / file}  {len(content) / 2**10:.0f} KiB")
    if not (args.results or args.out):
        for file, content in ((README, summed_up()), (TABLES, measured())):
            write(file, fill(file.read_text(), "measured", content, file.name).encode())
            print(file)


if __name__ == "__main__":
    run_script(main)

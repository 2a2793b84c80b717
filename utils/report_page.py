"""Write every machine's results as one HTML page that needs nothing else and asks for nothing.

Card, plot, tables, pictures, roofline, commands. What comes from a row is escaped; the page's
policy allows its own script (by hash), inline styles and data: pictures, and nothing from outside.
"""

import base64
import hashlib
import re
import sys
from html import escape
from pathlib import Path

from utils import report_plot
from utils.report_details import LIMIT, facts, memory_text, stage_table, steps_text
from utils.report_rows import ROOT, device, get, name
from utils.report_series import Series, series_of
from utils.report_table import LEGEND, Code, Table, notes, table, title

HERE, RESULTS = Path(__file__).resolve().parent, ROOT / "results"
GAINS = (1, 4, 16, 64)
PICTURES = {  # media type -> how a file of it begins; strips were PNG before they were WebP
    "image/webp": re.compile(rb"RIFF.{4}WEBP", re.DOTALL),
    "image/png": re.compile(rb"\x89PNG\r\n\x1a\n"),
}


def page(results: dict[str, list[dict]], folders: dict[str, Path] | None = None) -> str:
    """Render the rows of each results file (by its name) as one page.

    Pictures are read from the paths that rows name, inside their file's folder (results/ where
    `folders` names none) and nowhere else.
    """
    script = (HERE / "report_page.js").read_text()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    links = "".join(
        f'<li><a href="#m{k}">{escape(device(rows))}</a></li>'
        for k, rows in enumerate(results.values())
    )
    body = [f"<nav><ul>{links}</ul></nav>"] if len(results) > 1 else []
    for k, (file, rows) in enumerate(results.items()):
        body.append(_machine(f"m{k}", file, rows, (folders or {}).get(file, RESULTS)))
    parts = {
        "BODY": "\n".join(body),
        "SCRIPT": script,
        "POLICY": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'",
    }
    template = (HERE / "report_page.html").read_text()
    return re.sub(r"@@(\w+)@@", lambda found: parts[found[1]], template)


def _machine(anchor: str, file: str, rows: list[dict], root: Path) -> str:
    card = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(rows))
    parts = [
        f'<section id="{anchor}">',
        f"<h2>{escape(device(rows))}</h2>",
        f'<dl class="card">{card}<dt>from</dt><dd>{escape(file)}</dd></dl>',
    ]
    everything = series_of(rows)
    for series in everything:
        parts.append(f"<h3>{escape(title(series))}</h3>")
        if series.kind != "single":
            svg = report_plot.to_svg(report_plot.draw([series], titles=False), title(series))
            parts.append(_scrolling(svg, "plot"))
        parts.append(_table(table(series)))
        parts += [f'<p class="note">{escape(note)}</p>' for note in notes(series)]
        parts += [_roofline(series), _commands(series)]
    parts.append(f'<p class="note">{escape(LEGEND)}</p>')
    parts.append(_pictures(anchor, everything, root))
    return "\n".join([*parts, "</section>"])


def _scrolling(content: str, label: str) -> str:
    """Let what is wider than the window scroll by itself, by keyboard too."""
    return f'<div class="wide" role="region" aria-label="{label}" tabindex="0">{content}</div>'


def _table(content: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in content.header)
    lines = []
    for first, *cells in content.rows:
        first = f"<code>{escape(first)}</code>" if isinstance(first, Code) else escape(first)
        long = ' class="long"'
        rest = (f"<td{long if len(c) > 60 else ''}>{escape(c)}</td>" for c in cells)
        lines.append(f'<tr><th scope="row">{first}</th>{"".join(rest)}</tr>')
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return _scrolling(f"<table>{body}</table>", "measurements")


def _roofline(series: Series) -> str:
    """Write where each row's time goes, with a bar for the share of the limit that it reached."""
    header, rows = stage_table(series)
    if not rows:
        return ""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in ("row", *header))
    lines = []
    for row, stages in rows:
        first = f'<th scope="row" rowspan="{len(stages)}">{escape(row)}</th>'
        for stage in stages:
            texts = (escape(c) if isinstance(c, str) else _bar(c) for c in stage)  # LIMIT's: a bar
            cells = "".join(f"<td>{text}</td>" for text in texts)
            lines.append(f"<tr>{first}{cells}</tr>")
            first = ""
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody>"
    said = "Where the time goes, and how far it is from the limit"
    content = _scrolling(f"<table>{body}</table>", "stages")
    opened = " open" if LIMIT in header else ""
    return f"<details{opened}><summary>{said}</summary>{content}</details>"


def _bar(share: float | None) -> str:
    """Draw a share of the limit as a bar with its percentage."""
    if share is None:
        return ""
    percent = 100 * share
    bar = f'<span style="width:{min(100, percent):.0f}%"></span>'
    return f'<span class="reached">{bar}</span> {percent:.0f} %'


def _commands(series: Series) -> str:
    """Write the command that makes each row again, with its steps and its memory."""
    parts = []
    for row in series.rows:
        about = "; ".join(filter(None, (steps_text(row), memory_text(row))))
        label = f"<b>{escape(name(row))}</b>" if row.get("row") else ""
        commit = get(row, "environment", "commit")
        at = f" (commit {escape(commit)})" if commit else ""
        command = f"<pre>{escape(row.get('command') or 'no command stored')}</pre>"
        parts.append(f'<div>{label}{at}{command}<div class="steps">{escape(about)}</div></div>')
    return (
        f'<details class="commands"><summary>Commands and steps</summary>{"".join(parts)}</details>'
    )


def data_uri(path: str, root: Path) -> str:
    """Read a WebP or PNG inside root as a data URI; "" if it is none, which stderr is told.

    Results may come from elsewhere, so a path may not lead out of their folder.
    """
    try:
        file = (root / path).resolve()
        if not file.is_relative_to(root.resolve()):
            raise ValueError("outside the folder of the results")
        content = file.read_bytes()
        media = next((kind for kind, head in PICTURES.items() if head.match(content)), None)
        if media is None:
            raise ValueError("neither a WebP nor a PNG")
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        print(f"pictures {path!r}: left out: {why}", file=sys.stderr)
        return ""
    return f"data:{media};base64," + base64.b64encode(content).decode()


def _pictures(anchor: str, everything: list[Series], root: Path) -> str:
    """Write the viewer and, below it, the strips that it draws from; "" without pictures."""
    strips: dict[str, tuple[str, str]] = {}  # path -> id, figure

    def add(path: str | None, said: str) -> str:
        if path and path not in strips:
            uri, label = data_uri(path, root), escape(said)
            element = f"{anchor}-strip{len(strips)}"
            figure = f'<figure><figcaption>{label}</figcaption><img id="{element}" '
            strips[path] = (element, f'{figure}alt="pictures of {label}" src="{uri}"></figure>')
            if not uri:
                strips[path] = ("", "")
        return strips[path][0] if path else ""

    options = []
    several = len({series.call for series in everything} - {""}) > 1
    for series in everything:
        call = f" ({series.call})" if several and series.call else ""
        for row in series.rows:
            reference = add(row.get("reference_pictures"), f"the reference{call}")
            if strip := add(row.get("pictures"), name(row) + call):
                chosen = f'data-strip="{strip}" data-reference="{reference}"'
                options.append(f"<option {chosen}>{escape(name(row) + call)}</option>")
    if not options:
        return ""
    gains = "".join(
        f'<option value="{g}"{" selected" if g == 16 else ""}>{g}x</option>' for g in GAINS
    )
    viewer = _VIEWER.format(options="".join(options), gains=gains)
    figures = "".join(figure for _, figure in strips.values())
    return (
        f'<h3>Pictures</h3>{viewer}<details class="strip"><summary>All pictures</summary>'
        f"{figures}</details><noscript>The viewer needs JavaScript; the pictures do not.</noscript>"
    )


_VIEWER = """
<div class="viewer" hidden>
<div class="controls">
<label>Row <select data-part="row">{options}</select></label>
<label>Picture <select data-part="picture"></select></label>
<label>Difference amplified <select data-part="gain">{gains}</select></label>
</div>
<div class="panes">
<figure><div class="stage" data-part="stage"><canvas data-part="under"></canvas>
<canvas data-part="over"></canvas><span class="seam" data-part="seam"></span></div>
<figcaption class="ends">reference <input type="range" min="0" max="100" value="50" data-part="wipe"
aria-label="wipe: how much of the reference shows, in percent"> row</figcaption></figure>
<figure><canvas data-part="reference"></canvas><figcaption>reference</figcaption></figure>
<figure><canvas data-part="result"></canvas><figcaption data-part="chosen"></figcaption></figure>
<figure><canvas data-part="difference"></canvas>
<figcaption data-part="said" aria-live="polite"></figcaption></figure>
</div>
</div>
"""

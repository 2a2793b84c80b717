"""Draw the ladder: one bar a row in ladder order, whiskers, lossy rows hatched, the floor marked.

The bars are laid out once as lines, boxes and text, and written twice: as a PNG (Pillow, which
brings its own font, so the same rows give the same pixels anywhere) and as inline SVG, whose
colours the page sets.
"""

import io
import math
from dataclasses import dataclass
from html import escape

from utils.report_rows import get, name
from utils.report_series import Series
from utils.report_table import gain, ratio, spread, title

WIDTH, SIDE, ROW, BAR = 960, 16, 30, 18  # pixels
COLOURS = {
    "text": "#1f2328",
    "muted": "#59636e",
    "grid": "#d8dee4",
    "bar": "#8fb8e8",
    "edge": "#1f5fa8",
    "hatch": "#1f5fa8",
    "whisker": "#1f2328",
    "floor": "#c2410c",
    "good": "#2f7d32",
    "violet": "#8250df",
    "gold": "#bf8700",
}


@dataclass(frozen=True)
class Bar:
    """One row as the plot shows it. Units: seconds."""

    label: str
    median: float | None  # None: it failed
    low: float
    high: float
    floor: float | None
    lossy: bool
    note: str


def bars(series: Series) -> list[Bar]:
    """Turn a series into bars, in its order."""
    found = []
    for row in series.rows:
        if row.get("failed"):
            found.append(Bar(name(row), None, 0, 0, None, False, f"failed: {row['failed']}"))
            continue
        times, note = row["total_s"], spread(row["total_s"], with_n=False) + " s"
        faster = ratio(row, series.base) if series.kind == "ladder" else gain(row)
        if faster is not None:
            note += f"  {faster:.2f}x"
        low, median, high = times["min"], times["median"], times["max"]
        floor = get(row, "roofline", "call", "floor_s")
        lossy = row.get("lossless") is False
        found.append(Bar(name(row), median, low, high, floor, lossy, note))
    return found


def ticks(top: float) -> list[float]:
    """Give four to ten round values from 0 to at least the top."""
    step = 10 ** math.floor(math.log10(top))
    step *= next(f for f in (0.2, 0.5, 1, 2) if top / (step * f) <= 7)
    return [k * step for k in range(math.ceil(top / step - 1e-9) + 1)]


class Drawing:
    """Boxes, lines and text on a canvas, each with the name of a colour."""

    def __init__(self):
        self.height = SIDE
        self.shapes: list[tuple] = []

    def box(self, x: float, y: float, w: float, h: float, style: str) -> None:
        self.shapes.append(("box", x, y, w, h, style))

    def line(self, x0: float, y0: float, x1: float, y1: float, style: str, width=1.0) -> None:
        self.shapes.append(("line", x0, y0, x1, y1, style, width))

    def text(self, x: float, y: float, words: str, style: str, anchor="start", size=13) -> None:
        """Write on one line, whose middle is y."""
        self.shapes.append(("text", x, y, words, style, anchor, size))


def _font(size: float):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def text_width(words: str, size: int = 13) -> float:
    """Measure one line of text. Units: pixels"""
    return _font(size).getlength(words)


def shorten(words: str, width: float, size: int = 13) -> str:
    """Cut one line of text to a width in pixels."""
    words, font = " ".join(words.split())[:300], _font(size)
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "...") > width:
        words = words[:-1]
    return words + "..."


def draw(panels: list[Series], titles: bool = True) -> Drawing:
    """Lay every panel out below the one before."""
    drawing = Drawing()
    for series in panels:
        if titles:
            words = shorten(title(series), WIDTH - 2 * SIDE, 15)
            drawing.text(SIDE, drawing.height + 8, words, "text", size=15)
            drawing.height += 26
        _panel(drawing, series)
    return drawing


def _panel(drawing: Drawing, series: Series) -> None:
    rows, font = bars(series), _font(13)
    timed = [bar for bar in rows if bar.median is not None]
    labels = [shorten(bar.label, 240) for bar in rows]
    left = SIDE + max(font.getlength(label) for label in labels) + 12
    notes = [font.getlength(bar.note) for bar in timed]
    right = WIDTH - SIDE - 1.12 * max(notes, default=0) - 10  # a browser's own font may be wider
    marks = ticks(max((max(bar.high, bar.floor or 0) for bar in timed), default=1.0))
    scale = (right - left) / marks[-1]

    y = drawing.height + 8
    _legend(drawing, y, timed)
    top = y + 18
    bottom = top + ROW * len(rows)
    for mark in marks:
        x = left + mark * scale
        drawing.line(x, top, x, bottom, "grid")
        drawing.text(x, bottom + 12, f"{mark:.6g}", "muted", "middle", 12)
    drawing.text(right + 16, bottom + 12, "s", "muted", size=12)
    for k, (bar, label) in enumerate(zip(rows, labels, strict=True)):
        middle = top + ROW * k + ROW / 2
        drawing.text(left - 8, middle, label, "text", "end")
        if bar.median is None:
            drawing.text(left + 6, middle, shorten(bar.note, WIDTH - SIDE - left - 6), "floor")
        else:
            _bar(drawing, bar, left, middle, scale)
            drawing.text(WIDTH - SIDE, middle, bar.note, "text", "end")
    drawing.line(left, top, left, bottom, "muted")
    drawing.height = bottom + 36


def _legend(drawing: Drawing, y: float, timed: list[Bar]) -> None:
    entries = (
        ("whisker", "whiskers: min to max", True),
        ("bar", "lossless", not all(bar.lossy for bar in timed)),
        ("lossy", "lossy", any(bar.lossy for bar in timed)),
        ("floor", "floor of the machine", any(bar.floor for bar in timed)),
    )
    x = SIDE
    for kind, words, shown in entries:
        if not shown:
            continue
        if kind == "floor":
            drawing.line(x + 9, y - 7, x + 9, y + 7, "floor", 3)
        elif kind == "whisker":
            _whisker(drawing, x, x + 18, y)
        else:
            _box(drawing, x, y - 6, 18, 12, lossy=kind == "lossy")
        drawing.text(x + 26, y, words, "muted", size=12)
        x += 26 + 1.15 * text_width(words, 12) + 24  # the page's font may be wider


def _bar(drawing: Drawing, bar: Bar, left: float, middle: float, scale: float) -> None:
    _box(drawing, left, middle - BAR / 2, bar.median * scale, BAR, bar.lossy)
    _whisker(drawing, left + bar.low * scale, left + bar.high * scale, middle)
    if bar.floor:
        x = left + bar.floor * scale
        drawing.line(x, middle - BAR / 2 - 3, x, middle + BAR / 2 + 3, "floor", 3)


def _whisker(drawing: Drawing, low: float, high: float, y: float) -> None:
    drawing.line(low, y, high, y, "whisker", 1.5)
    for x in (low, high):
        drawing.line(x, y - 4, x, y + 4, "whisker", 1.5)


def _box(drawing: Drawing, x: float, y: float, w: float, h: float, lossy: bool) -> None:
    """Fill a box, outline it, and hatch it when what it shows is lossy."""
    drawing.box(x, y, w, h, "bar")
    if lossy:
        for k in range(1, math.ceil((w + h) / 7)):
            d = 7 * k  # x + y of a diagonal, cut off at the box
            drawing.line(
                x + max(0, d - h), y + min(h, d), x + min(w, d), y + max(0, d - w), "hatch", 1.2
            )
    for x0, y0, x1, y1 in ((0, 0, w, 0), (w, 0, w, h), (w, h, 0, h), (0, h, 0, 0)):
        drawing.line(x + x0, y + y0, x + x1, y + y1, "edge")


def to_png(drawing: Drawing, scale: int = 2) -> bytes:
    """Paint a drawing with Pillow."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH * scale, round(drawing.height * scale)), "white")
    painter = ImageDraw.Draw(image)
    anchors = {"start": "lm", "middle": "mm", "end": "rm"}
    for kind, x, y, *rest in drawing.shapes:
        x, y = x * scale, y * scale
        if kind == "box":
            w, h, style = rest
            painter.rectangle((x, y, x + w * scale, y + h * scale), COLOURS[style])
        elif kind == "line":
            x1, y1, style, width = rest
            ends = (x, y, x1 * scale, y1 * scale)
            painter.line(ends, COLOURS[style], max(1, round(width * scale)))
        else:
            words, style, anchor, size = rest
            painter.text((x, y), words, COLOURS[style], _font(size * scale), anchors[anchor])
    stream = io.BytesIO()
    # Few colours, blended at the edges of letters: a palette halves the file
    image.quantize(64, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def to_svg(drawing: Drawing, words: str) -> str:
    """Write a drawing as inline SVG; `words` describe it to who cannot see it."""
    parts = [
        f'<svg class="plot" viewBox="0 0 {WIDTH} {drawing.height:g}" role="img" '
        f'aria-label="{escape(words)}">'
    ]
    for kind, x, y, *rest in drawing.shapes:
        if kind == "box":
            w, h, style = rest
            shape = f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}"'
            parts.append(f'{shape} class="{style}"/>')
        elif kind == "line":
            x1, y1, style, width = rest
            shape = f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x1:.1f}" y2="{y1:.1f}"'
            parts.append(f'{shape} class="{style}" stroke-width="{width:g}"/>')
        else:
            text, style, anchor, size = rest
            y += 0.36 * size  # SVG places text by its baseline
            shape = f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
            parts.append(f'{shape} class="{style}">{escape(text)}</text>')
    return "\n".join([*parts, "</svg>"])

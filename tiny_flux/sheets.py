"""Sheets of pictures in one WebP: rows are named in the margin, a text stands above each column."""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw

GAP_PX, LINE_PX, MARGIN_PX = 4, 15, 84
LETTERS = 20  # of the default font across one picture
GREY, WHITE, BLACK = (128, 128, 128), (255, 255, 255), (0, 0, 0)


def write_sheet(
    rows: list[list[Image.Image]], path: Path, names: list[str] = (), texts: list[str] = ()
) -> None:
    """Paste rows of equally large pictures; with names or texts they are written around, on white.

    As WebP, which `path` should name, a sheet is lossy, a fifth of a palette PNG's size.
    """
    side = rows[0][0].width
    columns = max(map(len, rows))
    wrapped = [textwrap.wrap(text, LETTERS) for text in texts]
    left = MARGIN_PX if names else 0
    top = LINE_PX * max(map(len, wrapped), default=0)
    size = [count * (side + GAP_PX) + GAP_PX for count in (columns, len(rows))]
    labelled = bool(names or texts)
    sheet = Image.new("RGB", (left + size[0], top + size[1]), WHITE if labelled else GREY)

    def corner(row: int, column: int) -> tuple[int, int]:
        return (
            left + GAP_PX + column * (side + GAP_PX),
            top + GAP_PX + row * (side + GAP_PX),
        )

    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            sheet.paste(picture, corner(r, c))
    write = ImageDraw.Draw(sheet)
    for r, name in enumerate(names):
        write.text((GAP_PX, corner(r, 0)[1] + side // 2 - LINE_PX), name, fill=BLACK)
    for c, lines in enumerate(wrapped):
        write.text((corner(0, c)[0], GAP_PX // 2), "\n".join(lines), fill=BLACK)
    sheet.save(path, quality=90, method=6)

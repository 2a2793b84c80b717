"""Append rows of measurements to a file: one JSON object a line (utils/report_rows.py reads)."""

import json
from pathlib import Path

from utils.errors import UserError


def append(path: Path, rows: list[dict]) -> None:
    """Append rows, each with one write; a line that an interruption cut off is ended first.

    Without rows it only tries, and leaves no file where there was none.

    Raises: UserError if the file cannot be written; rows that are in it stay.
    """
    try:
        only_tried = not rows and not path.exists()
        with path.open("a+b") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        if only_tried:
            path.unlink()
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"--results {path}: cannot be written ({why})") from None

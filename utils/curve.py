"""Plot the curve of step caching: computed steps against the worst picture's PSNR (cache_sweep.py).

The envelopes of the masks and of the calibrated ones are drawn as lines: for so many computed
steps, the best that any of them reaches. The presets are named.
"""

import itertools

from utils.diffusers_caches import FIRST_BLOCK, MAGNITUDE
from utils.report_plot import WIDTH, Drawing, text_width, ticks, to_png
from utils.steps.step_mask import PRESETS

LEFT, RIGHT, TOP, HEIGHT = 64, WIDTH - 24, 56, 420  # pixels
MARGIN_DB = 15.0  # above another seed: what a preset has to keep on trained small weights
GATE_DB = 31.0  # what it has to keep on FLUX.1's own
STYLES = {
    "mask": "edge",
    "calibrated": "good",
    "dbcache": "floor",
    "dbcache mask": "whisker",
    FIRST_BLOCK: "violet",
    MAGNITUDE: "gold",
    "fewer steps": "muted",
}
WORDS = {
    "mask": "step mask",
    "calibrated": "calibrated mask",
    "dbcache": "DBCache, thresholds",
    "dbcache mask": "DBCache, a mask's steps",
    FIRST_BLOCK: "first-block cache",
    MAGNITUDE: "MagCache",
    "fewer steps": "fewer steps",
}


def front(rows: list[dict]) -> list[dict]:
    """Keep the rows that no other beats with as few computed steps or fewer."""
    best, kept = -1.0, []
    for row in sorted(rows, key=lambda row: (row["computed"], -_worst(row))):
        if _worst(row) > best:
            best = _worst(row)
            kept.append(row)
    return kept


def draw(rows: list[dict]) -> bytes:
    """Draw every row as a point. Returns: a PNG"""
    drawing, steps = Drawing(), max(row["steps"] for row in rows)
    shown = [row for row in rows if row["quality"]["psnr_db_worst"] is not None]
    seed_db = rows[0]["quality"]["other_seed_psnr_db"] or 0.0
    small = rows[0]["psnr_on_flux"] is not None
    gate = (seed_db + MARGIN_DB, f"another seed + {MARGIN_DB:g} dB")
    gate = gate if small else (GATE_DB, f"{GATE_DB:g} dB")
    marks = ticks(max([gate[0], *map(_worst, shown)]))
    bottom = TOP + HEIGHT

    def x_of(computed: float) -> float:
        return LEFT + (RIGHT - LEFT) * computed / steps

    def y_of(db: float) -> float:
        return bottom - HEIGHT * max(0.0, db) / marks[-1]

    call = rows[0]["call"]
    title = f"{call['ckpt']}, {steps} steps, PSNR of the worst picture of {len(call['prompt'])}"
    drawing.text(LEFT, 16, title, "text", size=15)
    at = LEFT
    for kind, style in STYLES.items():
        if any(row["kind"] == kind for row in rows):
            drawing.box(at, 34, 8, 8, style)
            drawing.text(at + 14, 38, WORDS[kind], "muted", size=12)
            at += 34 + text_width(WORDS[kind], 12)
    for mark in marks:
        drawing.line(LEFT, y_of(mark), RIGHT, y_of(mark), "grid")
        drawing.text(LEFT - 8, y_of(mark), f"{mark:g} dB", "muted", "end", 12)
    for computed in range(0, steps + 1, 4):
        drawing.text(x_of(computed), bottom + 14, f"{computed:g}", "muted", "middle", 12)
    drawing.text(RIGHT, bottom + 32, f"computed steps of {steps}", "muted", "end", 12)
    for db, words in ((seed_db, "another seed"), gate):
        drawing.line(LEFT, y_of(db), RIGHT, y_of(db), "floor", 1.5)
        drawing.text(LEFT + 6, y_of(db) - 9, words, "floor", size=12)
    for kind, style in (("mask", "bar"), ("calibrated", "good")):
        best = front([row for row in shown if row["kind"] == kind])
        for a, b in itertools.pairwise(best):
            ends = x_of(a["computed"]), y_of(_worst(a)), x_of(b["computed"]), y_of(_worst(b))
            drawing.line(*ends, style, 2)
    for row in shown:
        x, y = x_of(row["computed"]), y_of(_worst(row))
        drawing.box(x - 3, y - 3, 6, 6, STYLES[row["kind"]])
    presets = {(preset.mask, preset.order, preset.gain): name for name, preset in PRESETS.items()}
    for row in shown:
        if row["kind"] == "mask" and (row["mask"], row["order"], row["gain"]) in presets:
            name = presets[row["mask"], row["order"], row["gain"]]
            x, y = x_of(row["computed"]), y_of(_worst(row))
            top = min(y_of(_worst(other)) for other in shown if x_of(other["computed"]) == x)
            drawing.line(x, y - 4, x, top - 28, "text")
            drawing.text(x, top - 36, name, "text", "middle")
    drawing.height = bottom + 44
    return to_png(drawing)


def _worst(row: dict) -> float:
    worst = row["quality"]["psnr_db_worst"]
    return float("inf") if worst is None else worst

"""The points of the step caching curve: every way to compute less that the sweep compares."""

from dataclasses import dataclass

from utils.diffusers_caches import FIRST_BLOCK, MAGNITUDE
from utils.errors import UserError
from utils.steps.step_mask import PRESETS, mask_of

PREDICTIONS = ((0, 1.0), (1, 0.5), (1, 1.0), (2, 0.5))  # order and gain
WARM, PERIODS = (3, 4, 6), (2, 3, 4, 5)
FEWER = (24, 20, 16, 14, 12, 10, 8)  # steps of a plain run
THRESHOLDS = (0.04, 0.08, 0.12, 0.2, 0.3, 0.5)  # of DBCache and of the first-block cache
MAGNITUDES = (0.03, 0.06, 0.12, 0.24, 0.5)  # of MagCache; its authors take 0.24 for Dev
SKIPS = {"max_skip_steps": 5, "retention_ratio": 0.2}  # at most in a row; of the steps, never
BLOCKS = ((4, 3), (4, 4))  # warm steps and period of masks that DBCache is given as well
CALIBRATED = (6, 7, 8, 10, 12, 14, 16)  # computed steps of masks fitted to the weights


@dataclass(frozen=True)
class Point:
    """One way to compute less."""

    name: str
    kind: str  # one of curve.py's
    mask: tuple[bool, ...] | None = None
    order: int = 0
    gain: float = 1.0
    steps: int | None = None  # of a plain run, or to be computed by a calibrated mask
    settings: dict | None = None  # cache-dit's, over those of cache_config.yaml; or diffusers'


def every(warm: int, period: int, steps: int) -> tuple[bool, ...]:
    """Compute the first `warm` steps, from the last of them every `period`-th, and the last."""
    return tuple(
        step < warm or (step - warm + 1) % period == 0 or step == steps - 1 for step in range(steps)
    )


def published(steps: int) -> dict[str, tuple[bool, ...]]:
    """Give the masks that cache-dit publishes for 28 steps, read from the installed package."""
    from cache_dit import steps_mask

    if steps < 8:  # it has masks for 4 and 6 steps of distilled models, and no others
        return {}
    names = ("slow", "medium", "fast", "ultra")
    return {
        f"cache-dit's {name}": tuple(map(bool, steps_mask(total_steps=steps, mask_policy=name)))
        for name in names
    }


def points(steps: int) -> list[Point]:
    """List every point of the curve for a number of steps."""
    masks = {f"{w}/{p}": every(w, p, steps) for w in WARM for p in PERIODS} | published(steps)
    for name in PRESETS:  # of 28 steps they are some of those above
        if (mask := mask_of(name, steps)) not in masks.values():
            masks[name] = mask
    found = [
        Point(f"{name} o{order} g{gain:g}", "mask", mask, order, gain)
        for name, mask in masks.items()
        for order, gain in PREDICTIONS
    ]
    found += [Point(f"calibrated {n}", "calibrated", steps=n) for n in CALIBRATED if n < steps]
    found += [Point(f"{n} steps", "fewer steps", steps=n) for n in FEWER if n < steps]
    for value in THRESHOLDS:
        settings = {"residual_diff_threshold": value}
        found.append(Point(f"threshold {value:g}", "dbcache", settings=settings))
    for warm, period in BLOCKS:
        mask = every(warm, period, steps)
        for taylor in (False, True):
            settings = {
                "steps_computation_mask": [int(computed) for computed in mask],
                "steps_computation_policy": "static",
                "enable_taylorseer": taylor,
            }
            label = f"{warm}/{period} blocks o{int(taylor)}"
            found.append(Point(label, "dbcache mask", mask, settings=settings))
    for value in THRESHOLDS:
        found.append(Point(f"{FIRST_BLOCK} {value:g}", FIRST_BLOCK, settings={"threshold": value}))
    for value in MAGNITUDES:
        settings = {"threshold": value} | SKIPS
        found.append(Point(f"{MAGNITUDE} {value:g}", MAGNITUDE, settings=settings))
    return found


def choose(listed: list[Point], wanted: str | None) -> list[Point]:
    """Pick points by name or kind.

    Raises: UserError for a word that is neither.
    """
    if wanted is None:
        return listed
    words = [word.strip() for word in wanted.split(",")]
    for word in words:
        if not any(word in (point.name, point.kind) for point in listed):
            kinds = ", ".join(dict.fromkeys(point.kind for point in listed))
            raise UserError(
                f"--points: unknown point {word!r} (expected kinds: {kinds}, or names such as "
                f"{listed[0].name!r})"
            )
    return [point for point in listed if point.name in words or point.kind in words]

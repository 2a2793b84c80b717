"""Draw the curve of step caching, computed steps against PSNR: python -m utils.cache_sweep

Every point is the run that the flags describe with some of its steps reused, compared with the same
run that computes all of them, same prompts and seeds. Five kinds: a mask (`--step_mask`), DBCache
with its thresholds (`--cache_dit_config`, which decides by itself), DBCache with a mask's steps (to
compare predicting the middle blocks' residual with predicting the whole output), masks calibrated
on other prompts and seeds of the same weights (utils/calibrate.py), and simply fewer steps, which a
cache has to beat. Rows go to results/curves/<checkpoint>.jsonl, the plot beside them. The presets
of utils/steps/step_mask.py are read off it.

With FLUX.1's own weights: python -m utils.cache_sweep --ckpt black-forest-labs/FLUX.1-dev
"""

import copy
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from utils.benchmark_utils import create_parser, refuse_given
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries
from utils.steps.step_mask import PRESETS, mask_of

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
PREDICTIONS = ((0, 1.0), (1, 0.5), (1, 1.0), (2, 0.5))  # order and gain
WARM, PERIODS = (3, 4, 6), (2, 3, 4, 5)
FEWER = (24, 20, 16, 14, 12, 10, 8)  # steps of a plain run
THRESHOLDS = (0.04, 0.08, 0.12, 0.2, 0.3, 0.5)
BLOCKS = ((4, 3), (4, 4))  # warm steps and period of masks that DBCache is given as well
CALIBRATED = (6, 7, 8, 10, 12, 14, 16)  # computed steps of masks fitted to the weights
SETTINGS = ROOT / "cache_config.yaml"


@dataclass(frozen=True)
class Point:
    """One way to compute less."""

    name: str
    kind: str  # "mask", "calibrated", "dbcache", "dbcache mask" or "fewer steps"
    mask: tuple[bool, ...] | None = None
    order: int = 0
    gain: float = 1.0
    steps: int | None = None  # of a plain run, or to be computed by a calibrated mask
    settings: dict | None = None  # cache-dit's, over those of cache_config.yaml


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
    return found


class Sweep:
    """One checkpoint, the prompts, and the pictures of all steps."""

    def __init__(self, argv: list[str]) -> None:
        """Settle the run, load its pipeline, apply its steps, and make its pictures."""
        from utils import masked_forward, quality, reference
        from utils.pipeline_utils import load_pipeline, optimize
        from utils.prompts import quality_prompts

        self.argv, self.args = argv, _settle(argv)
        self.prompts = quality_prompts(self.args)[: self.args.quality_prompts]
        self.pipeline = optimize(load_pipeline(self.args), self.args)
        masked_forward.install(self.pipeline, lambda steps: (True,) * steps, 0, 1.0)
        self.full, _ = self.run(self.pipeline, self.args)
        other = copy.copy(self.args)
        other.seed += reference.OTHER_SEED
        self.other_db = quality.mean_psnr_db(
            self.run(self.pipeline, other)[0].images, self.full.images
        )
        self.recorded = None  # the calibration's full loop
        self.eager = self.full if self.args.compile_export_mode == "disabled" else None

    def run(self, pipeline, args, computed=None) -> tuple:
        """Make the pictures of every prompt, image k seeded with seed + k.

        `computed` gives the steps that the last call computed, by default the mask's.

        Returns: the Result, and how many steps a picture computed, on average
        """
        import torch

        from utils import quality

        computed = computed or (lambda: pipeline.masked.used["computed"])
        results, counts = [], []
        for k, prompt in enumerate(self.prompts):
            part = copy.copy(args)
            part.seed = args.seed + k
            results.append(quality.run(pipeline, part, [prompt]))
            counts.append(len(computed()))
        images = [image for result in results for image in result.images]
        latents = torch.cat([result.latents for result in results])
        return quality.Result(images, latents), statistics.mean(counts)

    def measure(self, point: Point) -> dict:
        """Compare one point with the run of all steps: its row."""
        from utils import card, quality, reference

        full = self.full
        if point.kind == "calibrated":
            point, table = self._calibrated(point)
            found, computed = self._masked(point, table)
        elif point.kind == "mask":
            found, computed = self._masked(point)
        elif point.kind == "fewer steps":
            self.pipeline.masked.mask_of = lambda steps: (True,) * steps
            fewer = copy.copy(self.args)
            fewer.num_inference_steps = point.steps
            found, computed = self.run(self.pipeline, fewer)
        else:
            found, computed = self._dbcache(point.settings)
            full = self.eager
        args = self.args
        own = args.checkpoint.source != "bundled" and not args.random_weights
        return {
            "format": FORMAT,
            "command": shlex.join(["python", "-m", "utils.cache_sweep", *self.argv]),
            "name": point.name,
            "kind": point.kind,
            "mask": point.mask and "".join(str(int(c)) for c in point.mask),
            "order": point.order,
            "gain": point.gain,
            "settings": point.settings,
            "computed": round(computed, 2),
            "steps": args.num_inference_steps,
            "quality": quality.compare(found, full)
            | {
                "other_seed_psnr_db": self.other_db,
                "checker_right": reference.checker_share(found.images, args, self.prompts),
                "checker_right_uncached": reference.checker_share(full.images, args, self.prompts),
            },
            "psnr_on_flux": None if own else "not measured",
            "call": card.call(args) | {"prompt": self.prompts},
            "weights": args.checkpoint.identity(args.cache_dir),
            "environment": card.environment(args),
        }

    def _masked(self, point: Point, table: dict | None = None) -> tuple:
        masked = self.pipeline.masked
        masked.mask_of, masked.table = (lambda steps: point.mask), table
        masked.order, masked.gain = point.order, point.gain
        return self.run(self.pipeline, self.args)

    def _calibrated(self, point: Point) -> tuple[Point, dict]:
        """Fit a mask on prompts and seeds of the calibration's own; the full loop runs once."""
        from utils import calibrate, fit_mask

        args = copy.copy(self.args)
        args.prompt, args.seed = calibrate.prompts_of(args), args.seed + calibrate.SEED
        self.recorded = self.recorded or fit_mask.record(self.pipeline, args)
        mask, table, _ = fit_mask.fit(self.pipeline, args, *self.recorded, point.steps)
        mask = tuple(computed == "1" for computed in mask)
        return replace(point, mask=mask, order=fit_mask.LAST - 1), table

    def _dbcache(self, settings: dict) -> tuple:
        """Run DBCache eagerly: what it computes does not depend on a compiler."""
        import yaml

        from utils.pipeline_utils import load_pipeline, optimize, reused_steps

        eager = ("--compile_export_mode", "disabled")
        if self.eager is None:
            args = _settle([*self.argv, *eager])
            plain = optimize(load_pipeline(args), args)
            self.eager, _ = self.run(plain, args, lambda: range(args.num_inference_steps))
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            base = yaml.safe_load(SETTINGS.read_text())["cache_config"]
            yaml.safe_dump({"cache_config": base | settings}, file)
            file.flush()
            args = _settle([*self.argv, *eager, "--cache_dit_config", file.name])
            pipeline = optimize(load_pipeline(args), args)
        return self.run(pipeline, args, lambda: reused_steps(pipeline, args)["computed"])


def _settle(argv: list[str]):
    from utils.prepare import prepare

    args = parser().parse_args(argv)
    prepare(args)
    return args


def parser():
    """Add what only the sweep needs to the common parser."""
    found = create_parser(__doc__.split("\n\n")[0])
    add = found.add_argument_group("the curve").add_argument
    add("--quality_prompts", type=int, default=8, help="how many of the 8 prompts are compared")
    add("--points", metavar="A,B,C", help="only these points, or all of a kind")
    add("--results", metavar="JSONL", help="default: results/curves/<checkpoint>.jsonl")
    found.set_defaults(ckpt="tiny-dev", output_file=None)
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


def line(row: dict) -> str:
    """Write a row for people."""
    scores, worst = row["quality"], row["quality"]["psnr_db_worst"]
    psnr = "identical" if worst is None else f"{scores['psnr_db_mean']:5.1f} dB, worst {worst:5.1f}"
    text = f"{row['name']:28s} {row['computed']:4.1f} of {row['steps']} computed  {psnr}, latents "
    text += f"{scores['latents_relative_l2']:.1e}"
    right = scores["checker_right"]
    return text if right is None else text + f", checker {100 * right:.0f} %"


def main() -> None:
    """Measure every point, write the rows, and draw them."""
    argv = sys.argv[1:]
    args = parser().parse_args(argv)
    if args.cache_dit_config or args.step_mask:
        raise UserError("--cache_dit_config, --step_mask: the sweep sets them itself")
    if args.random_weights:
        raise UserError("--random_weights: their pictures mean nothing, so there is no curve")
    refuse_given(args, ("prompt", "output_file"), "the sweep has its own prompts, keeps no picture")
    quiet_libraries()
    from utils import card, curve
    from utils.artifacts import write_atomically

    args = _settle(argv)
    path = Path(args.results or ROOT / "results" / "curves" / f"{Path(args.ckpt).name}.jsonl")
    if args.checkpoint.kind == "schnell":
        raise UserError(f"--ckpt {args.ckpt}: Schnell's four steps are all different; take Dev")
    wanted = choose(points(args.num_inference_steps), args.points)
    path.parent.mkdir(parents=True, exist_ok=True)
    print(card.render(args), flush=True)
    sweep = Sweep(argv)
    rows = []
    for point in wanted:
        rows.append(sweep.measure(point))
        print(line(rows[-1]), flush=True)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text.encode())
    write_atomically(path.with_suffix(".png"), curve.draw(rows))
    print(f"another seed {sweep.other_db:.1f} dB")
    if rows[0]["psnr_on_flux"]:
        print("PSNR on FLUX.1's own weights: not measured (--ckpt black-forest-labs/FLUX.1-dev)")
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    run_script(main)

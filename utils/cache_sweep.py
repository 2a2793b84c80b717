"""Draw the curve of step caching, computed steps against PSNR: python -m utils.cache_sweep

Every point is the run that the flags describe with some of its steps reused, compared with the same
run that computes all of them, same prompts and seeds. Its kinds: a mask (`--step_mask`), DBCache
with its thresholds (`--cache_dit_config`, which decides by itself), DBCache with a mask's steps (to
compare predicting the middle blocks' residual with predicting the whole output), masks calibrated
on other prompts and seeds of the same weights (utils/calibrate.py), diffusers' own step caches
(utils/diffusers_caches.py), and simply fewer steps, which a cache has to beat. Rows go to
results/curves/<checkpoint>.jsonl as they come, and the plot beside them at the end; after an
interruption the same command goes on. The presets of utils/steps/step_mask.py are read off it.

With FLUX.1's own weights: python -m utils.cache_sweep --ckpt black-forest-labs/FLUX.1-dev
"""

import copy
import json
import shlex
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from utils import diffusers_caches
from utils.benchmark_utils import create_parser, refuse_given
from utils.cache_points import Point, choose, points
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1
SETTINGS = ROOT / "cache_config.yaml"
EAGER = ("--compile_export_mode", "disabled")


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
        self.eager = self.plain = self.ratios = None  # made when a kind needs them

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
            run = self._dbcache if point.kind.startswith("dbcache") else self._diffusers
            found, computed = run(point)
            full = self.eager
        args = self.args
        own = args.checkpoint.source != "bundled" and not args.random_weights
        return {
            "format": FORMAT,
            "command": _command(self.argv),
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
        from utils import fit_mask

        args = _others(self.args)
        self.recorded = self.recorded or fit_mask.record(self.pipeline, args)
        mask, table, _ = fit_mask.fit(self.pipeline, args, *self.recorded, point.steps)
        mask = tuple(computed == "1" for computed in mask)
        return replace(point, mask=mask, order=fit_mask.LAST - 1), table

    def _load_eager(self) -> None:
        """Make the pictures of all steps eagerly, once: caches decide on the host, between blocks.

        What a cache computes does not depend on a compiler.
        """
        from utils.pipeline_utils import load_pipeline, optimize

        if self.eager is None:
            args = _settle([*self.argv, *EAGER])
            self.plain = optimize(load_pipeline(args), args)
            self.eager, _ = self.run(self.plain, args, lambda: range(args.num_inference_steps))

    def _dbcache(self, point: Point) -> tuple:
        import yaml

        from utils.pipeline_utils import load_pipeline, optimize, reused_steps

        self._load_eager()
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            base = yaml.safe_load(SETTINGS.read_text())["cache_config"]
            yaml.safe_dump({"cache_config": base | point.settings}, file)
            file.flush()
            args = _settle([*self.argv, *EAGER, "--cache_dit_config", file.name])
            pipeline = optimize(load_pipeline(args), args)
        return self.run(pipeline, args, lambda: reused_steps(pipeline, args)["computed"])

    def _diffusers(self, point: Point) -> tuple:
        """Run a cache of diffusers; MagCache's ratios are those of the calibration's prompts."""
        self._load_eager()
        kind, settings, steps = point.kind, point.settings, self.args.num_inference_steps
        if kind == diffusers_caches.MAGNITUDE and self.ratios is None:
            self.ratios = diffusers_caches.calibrate(self.plain, _others(self.args))
        config = diffusers_caches.config_of(kind, settings, steps, self.ratios)
        with diffusers_caches.enabled(self.plain.transformer, config) as computed:
            return self.run(self.plain, self.args, computed)


def _others(args):
    """Give the call with the calibration's prompts and seeds."""
    from utils import calibrate

    args = copy.copy(args)
    args.prompt, args.seed = calibrate.prompts_of(args), args.seed + calibrate.SEED
    return args


def _command(argv: list[str]) -> str:
    return shlex.join(["python", "-m", "utils.cache_sweep", *argv])


def _finished(path: Path, argv: list[str], args) -> dict[str, dict]:
    """Give the rows that this very command, code and checkpoint left before an interruption."""
    from utils import card

    same = {"command": _command(argv), "weights": args.checkpoint.identity(args.cache_dir)}
    try:
        rows = [json.loads(row) for row in path.read_text().splitlines()]
        kept = [row for row in rows if same.items() <= row.items()]
        here = {"commit": card.commit(), "variables": card.variables()}
        now = [row for row in kept if here.items() <= row["environment"].items()]
    except (OSError, ValueError, LookupError, AttributeError, TypeError):
        return {}  # none there, or not ours
    return {} if here["commit"].endswith("-dirty") else {row["name"]: row for row in now}


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
    from utils.report import write

    args = _settle(argv)
    path = Path(args.results or ROOT / "results" / "curves" / f"{Path(args.ckpt).name}.jsonl")
    if args.checkpoint.kind == "schnell":
        raise UserError(f"--ckpt {args.ckpt}: Schnell's four steps are all different; take Dev")
    wanted = choose(points(args.num_inference_steps), args.points)
    if problem := diffusers_caches.problem(args, {point.kind for point in wanted}):
        raise UserError(f"{problem}, or name other kinds in --points")
    print(card.render(args), flush=True)
    sweep, finished = Sweep(argv), _finished(path, argv, args)
    rows = []
    for point in wanted:
        rows.append(finished.get(point.name) or sweep.measure(point))
        print(line(rows[-1]), flush=True)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write(path, text.encode())
    write(path.with_suffix(".png"), curve.draw(rows))
    print(f"another seed {sweep.other_db:.1f} dB")
    if rows[0]["psnr_on_flux"]:
        print("PSNR on FLUX.1's own weights: not measured (--ckpt black-forest-labs/FLUX.1-dev)")
    print(f"wrote {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    run_script(main)

"""What the choices of utils/fit_mask.py are worth: masks of tiny-dev with one choice changed.

    python -m tests.calibration_variants     # minutes on a CPU; writes results/curves/variants.json

Judged as by utils/cache_sweep.py: the four prompts that no calibration sees, two seeds each.
"""

import json
from contextlib import contextmanager
from unittest import mock

from utils import calibrate, fit_mask
from utils.cache_sweep import ROOT, Point, Sweep
from utils.errors import run_script
from utils.quiet import quiet_libraries

RESULTS = ROOT / "results" / "curves" / "variants.json"
CALL = ["--device", "cpu", "--ckpt", "tiny-dev", "--max_sequence_length", "64"]
SEEDS, COMPUTED, GUIDANCES = (40, 60), (7, 14), ("2", "5")
EINSUM, PROMPTS_OF = fit_mask.numpy.einsum, calibrate.prompts_of


class VelocityAlone(fit_mask.Fitting):
    """Fit each prediction to the full loop's velocity, not to what leads back to its latents."""

    def predict(self, step: int):
        self.now = self.full.latents[step + 1] - self.step_sizes[step] * self.full.velocities[step]
        return super().predict(step)


def last_row(text: str, errors, grams, again):
    """Stand for the einsum of fit_mask.off_by: the error at the end alone."""
    return EINSUM(text, errors[-1:], grams, again[-1:])


VARIANTS = {
    "as it is": {},
    "each velocity fitted alone": {(fit_mask, "Fitting"): VelocityAlone},
    "error at the end alone": {(fit_mask.numpy, "einsum"): last_row},
    "three velocities": {(fit_mask, "LAST"): 3},
    "twelve pictures": {(calibrate, "prompts_of"): lambda args: 3 * PROMPTS_OF(args)},
}


@contextmanager
def changed(what: dict, sweeps: list[Sweep]):
    """Change names of modules for a while, and forget what was recorded without the change."""
    patches = [mock.patch.object(*place, new) for place, new in what.items()]
    for patch in patches:
        patch.start()
    for sweep in sweeps:
        sweep.recorded = None
    yield
    mock.patch.stopall()
    for sweep in sweeps:
        sweep.recorded = None


def sweeps_of(guidance: str) -> list[Sweep]:
    """Prepare the loop of all steps for each seed."""
    flags = [*CALL, "--quality_prompts", "4", "--guidance_scale", guidance]
    return [Sweep([*flags, "--seed", str(seed)]) for seed in SEEDS]


def judged(computed: int, fitted: Sweep, sweeps: list[Sweep]) -> dict:
    """Calibrate on one sweep's call and compare on others'. Units: dB, of all eight pictures"""
    from utils import quality

    point, table = fitted._calibrated(Point("", "calibrated", steps=computed))
    scores = [quality.compare(s._masked(point, table)[0], s.full) for s in sweeps]
    mean = sum(score["psnr_db_mean"] for score in scores) / len(scores)
    worst = min(score["psnr_db_worst"] for score in scores)
    return {"computed": computed, "psnr_db_mean": round(mean, 2), "psnr_db_worst": worst}


def main() -> None:
    """Measure every variant, then a mask at guidances that it was not calibrated at."""
    quiet_libraries()
    from utils import card

    own, rows = sweeps_of("3.5"), []
    for name, what in VARIANTS.items():
        with changed(what, own):
            rows += [{"variant": name, **judged(n, own[0], own)} for n in COMPUTED]
        print(*rows[-len(COMPUTED) :], sep="\n", flush=True)
    for guidance in GUIDANCES:
        there = sweeps_of(guidance)
        for name, fitted in (("3.5", own[0]), (guidance, there[0])):
            rows.append({"guidance": guidance, "calibrated_at": name, **judged(8, fitted, there)})
            print(rows[-1], flush=True)
    about = {"command": card.command(), "commit": card.commit(), "versions": card.versions()}
    about["machine"] = own[0].args.machine.name
    lines = ",\n".join(json.dumps(row) for row in rows)
    RESULTS.write_text(f'{json.dumps(about)[:-1]}, "rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    run_script(main)

"""Find which steps to compute and what predicts the others, for one checkpoint's own weights.

Three parts, on a few prompts in one batch (`python -m utils.calibrate`). The loop runs once with
all of its steps and keeps its latents x and velocities v. Then the mask is searched without the
model: whatever is predicted from computed steps by linear weights, the latents end off by a sum
of those velocities, whose length follows from their Gram matrix (steps by steps), so a mask is
judged in microseconds; computed steps are exchanged with others while that makes the latents'
error on the way smaller. At last the loop runs with that mask, and at each predicted step the
weights of the last two computed velocities are fitted by least squares to what leads back to the
full loop's latents: errors of the steps before are part of it.

Source: linear multistep methods with coefficients fitted to a model's own trajectories, as S4S
(arXiv:2502.17423) fits a solver's; here a step's cost is the forward, so the mask is chosen too.
"""

from contextlib import contextmanager

import numpy
import torch

from utils.masked_forward import MaskedForward

LAST = 2  # computed velocities that a prediction is made of
RIDGE = 1e-4  # of their Gram matrix' trace: two nearly equal velocities get no large weights
STARTS = 4  # of the search


class Recording(MaskedForward):
    """Compute every step and keep what it began from and what it gave."""

    def __init__(self, forward, steps: int, tokens: int) -> None:
        super().__init__(forward, lambda _: (True,) * steps, 0)
        self.tokens, self.latents, self.velocities = tokens, [], []

    def __call__(self, *args, **kwargs):
        """Shapes: (B, tokens, C) of each, fp32; an edited picture's tokens are left out."""
        out = super().__call__(*args, **kwargs)
        self.latents.append(kwargs["hidden_states"][:, : self.tokens].float().clone())
        self.velocities.append(out[0][:, : self.tokens].float().clone())
        return out

    def finish(self, step_sizes) -> None:
        """Add the latents behind the last step."""
        self.latents.append(self.latents[-1] + float(step_sizes[-1]) * self.velocities[-1])


class Fitting(MaskedForward):
    """Run with a mask, and fit each prediction when it is needed."""

    def __init__(self, forward, mask, full: Recording, step_sizes) -> None:
        super().__init__(forward, lambda _: mask, LAST - 1, table={})
        self.full, self.step_sizes, self.now = full, step_sizes.tolist(), None

    def __call__(self, *args, **kwargs):
        """Keep what the step begins from; behind the last one `now` is where the loop ends."""
        step, tokens = self.step, self.full.tokens
        self.now = kwargs["hidden_states"][:, :tokens].float()
        out = super().__call__(*args, **kwargs)
        self.now = self.now + self.step_sizes[step] * out[0][:, :tokens].float()
        return out

    def predict(self, step: int):
        """Fit the weights that lead to the full loop's latents behind this step, and use them."""
        wanted = (self.full.latents[step + 1] - self.now) / self.step_sizes[step]
        given = [v[:, : self.full.tokens].double().flatten() for _, v in self.known]
        gram = gram_of(given)
        right = torch.stack([v @ wanted.double().flatten() for v in given])
        self.table[step] = tuple(solve(gram.cpu().numpy(), right.cpu().numpy()).tolist())
        return super().predict(step)


def gram_of(vectors: list[torch.Tensor]) -> torch.Tensor:
    """Give every product of two of them. Shapes: (n, n), fp64"""
    stacked = torch.stack(vectors)
    return stacked @ stacked.T


def solve(gram: numpy.ndarray, right: numpy.ndarray) -> numpy.ndarray:
    """Solve the normal equations, weights that cancel each other held back."""
    return numpy.linalg.solve(gram + RIDGE * gram.trace() * numpy.eye(len(gram)), right)


def off_by(mask: numpy.ndarray, grams: numpy.ndarray, step_sizes: numpy.ndarray) -> float:
    """Foretell how far off the latents are on the way: a score to compare masks by.

    The squared errors before each computed step and at the end, added up, as a mean of logarithms
    over the pictures. The velocities are taken from the full loop; what an error does to later ones
    is not foretold, but an early error counts at every step behind it. On tiny-dev the error at the
    end alone chose masks of 7 steps that were 3 dB worse (tests/calibration_variants.py).

    Shapes: mask (n,) of bool, grams (B, n, n), step_sizes (n,)
    """
    mean, known = grams.mean(0), []
    error, errors = numpy.zeros(len(mask)), []  # of the latents, as weights of the velocities
    for step, computed in enumerate(mask):
        if computed:
            known.append(step)
            errors.append(error.copy())
            continue
        last = known[-LAST:]
        error[last] += step_sizes[step] * solve(mean[numpy.ix_(last, last)], mean[last, step])
        error[step] -= step_sizes[step]
    errors = numpy.array([*errors, error])
    squared = numpy.einsum("ri,bij,rj->b", errors, grams, errors)
    return float(numpy.log(squared).mean())


def search(grams: numpy.ndarray, step_sizes: numpy.ndarray, computed: int) -> numpy.ndarray:
    """Find a mask of so many computed steps, the first among them.

    From an even mask and a few random ones: the best exchange of a computed step with another,
    until none makes the error smaller.
    """
    steps, random, best = len(step_sizes), numpy.random.default_rng(0), (numpy.inf, None)
    for start in range(STARTS):
        mask = numpy.zeros(steps, bool)
        mask[numpy.linspace(0, steps - 1, computed).astype(int)] = start == 0
        if start:
            mask[[0, *random.choice(numpy.arange(1, steps), computed - 1, replace=False)]] = True
        found = off_by(mask, grams, step_sizes)
        while True:
            exchanged = []
            for out in numpy.flatnonzero(mask)[1:]:
                for into in numpy.flatnonzero(~mask):
                    other = mask.copy()
                    other[[out, into]] = False, True
                    exchanged.append((off_by(other, grams, step_sizes), tuple(other)))
            least, other = min(exchanged)
            if least >= found:
                break
            found, mask = least, numpy.array(other)
        best = min(best, (found, tuple(mask)))
    return numpy.array(best[1])


def record(pipeline, args) -> tuple[Recording, numpy.ndarray]:
    """Run the full loop once. Returns: what it went through, and each step's size in sigma."""
    from utils.pipeline_utils import generate

    tokens = args.height * args.width // 256
    full = Recording(pipeline.masked.forward, args.num_inference_steps, tokens)
    with _standing(pipeline, full):
        generate(pipeline, args)
    step_sizes = pipeline.scheduler.sigmas.double().diff().cpu().numpy()
    full.finish(step_sizes)
    return full, step_sizes


def fit(pipeline, args, full: Recording, step_sizes, computed: int) -> tuple[str, dict, float]:
    """Search a mask of so many computed steps and fit its predictions.

    Returns: the mask, the weights by predicted step, and the final latents' relative error (L2)
    """
    from utils.pipeline_utils import generate

    images = zip(*[v.double().flatten(1) for v in full.velocities], strict=True)
    grams = torch.stack([gram_of(list(image)) for image in images]).cpu().numpy()
    mask = tuple(map(bool, search(grams, step_sizes, computed)))
    fitting = Fitting(pipeline.masked.forward, mask, full, step_sizes)
    with _standing(pipeline, fitting):
        generate(pipeline, args)
    end = full.latents[-1]
    error = float((fitting.now - end).norm() / end.norm())
    return "".join(str(int(c)) for c in mask), fitting.table, error


@contextmanager
def _standing(pipeline, forward: MaskedForward):
    """Put another forward where install() has put the mask's, for a while."""
    before = pipeline.masked
    pipeline.masked = pipeline.transformer.forward = forward
    try:
        yield
    finally:
        pipeline.masked = pipeline.transformer.forward = before

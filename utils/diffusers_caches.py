"""Step caches that diffusers brings, for the curve: first-block cache and MagCache.

Both are hooks around the transformer's blocks (diffusers.hooks) that Dynamo does not trace, so they
are compared by their pictures and not offered as a step. The first-block cache runs the first block
in every step and reuses the others' residual while the first one's changes little. MagCache reuses
the residual of all blocks as long as the errors add up to less than a threshold, which it foretells
by the ratios of residuals' norms in a run without it.

Source: first-block cache of ParaAttention; MagCache, arXiv:2506.09045; both as diffusers has them
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

FIRST_BLOCK, MAGNITUDE = "first-block cache", "magcache"
OTHER_BLOCKS = ("fused_mlp", "fused_kernels", "modulation")  # steps with blocks of classes of ours


def problem(args, kinds: set[str]) -> str | None:
    """Say in one line what these caches cannot wrap."""
    wanted = [kind for kind in (FIRST_BLOCK, MAGNITUDE) if kind in kinds]
    names = [name for name in OTHER_BLOCKS if args.plan[name].is_on]
    if not wanted or not names:
        return None
    return (
        f"{', '.join(wanted)}: found other blocks than diffusers' own, the only ones that its "
        f"caches know; leave out the step{'s' * (len(names) > 1)} {', '.join(names)}"
    )


def config_of(kind: str, settings: dict, steps: int, ratios: list[float] | None):
    """Build diffusers' configuration of a kind. Shapes: ratios (steps,)"""
    from diffusers import FirstBlockCacheConfig, MagCacheConfig

    if kind == FIRST_BLOCK:
        return FirstBlockCacheConfig(**settings)
    return MagCacheConfig(num_inference_steps=steps, mag_ratios=ratios, **settings)


def calibrate(pipeline, args) -> list[float]:
    """Run the call once and give its ratios, each step's norm of the residual over the last one's.

    Shapes: (steps,), 1.0 first
    """
    from diffusers import MagCacheConfig

    from utils.pipeline_utils import generate

    config = MagCacheConfig(calibrate=True, num_inference_steps=args.num_inference_steps)
    printed = io.StringIO()  # the only place where diffusers gives them
    with enabled(pipeline.transformer, config), contextlib.redirect_stdout(printed):
        generate(pipeline, args)
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("[1.0, ")]
    return json.loads(line)


@contextmanager
def enabled(transformer, config) -> Iterator[Callable[[], list[int]]]:
    """Let diffusers cache an eager transformer's steps.

    Yields: a function that gives the steps that ran the last block, since it was last asked.
    """
    calls: list[bool] = []  # one a step: did it run the last block?
    forward = transformer.forward

    def step(*args, **kwargs):
        calls.append(False)
        with transformer.cache_context("cond"):  # Kontext's pipeline sets none
            return forward(*args, **kwargs)

    def ran(*_) -> None:
        calls[-1] = True

    def computed() -> list[int]:
        found = [k for k, whole in enumerate(calls) if whole]
        calls.clear()
        return found

    counted = transformer.single_transformer_blocks[-1].norm.register_forward_hook(ran)
    transformer.enable_cache(config)
    transformer.forward = step
    try:
        yield computed
    finally:
        transformer.forward = forward
        transformer.disable_cache()
        counted.remove()

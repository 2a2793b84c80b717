"""Step caching with cache-dit's DBCache: reuse what the middle blocks computed a step earlier.

It wraps the blocks, so it comes before quantisation looks for Linears in them and before the
compiler traces them. Settings come from a YAML file (`cache_config.yaml` explains each key);
flux-fast's older file is understood, and a key that nobody would read is refused, since cache-dit
itself ignores it silently. Schnell has four steps, all different: there is nothing to reuse, and
the step is refused. One decision serves the whole batch, so an image of a batch differs from its
single image by as much as a cache costs.
"""

import dataclasses
import math
from pathlib import Path

from utils.errors import UserError
from utils.random_weights import configs_of
from utils.steps import Verdict, not_given, on, own_class, refused
from utils.work import TRANSFORMER

NAME = "cache_dit"
AFTER = ("fused_projections", "fused_mlp", "fa3")
PARTS = ("pipeline",)

# flux-fast's names, from an older cache-dit
OLD_KEYS = {"warmup_steps": "max_warmup_steps"}
OLD_TAYLOR = {"n_derivatives": "taylorseer_order"}  # inside of taylorseer_kwargs
TAYLOR_KEYS = {  # key in the file -> TaylorSeerCalibratorConfig's
    "enable_taylorseer": "enable_calibrator",
    "enable_encoder_taylorseer": "enable_encoder_calibrator",
    "taylorseer_cache_type": "calibrator_cache_type",
    "taylorseer_order": "taylorseer_order",
}
ALWAYS = ("Fn_compute_blocks", "Bn_compute_blocks")  # blocks that are never reused
# What each key may be: cache-dit checks two of them, in the first forward, and believes the others
LEAST = {  # of whole numbers; -1: no limit
    "Fn_compute_blocks": 1,
    "Bn_compute_blocks": 0,
    "max_warmup_steps": 0,
    "warmup_interval": 1,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": -1,
    "num_inference_steps": 1,
    "force_refresh_step_hint": 1,
    "taylorseer_order": 0,
}
THRESHOLDS = ("residual_diff_threshold", "max_accumulated_residual_diff_threshold")
SWITCHES = (
    *("enable_separate_cfg", "cfg_compute_first", "cfg_diff_compute_separate"),
    *("enable_taylorseer", "enable_encoder_taylorseer"),
)
CHOICES = {
    "steps_computation_policy": ("dynamic", "static"),
    "force_refresh_step_policy": ("once", "repeat"),
    "taylorseer_cache_type": ("residual", "hidden_states"),
}


def add_flags(parser) -> None:
    """Add the flag that turns the step on: it is lossy, so it is off without its settings."""
    parser.add_argument(
        "--cache_dit_config",
        metavar="YAML",
        help="step cache settings, such as cache_config.yaml (Dev and Kontext; lossy)",
    )


def check(args) -> Verdict:
    """Refuse what cannot be cached, and a file that cannot be read to the last key."""
    path = args.cache_dit_config
    if not path:
        return not_given("--cache_dit_config")
    if args.checkpoint.kind == "schnell":
        return refused(
            f"--cache_dit_config {path}: {args.checkpoint.name} takes "
            f"{args.num_inference_steps} distilled steps, none like the last, so there is nothing "
            "to reuse; leave the flag out"
        )
    if args.compile_export_mode == "export_aoti":
        return refused(
            "--cache_dit_config: a step cache decides between the blocks and cannot be exported; "
            "use --compile_export_mode compile"
        )
    if args.scheduler == "heun":
        return refused(
            f"--cache_dit_config {path}: the cache counts forwards as steps, heun takes two a "
            "step; leave one of the two out"
        )
    if args.true_cfg_scale is not None:
        return refused(
            f"--cache_dit_config {path}: one cache would mix the two forwards of true CFG; leave "
            "out --cache_dit_config or --true_cfg_scale"
        )
    try:
        cache, taylor = read_settings(path)
    except ValueError as error:
        return refused(f"--cache_dit_config {path}: {error}")
    config = TRANSFORMER | configs_of(args.checkpoint)["transformer"]
    blocks = config["num_layers"] + config["num_single_layers"]
    if problem := _blocks_problem(cache, blocks, args.checkpoint.name):
        return refused(f"--cache_dit_config {path}: {problem}")
    return on(lossless=False, **cache, **({"taylorseer": taylor} if taylor else {}))


def read_settings(path: str | Path) -> tuple[dict, dict]:
    """Read a settings file: DBCacheConfig's arguments, and TaylorSeer's or an empty dict.

    Raises: ValueError in one line for an unreadable file, an unknown key or a value that cannot be.
    """
    import yaml
    from cache_dit import DBCacheConfig

    try:
        found = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ValueError(error.strerror) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: bytes, a date
        raise ValueError(f"no YAML: {' '.join(str(error).split())}") from None
    found = found.get("cache_config", found) if isinstance(found, dict) else found
    if found is None:
        raise ValueError("the file is empty, expected keys and values as in cache_config.yaml")
    if not isinstance(found, dict):
        raise ValueError(f"found {type(found).__name__}, expected keys and values")
    found = {OLD_KEYS.get(key, key): value for key, value in found.items()}
    derivatives = found.pop("taylorseer_kwargs", None)
    if not isinstance(derivatives, dict | None):
        raise ValueError(f"taylorseer_kwargs: found {derivatives!r}, expected keys and values")
    if derivatives:  # flux-fast: taylorseer_kwargs: {n_derivatives: 2}
        found |= {OLD_TAYLOR.get(key, key): value for key, value in derivatives.items()}
    if found.pop("cache_type", "DBCache") != "DBCache":
        raise ValueError("cache_type: expected DBCache")
    known = {field.name: field.default for field in dataclasses.fields(DBCacheConfig)}
    for key, value in found.items():
        if key not in known and key not in TAYLOR_KEYS:
            raise ValueError(f"unknown key {key} (expected {', '.join((*known, *TAYLOR_KEYS))})")
        optional = value is None and known.get(key, "") is None
        if not optional and (expected := _expected(key, value)):
            raise ValueError(f"{key}: found {value!r}, expected {expected}")
    taylor = {TAYLOR_KEYS[key]: value for key, value in found.items() if key in TAYLOR_KEYS}
    cache = {key: value for key, value in found.items() if key not in TAYLOR_KEYS}
    return cache, taylor if taylor.get("enable_calibrator") else {}


def _expected(key: str, value) -> str:
    """Say what a key's value should have been; "" if it is."""
    if key in LEAST:
        whole = isinstance(value, int) and not isinstance(value, bool)
        return "" if whole and value >= LEAST[key] else f"a whole number, {LEAST[key]} or more"
    if key in THRESHOLDS:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return "" if number and 0 <= value < math.inf else "a number, 0 or more (such as 0.12)"
    if key in SWITCHES:
        return "" if isinstance(value, bool) else "true or false"
    if key in CHOICES:
        return "" if value in CHOICES[key] else " or ".join(CHOICES[key])
    if key == "steps_computation_mask":
        fits = isinstance(value, list) and value and all(step in (0, 1) for step in value)
        return "" if fits else "a list of 1 (computed) and 0, such as [1, 1, 0, 1]"
    return ""


def _blocks_problem(cache: dict, blocks: int, name: str) -> str:
    from cache_dit import DBCacheConfig

    always = [cache.get(key, getattr(DBCacheConfig, key)) for key in ALWAYS]
    if sum(always) < blocks:
        return ""
    found = " + ".join(f"{key} {value}" for key, value in zip(ALWAYS, always, strict=True))
    return f"{found} is {sum(always)}, expected fewer than the {blocks} blocks of {name}"


def apply(pipeline, args) -> None:
    """Wrap the transformer's blocks; cache-dit forgets between calls of the pipeline."""
    import cache_dit

    cache, taylor = read_settings(args.cache_dit_config)
    transformer = pipeline.transformer  # of the hub perhaps with fewer blocks than published
    blocks = len(transformer.transformer_blocks) + len(transformer.single_transformer_blocks)
    if problem := _blocks_problem(cache, blocks, args.checkpoint.name):
        raise UserError(f"--cache_dit_config {args.cache_dit_config}: {problem}")
    own_class(pipeline)  # which cache-dit patches
    calibrator = cache_dit.TaylorSeerCalibratorConfig(**taylor) if taylor else None
    cache_dit.enable_cache(
        pipeline, cache_config=cache_dit.DBCacheConfig(**cache), calibrator_config=calibrator
    )


def last_call(pipeline, args) -> dict[str, list[int]] | None:
    """Tell which steps of the last call were computed and which reused; None without a cache."""
    if not args.plan[NAME].is_on:
        return None
    reused = list(pipeline.transformer._cached_steps)  # cache-dit sets it after every call
    computed = [step for step in range(args.num_inference_steps) if step not in reused]
    return {"computed": computed, "reused": reused}

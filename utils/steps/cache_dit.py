"""Step caching with cache-dit's DBCache: reuse what the middle blocks computed a step earlier.

It wraps the blocks, so it comes before quantisation looks for Linears in them and before the
compiler traces them. Settings come from a YAML file (`cache_config.yaml` explains each key).
Schnell has four steps, all different: there is nothing to reuse, and the step is refused.
"""

from pathlib import Path

from utils.steps import Verdict, off, on, refused

NAME = "cache_dit"
AFTER = ("fused_projections", "fa3")


def add_flags(parser) -> None:
    """Add the flag that turns the step on: it is lossy, so it is off without its settings."""
    parser.add_argument(
        "--cache_dit_config",
        metavar="YAML",
        help="step cache settings, such as cache_config.yaml (Dev and Kontext; lossy)",
    )


def check(args) -> Verdict:
    """Refuse what cannot be cached, and a file that cannot be read."""
    path = args.cache_dit_config
    if not path:
        return off("no --cache_dit_config")
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
    import yaml

    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        return refused(f"--cache_dit_config {path}: {' '.join(str(error).split())}")
    if not isinstance(settings, dict) or "cache_config" not in settings:
        return refused(f"--cache_dit_config {path}: no `cache_config:` section found")
    return on(lossless=False, file=Path(path).name, **settings["cache_config"])


def apply(pipeline, args) -> None:
    """Wrap the transformer's blocks."""
    import cache_dit

    cache_dit.enable_cache(pipeline, **cache_dit.load_configs(args.cache_dit_config))

"""True classifier-free guidance: a second forward with a negative prompt in every step.

FLUX.1-dev and Kontext learnt guidance by distillation (`--guidance_scale`, an input of the one
forward, free); Schnell has none. True CFG is the older way, works with all of them, and costs a
second forward of the transformer in every step and a second encoding of text. It runs only if both
its flags are given, since diffusers ignores either one alone.

Source: Ho and Salimans 2022, arXiv:2207.12598; diffusers 0.42, pipeline_flux.py
"""

MOST_SCALE = 1000  # far beyond any use; from 1e20 on numbers overflow, and pictures are black
MOST_SHOWN = 60  # letters of a prompt in a message
COST = "true CFG runs the transformer twice in every step"


def add_flags(add) -> None:
    """Add the scale and the negative prompt; `add` is a parser's add_argument."""
    add(
        "--guidance_scale",
        type=float,
        help="distilled guidance, an input that costs nothing: Dev 3.5, Kontext 2.5, Schnell none",
    )
    add(
        "--true_cfg_scale",
        type=float,
        help="more than 1: also push away from --negative_prompt, at twice the transformer's work "
        "(off unless both are given)",
    )
    add("--negative_prompt", help="what to push away from (may be empty); with --true_cfg_scale")


def problems(args) -> list[str]:
    """Refuse half of the pair, and scales that diffusers would leave out silently."""
    distilled, scale, negative = args.guidance_scale, args.true_cfg_scale, args.negative_prompt
    found = []
    if distilled is not None and not 0 <= distilled <= MOST_SCALE:
        found.append(
            f"--guidance_scale {distilled:g}: expected a finite number, 0 or more, {MOST_SCALE} at "
            "most"
        )
    if scale is None and negative is not None:
        shown = negative if len(negative) <= MOST_SHOWN else negative[:MOST_SHOWN] + "..."
        found.append(
            f"--negative_prompt {shown!r}: has no effect without --true_cfg_scale (such as 2; "
            f"{COST}); give both or neither"
        )
    if scale is not None and negative is None:
        found.append(
            f"--true_cfg_scale {scale:g}: has no effect without --negative_prompt (may be empty: "
            "''); give both or neither"
        )
    elif scale is not None and not 1 < scale <= MOST_SCALE:
        found.append(
            f"--true_cfg_scale {scale:g}: expected a finite number above 1 (at 1 there is none), "
            f"{MOST_SCALE} at most"
        )
    return found


def call(args) -> dict:
    """Give what the pipeline's call takes for it: one negative prompt for each prompt."""
    if args.true_cfg_scale is None:
        return {}
    return {
        "true_cfg_scale": args.true_cfg_scale,
        "negative_prompt": [args.negative_prompt] * len(args.prompt),
    }

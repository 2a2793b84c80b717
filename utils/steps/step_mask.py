"""Step caching by a fixed mask: steps that it leaves out are predicted, not computed.

Last, because it decides only whether the finished forward is called at all: compiled, exported,
recorded or eager, with float8 or without, the transformer is the same as without a mask, and so are
its packages. On a step that is left out the velocity is extrapolated from those of the last
computed steps, by a polynomial in the step's number, of which half the change is believed: a few
small elementwise kernels, nothing to decide, and so nothing for the host to wait for. DBCache
(`cache_dit`) decides by the content of each call and computes some blocks in every step; a mask
computes none of them, and is the same for every prompt.

Lossy. The presets below were chosen from the curve of trained small weights (results/curves/,
`python -m utils.cache_sweep`); for FLUX.1's own weights that curve is not drawn yet. A mask from a
file was calibrated on one checkpoint (`python -m utils.calibrate`): it has weights of its own for
every prediction, and keeps more with fewer steps. Schnell has four distilled steps, none like the
last, and is refused.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from utils import mask_file
from utils.schedulers import loop_problem
from utils.steps import Verdict, not_given, on, refused

NAME = "step_mask"
AFTER = ("cache_dit", "compile", "export_aoti")
PARTS = ("pipeline",)

ORDERS = (0, 1, 2)  # of the polynomial: constant, line, parabola
ORDER, GAIN = 1, 0.5  # where neither a flag nor a preset says otherwise


@dataclass(frozen=True)
class Preset:
    """One choice from the curve: the only place to change after another sweep."""

    mask: str  # of 28 steps: 1 is computed, 0 predicted
    order: int
    gain: float
    flux_psnr_db: float | None = None  # worst picture of FLUX.1-dev's weights; None: not measured


PRESETS = {
    "slow": Preset("1111110101010101010101010101", 1, 0.5),  # 17 computed
    "medium": Preset("1111110010010010010010010011", 1, 0.5),  # 14
    "fast": Preset("1111000100010001000100010001", 1, 0.5),  # 10
}


def add_flags(parser) -> None:
    """Add the mask, which turns the step on (it is lossy), and the order of the prediction."""
    parser.add_argument(
        "--step_mask",
        metavar="MASK",
        help=f"compute only some steps and predict the others (Dev and Kontext; lossy): "
        f"{', '.join(PRESETS)}, one 1 or 0 a step such as 1,1,1,0,0,1, the computed steps such as "
        "0-5,8,12 (the first is 0), or a file of python -m utils.calibrate, FILE.json",
    )
    parser.add_argument(
        "--step_mask_order",
        type=int,
        choices=ORDERS,
        help=f"of the predicting polynomial: 0 repeats the last (the preset's own, else {ORDER})",
    )
    parser.add_argument(
        "--step_mask_gain",
        type=float,
        help=f"part of the predicted change that is believed (the preset's own, else {GAIN})",
    )


def check(args) -> Verdict:
    """Refuse what cannot be predicted, and a mask that does not fit the call."""
    text = args.step_mask
    if not text:
        for flag in ("step_mask_order", "step_mask_gain"):
            if getattr(args, flag) is not None:
                return refused(f"--{flag} {getattr(args, flag):g}: expected with --step_mask")
        return not_given("--step_mask")
    if args.step_mask_gain is not None and not 0 <= args.step_mask_gain <= 1:
        return refused(f"--step_mask_gain {args.step_mask_gain:g}: expected 0 to 1")
    if args.checkpoint.kind == "schnell":
        return refused(
            f"--step_mask {text}: {args.checkpoint.name} takes {args.num_inference_steps} "
            "distilled steps, none like the last, so there is nothing to predict from; leave the "
            "flag out"
        )
    if args.cache_dit_config:
        return refused(
            f"--step_mask {text}: --cache_dit_config decides about the same steps, and would count "
            "those that it never sees; leave one of the two out"
        )
    if problem := loop_problem(args):
        return refused(f"--step_mask {text}: {problem}")
    if args.true_cfg_scale is not None:
        return refused(
            f"--step_mask {text}: the mask counts one forward a step, true CFG runs two; leave out "
            "--step_mask or --true_cfg_scale"
        )
    try:
        if mask_file.is_file(text):
            return _check_file(args)
        mask = mask_of(text, args.num_inference_steps)
    except ValueError as error:
        return refused(f"--step_mask {text}: {error}")
    order, gain = prediction(args)
    flux = PRESETS[text].flux_psnr_db if text in PRESETS else None
    return on(
        lossless=False,
        mask="".join(str(int(computed)) for computed in mask),
        computed=f"{sum(mask)}/{len(mask)}",
        order=order,
        gain=gain,
        psnr_on_flux="not-measured" if flux is None else f"{flux:g}dB",
    )


def _check_file(args) -> Verdict:
    for flag in ("step_mask_order", "step_mask_gain"):
        if getattr(args, flag) is not None:
            raise ValueError(f"has weights of its own; leave out --{flag}")
    found = mask_file.load(args.step_mask)
    if problem := mask_file.problem(found, args):
        raise ValueError(problem)
    return on(
        lossless=False,
        mask=found.mask,
        computed=f"{found.mask.count('1')}/{len(found.mask)}",
        calibrated=hashlib.sha256(Path(args.step_mask).read_bytes()).hexdigest()[:12],
        guidance=found.guidance,
    )


def prediction(args) -> tuple[int, float]:
    """Give order and gain: the flags', else the preset's, else the default."""
    preset = PRESETS.get(args.step_mask, Preset("", ORDER, GAIN))
    order, gain = args.step_mask_order, args.step_mask_gain
    return preset.order if order is None else order, preset.gain if gain is None else gain


def mask_of(text: str, steps: int) -> tuple[bool, ...]:
    """Read a mask for a call of so many steps: True is computed.

    A preset is stretched: up to each point of the loop the same share of steps is computed as of
    its 28. A mask that is written out fits its own number of steps only.

    Raises: ValueError in one line for what is no mask, or not one of this call.
    """
    if mask_file.is_file(text):
        text = mask_file.load(text).mask
    mask = stretch(PRESETS[text].mask, steps) if text in PRESETS else _written_out(text, steps)
    if not mask[0]:
        raise ValueError("step 0 is left out, expected it computed: there is nothing before it")
    return mask


def stretch(mask: str, steps: int) -> tuple[bool, ...]:
    """Stretch a mask to another number of steps, its line of computed steps so far kept."""
    length = len(mask)
    due = []  # computed steps before step i, rounded up; `length` times that is a whole number
    for i in range(steps + 1):
        whole, part = divmod(length * i, steps)
        inside = part * (mask[whole : whole + 1] == "1")
        due.append(-(-(mask[:whole].count("1") * steps + inside) // length))
    return tuple(due[i + 1] > due[i] for i in range(steps))


def _written_out(text: str, steps: int) -> tuple[bool, ...]:
    words = [word.strip() for word in (text.split(",") if "," in text else text)]
    if all(word in ("0", "1") for word in words):
        if len(words) != steps:
            raise ValueError(
                f"found {len(words)} entries, expected one for each of {steps} steps "
                "(--num_inference_steps)"
            )
        return tuple(word == "1" for word in words)
    computed = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        last = last if dash else first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(
                f"found {word.strip()!r}, expected {', '.join(PRESETS)}, ones and zeros, or the "
                "computed steps such as 0-5,8,12"
            )
        if int(last) >= steps:
            raise ValueError(
                f"found step {int(last)}, expected 0 to {steps - 1} of {steps} steps "
                "(--num_inference_steps)"
            )
        computed.update(range(int(first), int(last) + 1))
    return tuple(step in computed for step in range(steps))


def apply(pipeline, args) -> None:
    """Put the mask before whatever forward the steps above have made."""
    from utils.masked_forward import install

    how, text = prediction(args), args.step_mask
    if mask_file.is_file(text):
        found = mask_file.load(text)
        how, text = (found.order, 1.0, found.weights), found.mask
    install(pipeline, lambda steps: mask_of(text, steps), *how)


def last_call(pipeline, args) -> dict[str, list[int]] | None:
    """Tell which steps of the last call were computed and which reused; None without a mask."""
    return pipeline.masked.used if args.plan[NAME].is_on else None

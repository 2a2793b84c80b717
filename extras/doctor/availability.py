"""Every step with what it would do on this machine, asked for or not.

A step that is off until asked for is asked here with the flags that turn it on, so that the table
tells what the machine can do and not only what the flags say.
"""

import copy

from extras.doctor.checks import ROOT, Finding
from utils.benchmark_utils import create_parser
from utils.selection import CANDIDATES
from utils.steps import Verdict

COMPILED = ("--compile_export_mode", "compile")
NEEDS_COMPILER = (
    *("group_norm", "deferred_scales", "persistent_tma", "fusion_limits"),
    *("text_encoders", "image_encoder", "loop_graph"),
)
OTHERS = {  # step that no forward selection tries -> what asks for it
    "fa3": (),  # on by default: the candidate is one of its settings
    "cache_dit": (
        *("--cache_dit_config", str(ROOT / "cache_config.yaml"), "--compile_scope", "blocks"),
        *COMPILED,
    ),
    "text_padding": ("--drop_text_padding",),
    "text_quant": ("--quant_text_encoder",),
    "inductor_tuning_flags": COMPILED,
    "compile": COMPILED,
    "export_aoti": ("--compile_export_mode", "export_aoti"),
    "step_mask": ("--step_mask", "medium"),
}


def asking(step) -> tuple[str, ...]:
    """Give the flags that ask for a step that is off by default; none where it needs a file."""
    if step.NAME in OTHERS:
        return OTHERS[step.NAME]
    words = next((words for words, about in CANDIDATES.items() if about == step.NAME), ())
    return words + COMPILED if step.NAME in NEEDS_COMPILER else words


def asked(step, args) -> Verdict:
    """Give a step's verdict if the user asked for it; still "off" where it needs a file."""
    return step.check(create_parser().parse_args(asking(step), copy.copy(args)))


def steps(args) -> list[Finding]:
    """Say of each step whether it runs, could run if asked for, or why it cannot, in order.

    `args` is a settled call (utils/prepare.py). A step that refuses the call as it was given is a
    problem; one that would refuse if it were asked for is a note.
    """
    from extras.doctor.advice import explain
    from utils.pipeline_utils import STEPS
    from utils.prepare import ask_steps

    found = []
    for step, verdict in zip(STEPS, ask_steps(args).values(), strict=True):
        topic = f"step {step.NAME}"
        if verdict.is_on:
            settings = " ".join(f"{key}={value}" for key, value in verdict.settings.items())
            found.append(Finding(topic, "ok", f"on {settings}".rstrip()))
        elif verdict.state == "refused":
            known = explain(verdict.reason)
            fix = known[0].commands[0] if known else ""
            found.append(Finding(topic, "problem", verdict.reason, fix))
        elif verdict.state == "unavailable":
            found.append(Finding(topic, "note", f"unavailable: {verdict.reason}"))
        else:
            could = asked(step, args)
            if could.is_on:
                found.append(Finding(topic, "ok", f"off ({verdict.reason}), could run here"))
            elif could.state == "off":
                found.append(Finding(topic, "ok", f"off ({verdict.reason})"))
            else:
                text = f"off ({verdict.reason}), {could.state} if asked for: {could.reason}"
                found.append(Finding(topic, "note", text))
    return found

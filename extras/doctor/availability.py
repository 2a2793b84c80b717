"""Every step with what it would do on this machine, asked for or not.

A step that is off until asked for is asked here with the flags that turn it on, so that the table
tells what the machine can do and not only what the flags say.
"""

import copy

from extras.doctor.checks import ROOT, Finding
from utils.steps import Verdict

COMPILED = {"compile_export_mode": "compile"}
ASK = {  # step that is off by default -> the arguments that turn it on
    "fused_kernels": {"fused_kernels": True},
    "fused_mlp": {"fused_mlp": True},
    "vae_attention": {"vae_attention": True},
    "subpixel_upsampling": {"subpixel_upsampling": "transposed"},
    "group_norm": {"channel_group_norm": True} | COMPILED,
    "conv_algorithms": {"conv_benchmark": True},
    "cache_dit": {
        "cache_dit_config": str(ROOT / "cache_config.yaml"),
        "compile_scope": "blocks",
        **COMPILED,
    },
    "modulation": {"modulation_once": True},
    "text_padding": {"drop_text_padding": True},
    "triton_float8": {"triton_float8": True},
    "text_quant": {"quant_text_encoder": True},
    "deferred_scales": {"deferred_scales": True} | COMPILED,
    "persistent_tma": {"persistent_tma": True} | COMPILED,
    "inductor_tuning_flags": COMPILED,
    "fusion_limits": {"fusion_limits": True} | COMPILED,
    "text_encoders": {"compile_text_encoders": True} | COMPILED,
    "image_encoder": {"compile_image_encoder": True} | COMPILED,
    "compile": COMPILED,
    "export_aoti": {"compile_export_mode": "export_aoti"},
    "loop_graph": {"loop_graph": True, "modulation_once": True} | COMPILED,
    "step_mask": {"step_mask": "medium"},
}


def asked(step, args) -> Verdict:
    """Give a step's verdict if the user asked for it; still "off" where it needs a file."""
    args = copy.copy(args)
    vars(args).update(ASK.get(step.NAME, {}))
    return step.check(args)


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

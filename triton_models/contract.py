"""Render docs/serving-contract.md from the five configs: python -m triton_models.contract

Names, types and shapes come from config.pbtxt, bounds from requests.py; a test fails when the page
differs.
"""

import dataclasses
import re
from pathlib import Path

from triton_models.parts import HEALTH, MODELS, ROOT
from triton_models.requests import (
    FORMATS,
    MAX_PROMPT_CHARACTERS,
    MAX_SEQUENCE_LENGTH,
    SHARED,
    Limits,
)

PAGE = ROOT / "docs" / "serving-contract.md"
TENSOR = re.compile(
    r'\{ name: "(\w+)" data_type: TYPE_(\w+) dims: \[ ([^\]]+?) \]( optional: true)? \}'
)
LIMITS = Limits()
MEANING = {
    "height": f"pixels, 16 to {LIMITS.max_pixels // 16}, divisible by 16; height x width at most "
    f"{LIMITS.max_pixels}",
    "width": "likewise",
    "num_inference_steps": f"1 to {LIMITS.max_steps}",
    "guidance_scale": f"0 to {LIMITS.max_guidance:g}, where the checkpoint has an embedding for it",
    "num_images_per_prompt": f"1 up; prompts x this at most {LIMITS.max_images}",
    "prompt": f"UTF-8 text, 1 to {MAX_PROMPT_CHARACTERS} characters, not only blanks; what exceeds "
    "the encoder's tokens is cut",
    "max_sequence_length": f"T5 tokens, 1 to {MAX_SEQUENCE_LENGTH}",
    "pooled_prompt_embeds": "CLIP's pooled output, P channels",
    "prompt_embeds": "T5's output, T tokens of D channels",
    "latents": "packed latents, (height/16)(width/16) tokens of 64 channels",
    "timestep": "noise levels, 1 to 0 (FluxPipeline's timestep / 1000), N of them",
    "step_lengths": "differences of the sigmas, N; given: all N steps run here",
    "guidance": "guidance scale, where the checkpoint has an embedding for it",
    "size": "height and width in pixels, multiples of 16",
    "progress": "an answer after every step as well",
    "job": "a name to cancel it by",
    "cancel": "true: stop the jobs of this name, those that come later too; false without latents: "
    "an error if none runs; nothing else is read",
    "after": "a step: answer once the slowest running job of this name has taken more, or the last "
    "has ended; an error if none runs",
    "noise_pred": "the velocity of one step, in the latents' shape",
    "step": "steps taken so far",
    "steps": "steps in all",
    "mean_batch": "rows of the forwards it was part of, mean",
    "forward_s": "seconds in the transformer, by its share of rows",
    "queue_s": "seconds of waiting for the transformer",
    "ping": "answer with step 0 at once; nothing else is read (deep_health's)",
    "images": "PNG files, or base64 text of them; of the decoder: pixels, about -1 to 1",
    "pixels": "RGB, with format raw",
    "seed": "0 to 2**63 - 1 - max_images; image k has seed + k",
    "format": ", ".join(FORMATS),
    "model": "one to ask; all where it is absent",
    "healthy": "whether it answered",
    "models": "the models' names",
    "words": "what is wrong; empty if nothing",
}

ERRORS = (  # model, code, when
    ("bls_orchestrator", "INVALID_ARGUMENT", "a field is wrong or unknown"),
    (
        "bls_orchestrator",
        "UNAVAILABLE",
        "more than max_in_flight requests, or not done after timeout_s: retry",
    ),
    ("bls_orchestrator", "CANCELLED", "the client left; the job stopped at its next step"),
    ("bls_orchestrator", "INTERNAL", "a model failed, or its process died: its own words"),
    (
        "clip_encoder, t5_encoder",
        "INVALID_ARGUMENT",
        "a prompt is no UTF-8, or a bound is exceeded",
    ),
    (
        "dit_transformer",
        "INVALID_ARGUMENT",
        "an input is missing or beyond a bound; size no multiple of 16, or of another number of "
        "tokens than latents; guidance for a checkpoint without, or none for one with; N of "
        "timestep and step_lengths differ, or is not 1 without step_lengths; more rows than the "
        "largest batch; cancel without job, or false for a job that does not run",
    ),
    ("dit_transformer", "CANCELLED", "a request of its `job` with `cancel` came"),
    (
        "vae_decoder",
        "INVALID_ARGUMENT",
        "size beyond the bound, no multiple of 16, or of another number of tokens than latents",
    ),
    ("deep_health", "INVALID_ARGUMENT", "no model of this name"),
    ("all four", "INTERNAL", "the forward failed: its own words"),
    ("all four", "UNAVAILABLE", "the queue is full, or a request waited in it for 60 s"),
)


def tensors(text: str, part: str) -> list[tuple[str, str, str, bool]]:
    """Read `input` or `output` of a config: name, type, dims, optional."""
    body = text[text.index(f"{part} [") :]
    body = body[: body.index("\n]")]
    return [(n, kind, dims, bool(opt)) for n, kind, dims, opt in TENSOR.findall(body)]


def table(text: str, part: str) -> str:
    """Render one side of a model."""
    lines = [f"| {part} | type | shape | what |", "| --- | --- | --- | --- |"]
    batched = "B, " if "max_batch_size: 0" not in text else ""
    for name, kind, dims, optional in tensors(text, part):
        words = MEANING.get(name, "") + ("; optional" if optional else "")
        lines.append(f"| `{name}` | {kind} | ({batched}{dims}) | {words.lstrip('; ')} |")
    return "\n".join(lines)


def page() -> str:
    """Render the whole page."""
    parts = [
        "# Contract of the served models",
        "Generated by `python -m triton_models.contract` from the `config.pbtxt` files. -1 is any "
        "size; B rows are the batch. BF16 becomes FP32 with `--disable_bf16`.",
    ]
    for name in (*MODELS, HEALTH):
        text = (ROOT / "triton_models" / name / "config.pbtxt").read_text()
        about = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
        parts += [f"## {name}", about, table(text, "input"), table(text, "output")]
    limits = dataclasses.asdict(LIMITS)
    parts += [
        "## Bounds and errors",
        "The orchestrator checks every field before any work and answers INVALID_ARGUMENT with one "
        "line: what, found, expected. An unknown input is refused by Triton itself (unexpected "
        "inference input), an unknown field of an HTTP generate request by the orchestrator.",
        "| bound | default (`parameters` of bls_orchestrator) |\n| --- | --- |\n"
        + "\n".join(f"| {name} | {value} |" for name, value in limits.items()),
        f"{' and '.join(SHARED)} can be lowered there; with a raised one the model does not load, "
        "since the transformer and the decoder have them too (triton_models/requests.py).",
        "| model | code | when |\n| --- | --- | --- |\n"
        + "\n".join(f"| {names} | {code} | {when} |" for names, code, when in ERRORS),
        "The words of an error begin with its code, since a gRPC stream carries no other. Called "
        "by another model, an error becomes INTERNAL with the same words (Triton's BLS).",
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the page."""
    Path(PAGE).write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

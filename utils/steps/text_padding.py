"""T5 on the prompt's own length, rounded up to a multiple of 64, instead of all padding.

FLUX.1 reads T5's padding like words: no mask hides it, and the checkpoints were trained with it. So
fewer text tokens make every step of the transformer cheaper, and another picture, not a wrong one:
lossy, and off by default. The longest prompt of a call decides, and 64 bounds the kinds of call at
eight. Before anything that records or compiles, so that the warm-up has the run's own length.
"""

import functools

from utils import guidance
from utils.steps import Verdict, not_given, on

NAME = "text_padding"
AFTER = ()
PARTS = ("pipeline",)
MULTIPLE = 64


def add_flags(parser) -> None:
    """Add the flag that turns the step on."""
    parser.add_argument(
        "--drop_text_padding",
        action="store_true",
        help=f"text tokens: the longest prompt's, up to a multiple of {MULTIPLE}, instead of "
        "--max_sequence_length (lossy: padding is part of what FLUX.1 sees)",
    )


def check(args) -> Verdict:
    """Decide from the flags alone."""
    if not args.drop_text_padding:
        return not_given("--drop_text_padding")
    return on(lossless=False, multiple=MULTIPLE)


def bucket(tokenizer, prompts: list[str], most: int) -> int:
    """Give the text length of a call: its longest prompt's tokens, rounded up, `most` at most."""
    tokens = max(len(tokenizer(prompt, verbose=False).input_ids) for prompt in prompts)
    return min(most, -(-tokens // MULTIPLE) * MULTIPLE)


def apply(pipeline, args) -> None:
    """Shorten what encode_prompt is asked for; embeddings that are given stay as they are."""
    encode = pipeline.encode_prompt

    @functools.wraps(encode)
    def shortened(prompt=None, prompt_2=None, *, max_sequence_length=512, **named):
        if named.get("prompt_embeds") is None and prompt is not None:
            prompts = prompt_2 or prompt
            prompts = [prompts] if isinstance(prompts, str) else prompts
            max_sequence_length = bucket(pipeline.tokenizer_2, prompts, max_sequence_length)
        return encode(prompt, prompt_2, max_sequence_length=max_sequence_length, **named)

    pipeline.encode_prompt = shortened
    prompts = [*args.prompt, *guidance.call(args).get("negative_prompt", ())]
    args.text_tokens = bucket(pipeline.tokenizer_2, prompts, args.max_sequence_length)

"""What the text encoders do not get to see."""

import sys


def report_cut_prompts(pipeline, args) -> list[str]:
    """Say on stderr how many tokens of each prompt are cut, by which encoder, and go on.

    Returns: the lines, for tests.
    """
    windows = (
        ("CLIP", pipeline.tokenizer, pipeline.tokenizer_max_length, "style and pooled text only"),
        ("T5", pipeline.tokenizer_2, args.max_sequence_length, "see --max_sequence_length"),
    )
    lines = []
    for prompt in args.prompt:
        for name, tokenizer, window, hint in windows:
            found = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
            if found > window:
                lines.append(
                    f"prompt {prompt[:40]!r}...: {found - window} of {found} tokens cut by "
                    f"{name}'s window of {window} ({hint})"
                )
    for line in lines:
        print("note: " + line, file=sys.stderr)
    return lines

"""The prompts of a call, those that quality is measured on, and what no encoder gets to see."""

import sys

QUALITY = {  # what the checkpoint understands -> eight prompts
    "tiny": (
        "a red circle on a blue background",
        "a large green square at the top left on a white background",
        "a small yellow star at the bottom right on a purple background",
        "an orange triangle on a black background",
        "a large white heart at the top on a green background",
        "a blue ring at the left on a yellow background",
        "a purple diamond at the bottom on an orange background",
        "a black cross at the right on a red background",
    ),
    "tiny edits": (
        "make the background green",
        "make the background black",
        "change the background to white",
        "turn the background yellow",
        "make the background purple",
        "make it yellow",
        "turn it green",
        "paint it white",
    ),
    "pictures": (
        "a lighthouse on a cliff at dawn, oil on canvas",
        "a portrait of an old fisherman, natural light, 85 mm",
        "a street market at night in the rain, neon signs reflected in puddles",
        "an isometric cutaway of a watchmaker's workshop",
        "a red fox asleep in fresh snow, close up",
        "a shop window with the words OPEN LATE in gold letters",
        "a glass of water with ice on a wooden table, hard shadow",
        "a wide valley with a river and a tiny village, ink drawing",
    ),
    "edits": (
        "make it night, with the lamp lit",
        "make it winter, with snow on everything",
        "turn it into a pencil drawing",
        "turn it into a watercolour painting",
        "make the sky red",
        "remove the people",
        "add a small boat in the foreground",
        "make it look like an old photograph",
    ),
}
PER_KIND = 8  # prompts of each


def count_images(args) -> int:
    """Count the pictures of a call."""
    return len(args.prompt) * args.num_images_per_prompt


def quality_prompts(args) -> list[str]:
    """Choose the prompts of a checkpoint: its kind of task, in words that it understands."""
    tiny, edits = args.checkpoint.source == "bundled", args.checkpoint.kind == "kontext"
    key = ("tiny edits" if edits else "tiny") if tiny else ("edits" if edits else "pictures")
    return list(QUALITY[key])


def report_cut_prompts(pipeline, args) -> list[str]:
    """Say on stderr how many tokens of each prompt are cut, by which encoder, and go on.

    Returns: the lines, for tests.
    """
    windows = (
        ("CLIP", pipeline.tokenizer, pipeline.tokenizer_max_length, "style and pooled text only"),
        ("T5", pipeline.tokenizer_2, args.max_sequence_length, "see --max_sequence_length"),
    )
    lines = []
    negative = [args.negative_prompt] if args.negative_prompt else []
    for prompt in (*args.prompt, *negative):
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

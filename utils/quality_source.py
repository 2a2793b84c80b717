"""The quality of a run whose weights are random: the bundled checkpoint's, under the same flags.

Random weights tell speed and memory at full size; their pictures are noise, and their errors are
those of random matrices. The bundled checkpoint of the same kind was trained, so the same steps on
the same machine show on it what they do to a picture. The row keeps both.
"""

import copy

from utils import peers, quality, reference
from utils.checkpoints import BUNDLED_DIR
from utils.prepare import prepare
from utils.progress import say
from utils.prompts import quality_prompts

OWN = ("prompt", "height", "width", "image")  # fit the full-size checkpoint alone


def measure(args) -> dict:
    """Run the quality prompts on the bundled checkpoint as `args` would, in this process.

    Returns: scores as `reference.scores` gives them, with `quality_source` saying whose they are.
    Raises: RuntimeError for a broken picture.
    """
    from utils.pipeline_utils import load_pipeline

    small = copy.copy(args)
    small.ckpt, small.random_weights = f"tiny-{args.checkpoint.kind}", False
    for name in OWN:
        setattr(small, name, None)
    say("quality", f"of {small.ckpt} under the same flags, since random weights have none")
    if args.checkpoint.defaults.takes_image:
        small.image = str(BUNDLED_DIR / "source.png")  # one that it knows how to edit
    prepare(small)
    prompts = quality_prompts(small)[: small.quality_prompts]
    pipeline = load_pipeline(small)
    kept, _ = reference.load_or_make(pipeline, small, prompts, not small.disable_bf16)
    result = quality.run(peers.optimize(pipeline, small), small, prompts)
    scores = reference.scores(result, kept, small, prompts)
    size = f"{small.width}x{small.height}"
    return scores | {"quality_source": f"{small.ckpt} at {size} under the same flags"}

"""Pictures of the bundled checkpoint by plain diffusers and by the stack: read back, and compared.

The checker knows what each prompt must show, so a machine that computes wrongly is told from one
whose fast path does. Seconds without a compiler; the first export on a GPU takes its minute.
"""

import time

from extras.doctor.checks import Finding

CKPT = "tiny-schnell"
CHOSEN = (0, 1, 3, 4)  # of QUALITY["tiny"]: shapes that the checker names by a wide margin
LEAST_DB = {True: 35.0, False: 30.0}  # lossless or not, against eager; another seed is at 24-25 dB


def run(flags: list[str]) -> list[Finding]:
    """Make the same pictures twice, before and after `optimize()`, with these flags of a run."""
    from tiny_flux.checker import check_image
    from tiny_flux.scenes import parse
    from utils import card, quality
    from utils.benchmark_utils import create_parser
    from utils.pipeline_utils import load_pipeline, optimize
    from utils.prepare import prepare
    from utils.prompts import QUALITY

    start = time.perf_counter()
    args = create_parser().parse_args(["--ckpt", CKPT, *flags])
    prepare(args)
    prompts = [QUALITY["tiny"][k] for k in CHOSEN]
    pipeline = load_pipeline(args)
    results = {"plain diffusers": quality.run(pipeline, args, prompts)}
    optimize(pipeline, args)
    results["the stack"] = quality.run(pipeline, args, prompts)

    found = []
    for who, result in results.items():
        pairs = zip(prompts, result.images, strict=True)
        wrong = [
            f"{prompt!r}: wrong {', '.join(bad)}"
            for prompt, image in pairs
            if (bad := [name for name, ok in check_image(image, parse(prompt)).items() if not ok])
        ]
        right = len(prompts) - len(wrong)
        text = f"{who}: {right} of {len(prompts)} pictures show what the prompt says"
        text = "; ".join([text, *wrong])
        found.append(Finding("self-test", "problem" if wrong else "ok", text))
    scores = quality.compare(results["the stack"], results["plain diffusers"])
    worst, least = scores["psnr_db_worst"], LEAST_DB[card.is_lossless(args)]
    near = "identical" if worst is None else f"{worst:.1f} dB or more"
    text = f"the stack against plain diffusers: {near}, expected {least:.0f} dB"
    bad = worst is not None and worst < least
    found.append(Finding("self-test", "problem" if bad else "ok", text))
    seconds = time.perf_counter() - start
    on = ", ".join(name for name, verdict in args.plan.items() if verdict.is_on)
    return [*found, Finding("self-test", "ok", f"{seconds:.0f} s with {on}")]

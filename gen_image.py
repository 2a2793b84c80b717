"""Make images with every optimisation on: python gen_image.py --prompt "..." """

import time
from contextlib import nullcontext

from utils import embeddings
from utils.benchmark_utils import create_parser
from utils.errors import run_script
from utils.quiet import quiet_libraries
from utils.steps import PARTS
from utils.steps.memory import out_of_memory_explained


def main() -> None:
    """Parse, check, load, optimise, generate, save."""
    parser = create_parser("Make images with every optimisation on.")
    embeddings.add_flag(parser)
    args = parser.parse_args()
    quiet_libraries()
    from utils.prepare import announce_and_load, prepare

    with out_of_memory_explained(args):
        prepare(args)
        if not args.embedding_cache:
            produce(*announce_and_load(args), args)
            return
        text = embeddings.Remembered(args, embeddings.open_cache(args))
        pipeline, load_s = announce_and_load(args, text.unneeded)
        text.install(pipeline)
        produce(pipeline, load_s, args, text.parts)
        print(text.line())


def produce(pipeline, load_s: float, args, parts: tuple[str, ...] = PARTS) -> None:
    """Optimise a loaded pipeline, generate, save, and say what it took; extras/ do so too."""
    from utils import card, cudagraph
    from utils.calls import only_known_calls
    from utils.images import save_images
    from utils.pipeline_utils import generate, optimize, reused_steps
    from utils.steps import lora

    start = time.perf_counter()
    optimize(pipeline, args, parts)
    optimized = time.perf_counter()
    calls_s = []
    for ending in lora.turns(pipeline, args):
        begun = time.perf_counter()
        with only_known_calls() if calls_s else nullcontext():  # a swapped LoRA compiles nothing
            images = generate(pipeline, args)
        calls_s.append(time.perf_counter() - begun)
        used = reused_steps(pipeline, args)
        for line in (*card.step_cache(used), *card.cuda_graphs(cudagraph.usage(pipeline))):
            print(line)
        for path in save_images(images, args, used, ending):
            note = " (random weights: the picture means nothing)" if args.random_weights else ""
            print(f"wrote {path}{note}")
    print(
        f"load {load_s:.2f} s, optimize {optimized - start:.2f} s, generate "
        f"{', '.join(f'{s:.3f}' for s in calls_s)} s (one call each; run_benchmark.py measures)"
    )


if __name__ == "__main__":
    run_script(main)

"""Make images with every optimisation on: python gen_image.py --prompt "..." """

import time

from utils.benchmark_utils import create_parser
from utils.errors import run_script
from utils.quiet import quiet_libraries


def main() -> None:
    """Parse, check, load, optimise, generate, save."""
    args = create_parser("Make images with every optimisation on.").parse_args()

    quiet_libraries()
    from utils.prepare import begin

    produce(*begin(args), args)


def produce(pipeline, load_s: float, args) -> None:
    """Optimise a loaded pipeline, generate, save, and say what it took; extras/ do so too."""
    from utils import card, cudagraph
    from utils.images import save_images
    from utils.pipeline_utils import generate, optimize, reused_steps

    start = time.perf_counter()
    optimize(pipeline, args)
    optimized = time.perf_counter()
    images = generate(pipeline, args)
    done = time.perf_counter()
    used = reused_steps(pipeline, args)
    for line in (*card.step_cache(used), *card.cuda_graphs(cudagraph.usage(pipeline))):
        print(line)
    for path in save_images(images, args, used):
        note = " (random weights: the picture means nothing)" if args.random_weights else ""
        print(f"wrote {path}{note}")
    print(
        f"load {load_s:.2f} s, optimize {optimized - start:.2f} s, "
        f"generate {done - optimized:.3f} s (one call; run_benchmark.py measures)"
    )


if __name__ == "__main__":
    run_script(main)

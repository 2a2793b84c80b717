"""Make images with every optimisation on: python gen_image.py --prompt "..." """

import time

from utils.benchmark_utils import create_parser, set_rand_seeds
from utils.errors import run_script
from utils.quiet import quiet_libraries


def main() -> None:
    """Parse, check, load, optimise, generate, save."""
    args = create_parser("Make images with every optimisation on.").parse_args()

    quiet_libraries()
    from utils.prepare import prepare

    prepare(args)
    from utils import card
    from utils.images import save_images
    from utils.pipeline_utils import generate, load_pipeline, optimize
    from utils.prompts import report_cut_prompts

    print(card.render(args), flush=True)
    set_rand_seeds(args.seed)
    start = time.perf_counter()
    pipeline = load_pipeline(args)
    loaded = time.perf_counter()
    report_cut_prompts(pipeline, args)
    optimize(pipeline, args)
    optimized = time.perf_counter()
    images = generate(pipeline, args)
    done = time.perf_counter()
    for path in save_images(images, args):
        note = " (random weights: the picture means nothing)" if args.random_weights else ""
        print(f"wrote {path}{note}")
    print(
        f"load {loaded - start:.2f} s, optimize {optimized - loaded:.2f} s, "
        f"generate {done - optimized:.3f} s (one call; run_benchmark.py measures)"
    )


if __name__ == "__main__":
    run_script(main)

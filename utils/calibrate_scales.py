"""Find a checkpoint's static activation scales, and write them to a file.

    python -m utils.calibrate_scales --ckpt tiny-dev --scales_file scales.json
    python gen_image.py --ckpt tiny-dev --fused_kernels --triton_float8 --static_scales scales.json

One eager run of a few prompts in one batch, without float8: of each Linear behind a GELU the
largest magnitude of its input is kept (utils/steps/static_scales.py).
"""

import math
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

from utils import mask_file, scales_file
from utils.benchmark_utils import create_parser, refuse_given
from utils.calibrate import on_prompts, ready
from utils.errors import UserError, run_script
from utils.quiet import quiet_libraries

PLAIN = ("--disable_quant", "--compile_export_mode", "disabled")


def settle(argv: list[str], parser):
    """Settle a plain run of the calibration's prompts.

    Raises: UserError, one line a problem.
    """
    from utils.prepare import settle_call

    first = parser.parse_args(argv)
    given = ("output_file", "static_scales", "triton_float8", "fused_kernels", "swap_loras")
    refuse_given(first, given, "the calibration keeps no picture and runs without float8")
    if not mask_file.is_file(first.scales_file):
        raise UserError(
            f"--scales_file {first.scales_file}: expected a name ending in {mask_file.SUFFIX}"
        )
    settle_call(first)
    return on_prompts(parser.parse_args([*argv, *PLAIN]), first)


def parser():
    """Add what only the calibration needs to the common parser."""
    found = create_parser(__doc__.split("\n\n")[0])
    add = found.add_argument_group("the calibration").add_argument
    add("--scales_file", metavar="JSON", default="scales.json", help="where the scales are written")
    found.set_defaults(output_file=None)
    return found


@contextmanager
def largest_inputs(transformer, names: list[str]):
    """Keep the largest magnitude of each named Linear's inputs, while the context is open.

    Yields: a dictionary of name -> float, filled in when the context is left.
    """
    found, seen = {}, {}

    def look(name):
        def hook(module, inputs):
            most = inputs[0].abs().amax().float()  # stays on the device: no synchronisation
            seen[name] = most.maximum(seen[name]) if name in seen else most

        return hook

    hooks = [transformer.get_submodule(n).register_forward_pre_hook(look(n)) for n in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        found.update({name: float(most) for name, most in seen.items()})


def main() -> None:
    """Calibrate, and write the file."""
    argv = sys.argv[1:]
    quiet_libraries()
    from utils import card
    from utils.pipeline_utils import generate
    from utils.report import write
    from utils.steps import static_scales

    args = settle(argv, parser())
    pipeline = ready(args)
    with largest_inputs(
        pipeline.transformer, static_scales.select(pipeline.transformer)
    ) as largest:
        generate(pipeline, args, output_type="latent")
    for name, value in largest.items():
        if not 0 < value < math.inf:
            raise UserError(
                f"--ckpt {args.ckpt}: the input of {name} reaches {value}; no scale fits"
            )
    found = scales_file.ScalesFile(
        largest=largest,
        checkpoint=args.ckpt,
        identity=args.checkpoint.identity(args.cache_dir),
        weights=scales_file.brought_weights(args),
        command=shlex.join(["python", "-m", "utils.calibrate_scales", *argv]),
        prompts=args.prompt,
        environment=card.environment(args),
    )
    write(Path(args.scales_file), scales_file.dump(found))
    most = max(largest, key=largest.get)
    print(f"scales      of {len(largest)} Linears; the largest input: {largest[most]:g} ({most})")
    print(f"wrote {args.scales_file}; use it: --static_scales {args.scales_file}")


if __name__ == "__main__":
    run_script(main)

"""torch.compile of the transformer and the VAE decoder, warmed up with the run's own call.

Scope `full` compiles the transformer as one graph: the fastest code, minutes at full size. Scope
`blocks` compiles one double and one single block and uses them for all: several times quicker to
compile, and the glue between the blocks stays eager (inside the CUDA graph on a GPU, where its
launches cost nothing). Fullgraph always: a graph break is an error, not a slow run.

The mode is max-autotune without Inductor's own CUDA graphs: utils/cudagraph.py records the whole
forward instead, the same way for compile and for AOTI.

What the compiler has made is kept in --cache-dir under the fingerprint of the run, as packages are,
so that the next start of the same run takes it from there: torch's "mega cache", verified by its
digest before it is unpickled. On a CPU it holds no machine code, so the C++ compiler runs again
where its own cache is gone.
"""

import os
import shutil
from pathlib import Path

from utils import artifacts
from utils.errors import UserError
from utils.progress import say, stages
from utils.prompts import count_images
from utils.steps import (
    Verdict,
    components,
    deferred_scales,
    fusion_limits,
    inductor_tuning_flags,
    off,
    on,
    persistent_tma,
    refused,
)

NAME = "compile"
AFTER = ("inductor_tuning_flags",)
PARTS = ("pipeline",)
STORED = ".compiled"  # ending of the file with what the compiler has made
# Batch of one or more, static or dynamic size and text length, contiguous or sliced inputs: a block
# meets more kinds of call than Dynamo's limit of 8, beyond which fullgraph is an error
KINDS_OF_CALL = 64


def add_flags(parser) -> None:
    """Add the mode, which compile and export_aoti share, and the scope."""
    parser.add_argument(
        "--compile_export_mode",
        choices=("compile", "export_aoti", "disabled"),
        help="default: export_aoti on CUDA, compile on ROCm and with a step cache, disabled on a "
        "CPU",
    )
    parser.add_argument(
        "--compile_scope",
        choices=("full", "blocks"),
        help="whole transformer, or its repeated blocks only: at full size several times quicker "
        "(default: full; blocks with a step cache)",
    )


def default_mode(machine, step_cache: bool) -> tuple[str, str]:
    """Give the mode of a run that names none, and the reason."""
    if step_cache:
        return "compile", "the default with a step cache, which cannot be exported"
    if machine.device == "cpu":
        return "disabled", "the default on a CPU"
    if machine.hip:
        return "compile", "the default on ROCm"
    return "export_aoti", "the default on CUDA"


def check(args) -> Verdict:
    """Decide from the flags alone."""
    if args.compile_export_mode != "compile":
        return off(f"--compile_export_mode {args.compile_export_mode}")
    if args.cache_dit_config and args.compile_scope == "full":
        return refused(
            "--compile_scope full: a step cache decides between the blocks and breaks the whole "
            "graph; use --compile_scope blocks"
        )
    cache = artifacts.cache_problem(args.cache_dir)
    if problem := missing_compiler() or cache or artifacts.flag_problem(args):
        return refused(problem)
    about = _about(args)
    if args.drop_text_padding:  # the prompt's own length is known with the tokenizer
        del about["text_tokens"]
    if args.use_cached_model and (
        lines := artifacts.stored_problems(args, compiler_options(args), [about])
    ):
        return refused(artifacts.no_cached_model(lines))
    shapes = {"dynamic": True} if dynamic(args.machine) else {}
    return on(scope=args.compile_scope, fullgraph=True, **shapes, **compiler_mode(args))


def dynamic(machine) -> bool | None:
    """Compile for any size at once on ROCm, where graphs of one size gave black pictures.

    Elsewhere None: the first size is static, a second makes the code dynamic.
    """
    return True if machine.hip else None


def missing_compiler() -> str:
    """Look for the C++ compiler that Inductor calls, on a GPU too; "" if there is one."""
    name = os.environ.get("CXX", "g++")
    if shutil.which(name):
        return ""
    return (
        f"--compile_export_mode: no C++ compiler found (looked for {name}); apt install g++ "
        "python3-dev, or --compile_export_mode disabled"
    )


def compiler_mode(args) -> dict[str, bool]:
    """Give Inductor's options for max-autotune without its CUDA graphs.

    On a CPU the search tries C++ templates against oneDNN for every product: minutes for pictures
    of 128 pixels, so there only the code generator's defaults are used.
    """
    if args.machine.device == "cpu":
        return {}
    return {"max_autotune": True, "coordinate_descent_tuning": True}


def compiler_options(args) -> dict[str, bool | int]:
    """Give all of Inductor's options of this run, for compile and export_aoti alike."""
    return {
        **compiler_mode(args),
        **inductor_tuning_flags.options(args),
        **deferred_scales.options(args),
        **fusion_limits.options(args),  # the wider ones
        **persistent_tma.options(args),
    }


def _about(args) -> dict:
    """Say what this step's part of the store is, beside what every package of the run shares."""
    call = {
        "size": f"{args.width}x{args.height}",
        "images": count_images(args),
        "guidance": args.guidance_scale is not None,
    }
    shared = {"component": NAME, "scope": args.compile_scope, "call": call}
    return shared | {"text_tokens": args.text_tokens}


def _load(root: Path, pipeline, args) -> tuple[dict, bool]:
    """Give torch what an earlier start of this run has compiled.

    Returns: the identity of what is stored, and whether it still has to be stored.
    Raises: UserError if --use-cached-model finds none of this run; lines name the fields.
    """
    import torch

    identity = artifacts.identity_of_run(args, compiler_options(args)) | _about(args)
    identity["parts"] = [*components(pipeline), *(["text"] if args.compile_text_encoders else [])]
    made, lines = artifacts.read(root, identity, STORED)
    if not made and args.use_cached_model:
        raise UserError(artifacts.no_cached_model(lines))
    if not made or args.force_export:
        if not made and (why := artifacts.damage(root, identity, lines)):
            say(NAME, why)
        return identity, True
    torch.compiler.load_cache_artifacts(made[STORED])
    size = len(made[STORED]) / 2**20
    say(NAME, f"loaded {artifacts.name_of(identity)}, {size:.1f} MiB, from {root}")
    return identity, False


def _store(root: Path, identity: dict) -> None:
    """Keep what the compiler has made in this process; without room for it the run goes on."""
    import torch

    made = torch.compiler.save_cache_artifacts()
    if made is None:
        say(NAME, "nothing to store: the compiler kept nothing in its caches")
        return
    try:
        with artifacts.building(root, identity):
            package = artifacts.save(root, identity, {STORED: made[0]}, {})
    except UserError as error:
        say(NAME, f"not stored: {error}")
        return
    say(NAME, f"stored {package.name}, {package.size / 2**20:.1f} MiB, in {root}")


def apply(pipeline, args) -> None:
    """Compile the components and make the run's own call once: timed runs compile nothing."""
    import torch

    from utils.pipeline_utils import generate

    root = artifacts.open_cache(args.cache_dir)
    identity, is_new = _load(root, pipeline, args)
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, KINDS_OF_CALL)
    how = {"fullgraph": True, "dynamic": dynamic(args.machine), "options": compiler_options(args)}
    for module in components(pipeline).values():
        if args.compile_scope == "blocks" and getattr(module, "_repeated_blocks", None):
            module.compile_repeated_blocks(**how)
        else:
            module.forward = torch.compile(module.forward, **how)
    if args.machine.device == "cuda":
        from utils.cudagraph import wrap_components

        # a step cache decides in every step on the host, which no graph can record; in loop_graph
        # there is a graph of all steps, and none inside of it
        alone = not (args.cache_dit_config or args.loop_graph)
        wrap_components(pipeline, with_transformer=alone)
    say(NAME, f"the first call compiles (scope {args.compile_scope}); minutes at full size")
    with stages(NAME, 1) as stage:
        stage("compile and warm up")
        generate(pipeline, args)
    if is_new:
        _store(root, identity)

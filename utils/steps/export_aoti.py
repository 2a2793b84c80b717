"""torch.export + AOTInductor: pay minutes of compilation once, start in seconds afterwards.

Last, instead of `compile`: the package freezes everything above. Transformer and VAE decoder each
become one package of code without weights, made for exactly the call of this run (batch, size,
text length, guidance or none), which is recorded rather than assumed; a later call of another kind
gets a package of its own. Static shapes cost a build for each, and nothing at run time. On CUDA the
forward is then put into a graph (utils/cudagraph.py). A package is used only if its whole manifest
belongs to this run (utils/artifacts.py); everything that AOTI itself does not check, utils/aoti.py
does.
"""

import time
from pathlib import Path

from utils.progress import say, stages
from utils.steps import Verdict, compile, inductor_tuning_flags, off, on, refused, step_mask

NAME = "export_aoti"
AFTER = ("inductor_tuning_flags",)

CACHE_DIR = "~/.cache/flux-bench"
COMPONENTS = ("transformer", "decoder")


def add_flags(parser) -> None:
    """Add where packages are kept and whether one may be built."""
    parser.add_argument(
        "--cache-dir", default=CACHE_DIR, help="exported packages; only its owner may write to it"
    )
    parser.add_argument(
        "--use-cached-model",
        action="store_true",
        help="load packages from --cache-dir, never build one: stop if none belongs to this run",
    )


def check(args) -> Verdict:
    """Decide from the flags and the cache directory."""
    from utils.artifacts import cache_problem, nearest

    mode = args.compile_export_mode
    if mode != "export_aoti":
        if args.use_cached_model:
            return refused(
                f"--use-cached-model: found --compile_export_mode {mode}, expected export_aoti "
                "(only exported packages are kept)"
            )
        return off(f"--compile_export_mode {mode}")
    if args.compile_scope == "blocks":
        return refused(
            "--compile_scope blocks: export_aoti builds packages of whole components only; use "
            "--compile_scope full or --compile_export_mode compile"
        )
    compiler = "" if args.use_cached_model else compile.missing_compiler()  # only to build
    if problem := compiler or cache_problem(args.cache_dir):
        return refused(problem)
    if args.use_cached_model:
        # What needs no weights is compared now; the rest in apply()
        root, known = Path(args.cache_dir).expanduser(), _known_early(args)
        lines = [nearest(root, known | {"component": component}) for component in COMPONENTS]
        if missing := [line for part in lines for line in part]:
            return refused(_no_cached_model(missing))
    return on(**compile.compiler_mode(args))


def _no_cached_model(lines: list[str]) -> str:
    return (
        "\n".join(f"--use-cached-model: {line}" for line in lines)
        + "\nrun once without --use-cached-model to build the packages of this run"
    )


def apply(pipeline, args) -> None:
    """Replace both forwards by packages and make the run's own call once.

    A later call of another size, batch or text length gets packages of its own when it comes.

    Raises: UserError if --use-cached-model finds no package of this run; lines name the fields.
    """
    from utils import aoti
    from utils.artifacts import open_cache
    from utils.cudagraph import CUDAGraphWrapper, CUDARecorder
    from utils.errors import UserError
    from utils.pipeline_utils import generate

    root = open_cache(args.cache_dir)
    modules = (pipeline.transformer, pipeline.vae.decoder)
    components = [aoti.Component(*pair) for pair in zip(COMPONENTS, modules, strict=True)]
    recorder = CUDARecorder()  # one, so that both components' graphs share its memory pool
    with stages(NAME, 2 + len(components)) as stage:
        stage("record inputs")
        aoti.record_inputs(components, lambda: generate(pipeline, args, num_inference_steps=1))
        shared = _shared_identity(args)
        if args.use_cached_model:
            lines = [line for component in components for line in _find(root, component, shared)[2]]
            if lines:
                raise UserError(_no_cached_model(lines))

        def provide(component):
            identity, package, lines = _find(root, component, shared)
            if package is None and args.use_cached_model:
                raise UserError(_no_cached_model(lines))
            package = package or _build(root, component, shared, identity, args)
            run = aoti.attach(component, package.files, package.constants)
            if args.machine.device == "cuda":
                run = CUDAGraphWrapper(run, component.name, recorder)
            return run

        for component in components:
            stage(component.name)
            forward = aoti.PackageForward(component, provide)
            forward.add(component.inputs)
            component.module.forward = forward
        stage("warm up")
        generate(pipeline, args)


def _known_early(args) -> dict:
    """Say what is known of a package before any weight is loaded."""
    import dataclasses

    from utils import aoti, artifacts

    machine = dataclasses.asdict(args.machine)
    return {
        "dtype": str(args.dtype),
        "machine": {key: machine[key] for key in ("device", "name", "capability", "hip")},
        "compiler": _options(args) | aoti.PACKAGE_OPTIONS,
        "versions": artifacts.environment(),
    }


def _shared_identity(args) -> dict:
    """Say what every package of this run depends on; a local checkpoint is read once for it."""
    from utils import aoti, artifacts, calls

    here = Path(__file__).parent
    steps = {name: verdict for name, verdict in args.plan.items() if verdict.is_on}
    steps.pop(step_mask.NAME, None)  # calls the package or not, and is not in it
    sources = [here / f"{name}.py" for name in steps]
    sources += [*(here.parent / "kernels").glob("*.py"), Path(aoti.__file__), Path(calls.__file__)]
    return _known_early(args) | {
        "checkpoint": {"name": args.checkpoint.name, "weights": args.checkpoint.identity()},
        "steps": {name: verdict.settings for name, verdict in steps.items()},
        "code": artifacts.code_digest([file for file in sources if file.exists()]),
    }


def _options(args) -> dict:
    return {**compile.compiler_mode(args), **inductor_tuning_flags.options(args)}


def _find(root: Path, component, shared: dict) -> tuple:
    """Look for a component's package: its identity, the package or None, and the reasons."""
    from utils import aoti, artifacts

    weights = component.weights()
    identity = shared | {
        "component": component.name,
        "inputs": aoti.describe(component.inputs),
        "folded_weights": aoti.folded_values(weights),
    }
    package, lines = artifacts.find(root, identity)
    if package is not None:
        problems = aoti.constant_problems(package.constants, weights)
        lines = [f"{package.name}: {line}" for line in problems]
    return identity, None if lines else package, lines


def _build(root: Path, component, shared: dict, identity: dict, args):
    """Export, compile and store one component, unless another process has just done so."""
    from utils import aoti, artifacts

    start = time.perf_counter()
    with artifacts.building(root, identity):
        if (package := _find(root, component, shared)[1]) is not None:
            return package
        say(NAME, f"{component.name}: no package of this call yet; minutes at full size, once")
        program = aoti.export(component)
        files, constants = aoti.compile_package(program, component, _options(args))
        package = artifacts.save(root, identity, files, constants)
    say(
        NAME,
        f"built {package.name} in {time.perf_counter() - start:.0f} s, "
        f"{package.size / 2**20:.1f} MiB, in {root}",
    )
    return package

"""torch.export + AOTInductor: pay minutes of compilation once, start in seconds afterwards.

Last, instead of `compile`: the package freezes everything above. Transformer and VAE decoder each
become one package of code without weights (with --compile_text_encoders the blocks of T5 and CLIP
three, with --compile_image_encoder the VAE's encoder one); with --compile_scope blocks one double
and one single block do instead of the transformer, and serve all others with their own weights:
quicker to build, with the glue between the blocks eager (inside the CUDA graph on a GPU). A package
is made for exactly the call of this run (batch, size, text length, guidance or none), which is
recorded rather than assumed; a later call of another kind gets a package of its own. Static shapes
cost a build for each, and nothing at run time. On CUDA the forward is then put into a graph
(utils/cudagraph.py). A package is used only if its whole manifest belongs to this run
(utils/artifacts/); everything that AOTI itself does not check, utils/aoti.py does.
"""

import time
from pathlib import Path

from utils import artifacts
from utils.errors import UserError
from utils.progress import say, stages
from utils.steps import (
    Verdict,
    compile,
    components,
    gguf,
    image_encoder,
    off,
    on,
    quant,
    refused,
    text_encoders,
)

NAME = "export_aoti"
AFTER = ("inductor_tuning_flags",)
PARTS = ("pipeline",)

CACHE_DIR = "~/.cache/flux-bench"
COMPONENTS = {  # --compile_scope -> what becomes one package each
    "full": ("transformer", "decoder"),
    "blocks": ("double_block", "single_block", "decoder"),
}
GRAPHED = (*COMPONENTS["full"], image_encoder.NAME)  # each in a CUDA graph of its own
ALONE = (*GRAPHED, "t5_first_block")  # packages that serve one module only
ENCODERS = ("clip_block", "t5_first_block", "t5_block")  # with --compile_text_encoders


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
    parser.add_argument(
        "--force_export",
        action="store_true",
        help="build packages anew, even where one of this run is stored",
    )
    parser.add_argument(
        "--artifact_repo",
        metavar="ORG/NAME",
        help="fetch the packages named by --artifact_digest from this repository of a model hub",
    )
    parser.add_argument(
        "--artifact_digest",
        action="append",
        metavar="NAME@sha256:HEX",
        help="a package to fetch, by the digest of its manifest (repeat for each)",
    )


def check(args) -> Verdict:
    """Decide from the flags and the cache directory."""
    mode = args.compile_export_mode
    if mode != "compile" and (problem := artifacts.flag_problem(args)):
        return refused(problem)
    if args.force_export and args.use_cached_model:
        return refused("--force_export, --use-cached-model: expected one of them")
    if mode != "export_aoti":
        for flag in ("--use-cached-model", "--force_export"):
            if mode == "disabled" and getattr(args, flag[2:].replace("-", "_")):
                return refused(
                    f"{flag}: found --compile_export_mode disabled, expected export_aoti or "
                    "compile (nothing else is kept)"
                )
        return off(f"--compile_export_mode {mode}")
    if gguf.is_compressed(args):
        return refused(
            "--compile_export_mode export_aoti: torch.export drops the types of a GGUF's bytes; "
            "use --gguf_mode dequantize or --compile_export_mode compile"
        )
    if (kind := quant.precision(quant.check(args))) in quant.BLOCK_FORMATS:
        return refused(
            f"--compile_export_mode export_aoti: found --quant_dtype {kind}, whose number types "
            "torch 2.11's packages do not know; use --compile_export_mode compile"
        )
    by_tensor = args.compile_scope == "blocks" and args.quant_granularity == "tensor"
    if by_tensor and quant.check(args).is_on:
        return refused(
            "--compile_scope blocks: scales per tensor become part of the code, so each block "
            "would need a package of its own; use --quant_granularity row or --compile_scope full"
        )
    compiler = "" if args.use_cached_model else compile.missing_compiler()  # only to build
    if problem := compiler or artifacts.cache_problem(args.cache_dir):
        return refused(problem)
    if args.use_cached_model:
        # What needs no weights is compared now; the rest in apply()
        parts = [{"component": component} for component in _names(args)]
        if lines := artifacts.stored_problems(args, _options(args), parts):
            return refused(artifacts.no_cached_model(lines))
    scope = {"scope": "blocks"} if args.compile_scope == "blocks" else {}
    return on(**scope, **compile.compiler_mode(args))


def apply(pipeline, args) -> None:
    """Replace the forwards by packages and make the run's own call once.

    A later call of another size, batch or text length gets packages of its own when it comes.

    Raises: UserError if --use-cached-model finds no package of this run; lines name the fields.
    """
    from utils import aoti
    from utils.cudagraph import CUDAGraphWrapper, pool_of
    from utils.pipeline_utils import generate

    root = artifacts.open_cache(args.cache_dir)
    groups = _groups(pipeline, _names(args))
    firsts = [group[0] for group in groups]
    on_gpu = args.machine.device == "cuda"
    pool = pool_of(pipeline) if on_gpu else None
    graphed = set(GRAPHED) - ({"transformer"} if args.loop_graph else set())
    with stages(NAME, 2 + len(groups)) as stage:
        stage("record inputs")
        aoti.record_inputs(firsts, lambda: generate(pipeline, args, num_inference_steps=1))
        packages = _Packages(root, args, artifacts.identity_of_run(args, _options(args)))
        if args.use_cached_model and (
            lines := [x for one in firsts for x in packages.find(one)[2]]
        ):
            raise UserError(artifacts.no_cached_model(lines))

        def provide(component):
            package = packages.get(component)
            if ".safetensors" in package.files and component.name not in ALONE:
                raise RuntimeError(
                    f"export_aoti: {component.name}: has tensors that are no weights, which all "
                    "blocks would share; use --compile_scope full"
                )
            try:
                run = aoti.attach(component, package.files, package.constants)
            except Exception:
                if not packages.removed(package):
                    raise
                return provide(component)
            if on_gpu and component.name in graphed:  # no graph inside of a graph
                run = CUDAGraphWrapper(run, component.name, pool)
            return run

        for group in groups:
            stage(group[0].name)
            inputs = group[0].inputs
            for component in group:
                forward = aoti.PackageForward(component, provide)
                forward.add(inputs)
                component.module.forward = forward
        transformer = pipeline.transformer
        if on_gpu and transformer and args.compile_scope == "blocks" and not args.loop_graph:
            # one graph around all blocks and their glue
            transformer.forward = CUDAGraphWrapper(transformer.forward, "transformer", pool)
        if on_gpu and args.compile_text_encoders:
            text_encoders.wrap(pipeline, pool)
        stage("warm up")
        generate(pipeline, args)


def _names(args) -> tuple[str, ...]:
    """Name the packages of a run."""
    image = (image_encoder.NAME,) if args.compile_image_encoder else ()
    text = ENCODERS if args.compile_text_encoders else ()
    return COMPONENTS[args.compile_scope] + image + text


def _groups(pipeline, wanted: tuple[str, ...]) -> list[list]:
    """List the components that share one package each; the first of a group stands for all.

    Raises: RuntimeError if blocks of one kind are not built alike.
    """
    from utils import aoti

    parts = {name: [module] for name, module in components(pipeline).items()}
    if (transformer := pipeline.transformer) is not None:
        parts["double_block"] = transformer.transformer_blocks
        parts["single_block"] = transformer.single_transformer_blocks
    if set(ENCODERS) & set(wanted):
        parts |= text_encoders.groups(pipeline)
    names = [name for name in wanted if name in parts]
    groups = [[aoti.Component(name, module) for module in parts[name]] for name in names]
    for first, *others in groups:
        for other in others:
            if _kinds(other.module) != _kinds(first.module):
                raise RuntimeError(f"export_aoti: not all modules of {first.name} are built alike")
    return groups


def _kinds(module) -> list[tuple]:
    """List the classes of all that a module is made of; its weights are compared by attach()."""
    return [(name, type(part)) for name, part in module.named_modules()]


def _options(args) -> dict:
    from utils.aoti import PACKAGE_OPTIONS

    return compile.compiler_options(args) | PACKAGE_OPTIONS


class _Packages:
    """The packages of one run: looked for, built where there is none, and each read once."""

    def __init__(self, root: Path, args, shared: dict) -> None:
        self.root, self.args, self.shared = root, args, shared
        self.known: dict = {}  # name -> Package that this process has verified or built

    def find(self, component) -> tuple:
        """Look for a component's package: its identity, the package or None, and the reasons."""
        from utils import aoti

        weights = component.weights()
        identity = self.shared | {
            "component": component.name,
            "inputs": aoti.describe(component.inputs),
            "folded_weights": aoti.folded_values(weights),
        }
        package, lines = self.known.get(artifacts.name_of(identity)), []
        if package is None:
            package, lines = artifacts.find(self.root, identity)
        if package is not None:
            problems = aoti.constant_problems(package.constants, weights)
            lines = [f"{package.name}: {line}" for line in problems]
        return identity, None if lines else package, lines

    def get(self, component):
        """Give a component's package, built now if it has to be.

        Raises: UserError if it may not be built.
        """
        identity, package, lines = self.find(component)
        if package is None and self.args.use_cached_model:
            raise UserError(artifacts.no_cached_model(lines))
        if package is None or (self.args.force_export and package.name not in self.known):
            package = self._build(component, identity)
        self.known[package.name] = package
        return package

    def removed(self, package) -> bool:
        """Forget a package whose files another process has removed since they were verified."""
        gone = not all(path.exists() for path in package.files.values())
        if gone:
            self.known.pop(package.name)
        return gone

    def _build(self, component, identity: dict):
        """Export, compile and store a component, unless another process has just done so."""
        from utils import aoti

        start, forced = time.perf_counter(), self.args.force_export
        with artifacts.building(self.root, identity) as scratch:
            _, package, lines = self.find(component)
            if package is not None and not forced:
                return package
            why = "--force_export"
            if not forced:
                why = artifacts.damage(self.root, identity, lines) or "no package of this call yet"
            say(NAME, f"{component.name}: {why}; minutes at full size, once")
            program = aoti.export(component)
            files, constants = aoti.compile_package(
                program, component, _options(self.args), scratch
            )
            package = artifacts.save(self.root, identity, files, constants)
        say(
            NAME,
            f"built {package.name} in {time.perf_counter() - start:.0f} s, "
            f"{package.size / 2**20:.1f} MiB, in {self.root}",
        )
        return package

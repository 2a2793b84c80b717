"""Export one component, compile it ahead of time, and run the package with the live weights.

AOTInductor checks nothing: a wrong shape gives garbage, a wrong dtype corrupts the heap, a package
without its weights crashes. So everything is described here and compared before the code is
touched: the inputs of every call, and each weight before its pointer is handed over. Weights stay
outside of the package and are aliased, not copied.

Two ways for weights into the code are closed: vectors of 8 elements or fewer, which Inductor
inlines by default (the decoder's conv_out.bias), are kept as constants. One-element tensors
(float8 scales per tensor) are folded whatever the options, so their values are part of a package's
identity.
"""

import copy
import hashlib
import inspect
import io
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from utils.calls import call_differences, dense, describe, key_of, layout, refuse_if_only_known

PACKAGE_OPTIONS = {
    "aot_inductor.package_constants_in_so": False,
    "always_keep_tensor_constants": True,
}
MAX_PROBLEMS = 5  # lines; a foreign set of weights differs in hundreds


class Component:
    """One module whose forward is to be replaced: its signature, its weights, and one call.

    `inputs` maps every parameter of forward, in order, to what that call gave (or the default);
    return_dict is always False inside of a package.
    """

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        if "forward" in vars(module):
            raise RuntimeError(f"export_aoti: {name}.forward has been replaced already")
        self.name, self.module = name, module
        self.signature = inspect.signature(module.forward)
        self.inputs: dict | None = None

    def bind(self, args: tuple, kwargs: dict) -> tuple[dict, bool]:
        """Give every parameter its value; return_dict is told apart."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        inputs = dict(bound.arguments)
        for name, parameter in self.signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                inputs |= inputs.pop(name)  # passed on by name, as they came
        return_dict = bool(inputs.get("return_dict", False))
        if "return_dict" in inputs:
            inputs["return_dict"] = False
        # FluxPipeline says {} for "no kwargs": the same program as None
        empty = {k: None for k, v in inputs.items() if isinstance(v, (dict, list, tuple)) and not v}
        return inputs | empty, return_dict

    def weights(self) -> dict[str, torch.Tensor]:
        """Name every live tensor as the exported program does. Nothing is copied."""
        shell = self.shell()
        named = dict(shell.named_parameters(remove_duplicate=False))
        named.update(shell.named_buffers(remove_duplicate=False))
        return {name: tensor.detach() for name, tensor in named.items()}

    def shell(self) -> torch.nn.Module:
        """Copy the module's structure around the same tensors, subclasses (float8) unwrapped.

        Export needs plain tensors, and unwrapping changes modules in place: not the live ones.
        """
        shared = {id(t): t for t in (*self.module.parameters(), *self.module.buffers())}
        replaced = {id(vars(self.module).get("forward")): None}  # packages are never copied
        shell = copy.deepcopy(self.module, shared | replaced)
        vars(shell).pop("forward", None)
        if all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in shared.values()):
            return shell
        from torchao.utils import unwrap_tensor_subclass

        return unwrap_tensor_subclass(shell)


def record_inputs(components: list[Component], run: Callable[[], object]) -> None:
    """Run once and note what each component is really called with.

    Raises: RuntimeError if one is not called, or in two ways.
    """

    def hook_of(component):
        def hook(module, args, kwargs):
            inputs, _ = component.bind(args, kwargs)
            inputs = pytree.tree_map_only(torch.Tensor, dense, inputs)
            if component.inputs is None:
                component.inputs = inputs
            elif lines := call_differences(describe(component.inputs), describe(inputs)):
                raise RuntimeError(f"export_aoti: {component.name} called in two ways: {lines[0]}")

        return hook

    handles = [
        component.module.register_forward_pre_hook(hook_of(component), with_kwargs=True)
        for component in components
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    for component in components:
        if component.inputs is None:
            raise RuntimeError(f"export_aoti: the pipeline's call never reached {component.name}")


def folded_values(weights: dict[str, torch.Tensor]) -> str | None:
    """Digest the values of the one-element tensors, which Inductor folds into the code."""
    single = {name: t for name, t in sorted(weights.items()) if t.numel() == 1}
    if not single:
        return None
    digest = hashlib.sha256("\0".join(single).encode())
    values = torch.stack([t.reshape(()).double() for t in single.values()])  # one copy to the host
    digest.update(values.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _spec(tensor: torch.Tensor) -> list:
    return [list(tensor.shape), str(tensor.dtype), layout(tensor)]


def constant_problems(expected: dict[str, list], live: dict[str, torch.Tensor]) -> list[str]:
    """Compare the weights that the code expects with those there are: one line each."""
    lines = []
    for name, spec in expected.items():
        found = _spec(live[name]) if name in live else None
        if found != list(spec):
            lines.append(f"weight {name}: found {found or 'nothing'}, expected {spec}")
    if len(lines) > MAX_PROBLEMS:
        lines[MAX_PROBLEMS:] = [f"... and {len(lines) - MAX_PROBLEMS} more weights"]
    return lines


def export(component: Component):
    """Trace the component with the recorded call, weights shared.

    Returns: torch.export.ExportedProgram
    """
    with torch.no_grad():
        # Not strict: the same program without Dynamo's pass over every line of diffusers
        return torch.export.export(component.shell(), (), component.inputs, strict=False)


def name_toolkit() -> None:
    """Tell Inductor which CUDA toolkit torch has found: a package for a GPU links against libcuda.

    Many drivers bring no libcuda.so for the linker. The toolkit has a stub of it, which torch (2.11
    to 2.13) puts into the link only where CUDA_HOME is set.
    """
    from torch.utils import cpp_extension

    if cpp_extension.CUDA_HOME:
        os.environ.setdefault("CUDA_HOME", cpp_extension.CUDA_HOME)


def compile_package(
    program, component: Component, options: dict, scratch: Path | None = None
) -> tuple[dict, dict]:
    """Compile an exported program into files of a package, and say which weights it expects.

    Like torch._inductor.aoti_compile_and_package, but for the names of lifted tensors. The package
    is written to `scratch` first, or to the system's temporary folder.

    Returns: ({".pt2": bytes, ".safetensors": bytes of tensors that are no weights}, constants)
    """
    from safetensors.torch import save
    from torch._inductor import aot_compile
    from torch._inductor.package import package_aoti

    name_toolkit()
    with torch.no_grad(), tempfile.TemporaryDirectory(dir=scratch) as folder:
        path = Path(folder) / "package.pt2"
        graph = program.module(check_guards=False)
        # Lifted tensors would come out as _tensor_constant0, 1, ...: as buffers they keep names
        for name, tensor in program.constants.items():
            owner, _, leaf = name.rpartition(".")
            delattr(graph.get_submodule(owner), leaf)
            graph.get_submodule(owner).register_buffer(leaf, tensor)
        options = {**options, **PACKAGE_OPTIONS, "aot_inductor.package": True}
        archive = io.BytesIO()  # torch's own file writer does not say that a disk is full
        package_aoti(archive, aot_compile(graph, *program.example_inputs, options=options))
        code = archive.getvalue()
        path.write_bytes(code)
        names = load_package(path).get_constant_fqns()
    weights = component.weights()
    lifted = {n: t for n, t in program.constants.items() if n in names and n not in weights}
    if missing := [n for n in names if n not in weights and n not in lifted]:
        raise RuntimeError(f"export_aoti: {component.name}: unknown constants {missing}")
    files = {".pt2": code}
    if lifted:
        files[".safetensors"] = save({n: t.contiguous() for n, t in lifted.items()})
    return files, {n: _spec(weights[n]) for n in names if n in weights}


def load_package(path: str | Path):
    """Open a package; its custom ops must be registered before.

    Returns: AOTICompiledModel, which must not be called before it has its constants
    """
    import utils.kernels.flash_attention  # noqa: F401  registers flash::flash_attn_func

    # Single-threaded: without it the runner waits for events, which a CUDA graph cannot record
    return torch._inductor.aoti_load_package(str(path), run_single_threaded=True)


def attach(component: Component, files: dict[str, Path], expected: dict[str, list]):
    """Load a package and point it at the live weights, all of them checked before.

    Returns: a callable of the component's inputs by name, giving the package's outputs
    Raises: RuntimeError naming the weights that differ.
    """
    weights = component.weights()
    problems = constant_problems(expected, weights)
    constants = {name: weights[name] for name in expected if name in weights}
    device = next(iter(weights.values())).device
    if ".safetensors" in files:
        from safetensors.torch import load

        lifted = load(files[".safetensors"].read_bytes())
        constants |= {name: tensor.to(device) for name, tensor in lifted.items()}
    package = load_package(files[".pt2"])
    names = package.get_constant_fqns()
    problems += [f"constant {n}: found nothing" for n in names if n not in constants]
    if problems:
        raise RuntimeError(f"export_aoti: {component.name}: " + "; ".join(problems))
    given = {name: constants[name] for name in names}
    package.load_constants(given, check_full_update=True, user_managed=True)

    package.held = given  # user-managed: the code has bare pointers, someone must hold the tensors
    return package


class Runner:
    """One package, and the call that it was made for."""

    def __init__(self, inputs: dict, run: Callable) -> None:
        self.run = run
        leaves, self.spec = pytree.tree_flatten(inputs)
        self.key = key_of(leaves, self.spec)
        self.templates = [
            leaf.to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]

    def __call__(self, leaves: list):
        """Run the package on the leaves of its call, in the strides that it was compiled for."""
        leaves = [
            leaf
            if not isinstance(leaf, torch.Tensor) or layout(leaf) == layout(template)
            else torch.empty_like(template, device=leaf.device).copy_(leaf)
            for leaf, template in zip(leaves, self.templates, strict=True)
        ]
        return self.run(**pytree.tree_unflatten(leaves, self.spec))


class PackageForward:
    """Stands in for a component's forward: one package for each kind of call.

    Every call is compared with the packages before one of them runs. For a call of a new kind
    (another size, batch or text length) `provide(component)` is asked once, with the call in
    `component.inputs`, for something to run.
    """

    def __init__(self, component: Component, provide: Callable[[Component], Callable]) -> None:
        self.component, self.provide = component, provide
        self.runners: dict[tuple, Runner] = {}

    def __call__(self, *args, **kwargs):
        """Give what the original forward gives."""
        inputs, return_dict = self.component.bind(args, kwargs)
        leaves, spec = pytree.tree_flatten(inputs)
        runner = self.runners.get(key_of(leaves, spec)) or self.add(inputs)
        output = runner(leaves)
        if return_dict:
            from diffusers.models.modeling_outputs import Transformer2DModelOutput

            return Transformer2DModelOutput(sample=output[0])
        return output

    def add(self, inputs: dict) -> Runner:
        """Get a package for a call of a new kind.

        Raises: RuntimeError in a timed run; whatever `provide` raises.
        """
        refuse_if_only_known(f"export_aoti: {self.component.name}: a call of a new kind")
        self.component.inputs = pytree.tree_map_only(torch.Tensor, dense, inputs)
        try:
            runner = Runner(self.component.inputs, self.provide(self.component))
        finally:
            self.component.inputs = None  # recorded tensors are no longer needed
        self.runners[runner.key] = runner
        return runner

"""What the tests share: the bundled checkpoint, runs described by flags, the eager reference."""

import os
import signal

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # of a job in the background; inherited
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a hub
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from tests import emulation
from utils.benchmark_utils import create_parser
from utils.prepare import prepare
from utils.quiet import quiet_libraries

quiet_libraries()

TOGGLES = (
    "--disable_fused_projections",
    "--disable_fa3",
    "--disable_channels_last",
    "--disable_quant",
    "--disable_inductor_tuning_flags",
)

MODES = (  # of --compile_export_mode, with their scopes
    ("disabled",),
    ("compile", "--compile_scope", "blocks"),
    ("compile", "--compile_scope", "full"),
    ("export_aoti",),
)


def make_args(*flags: str, checks: bool = True):
    """Parse flags as the scripts do and settle the run."""
    args = create_parser().parse_args(list(flags))
    if checks:
        prepare(args)
    return args


def optimized(*flags: str):
    """Load the bundled checkpoint and apply every step that the flags leave on."""
    from utils.pipeline_utils import load_pipeline, optimize

    args = make_args("--device", "cpu", *flags)
    return optimize(load_pipeline(args), args), args


@pytest.fixture(scope="session", autouse=True)
def own_cache_directory(tmp_path_factory):
    """Keep what is stored by default out of the home of whoever runs the tests."""
    from utils.steps import export_aoti

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_aoti, "CACHE_DIR", str(tmp_path_factory.mktemp("default") / "cache"))
        yield


@pytest.fixture(scope="session", autouse=True)
def row_scales_on_cpu():
    """Let a CPU multiply float8 with row scales where torch's own product (2.11's) refuses them."""
    with emulation.products(where_refused=True):
        yield


@pytest.fixture(scope="session")
def reference():
    """Give a function: flags that decide the picture -> its Result by plain diffusers, cached."""
    from utils import quality
    from utils.pipeline_utils import load_pipeline

    known = {}

    def result(*flags: str) -> quality.Result:
        if flags not in known:
            args = make_args("--device", "cpu", *flags)
            known[flags] = quality.run(load_pipeline(args), args)
        return known[flags]

    return result


@pytest.fixture
def cpu_float8():
    """Let torchao quantise to float8 on a CPU, whose products run through torch._scaled_mm."""
    with emulation.float8():
        yield


@pytest.fixture
def float8_on_cpu(cpu_float8, monkeypatch):
    """The same, and step quant believes that this machine has such products."""
    from utils.steps import quant

    monkeypatch.setattr(quant, "lacking", lambda machine, dtype="float8": "")


@pytest.fixture
def emulated(cpu_float8):
    """Let torchao quantise to MXFP8 and NVFP4, too, multiplied in fp32."""
    with emulation.blocks():
        yield


@pytest.fixture
def untuned(monkeypatch):
    """Compile as on a CPU: on a GPU the search for the fastest code takes minutes a model."""
    from utils.steps import compile, inductor_tuning_flags

    monkeypatch.setattr(compile, "compiler_mode", lambda args: {})
    monkeypatch.setitem(inductor_tuning_flags.FLAGS, "coordinate_descent_tuning", False)


@pytest.fixture
def as_machine(monkeypatch):
    """Give a function that makes the checks believe in another machine."""
    from utils import hardware
    from utils.steps import memory

    def pretend(machine: hardware.Machine) -> None:
        free = int((machine.memory_gib or 512.0) * 2**30)
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        monkeypatch.setattr(hardware, "detect", lambda device=None: machine)

    return pretend


@pytest.fixture
def roomy(as_machine):
    """Run the checks as on a CPU with room for the published checkpoints."""
    from utils.hardware import Machine

    as_machine(Machine("cpu", "any", memory_gib=512.0))


@pytest.fixture
def apart(tmp_path):
    """Give a function that runs a script in a process of its own, with its pictures in tmp_path."""
    import doctor_pieces

    def run(*argv, **around) -> doctor_pieces.Done:
        argv = [*argv, "--output-file", tmp_path / "x.png"] if argv[0] == "gen_image.py" else argv
        return doctor_pieces.run(*argv, folder=tmp_path, **around)

    return run


@pytest.fixture
def explained(tmp_path):
    """Give a function: what a failed run wrote -> the doctor's commands, by the advice's name."""
    import doctor_pieces

    def of(done: doctor_pieces.Done) -> dict[str, list[str]]:
        assert done.output.strip()
        code, found = doctor_pieces.explain(done.output, tmp_path)
        assert code == 0, done.output
        return {one["name"]: one["commands"] for one in found}

    return of

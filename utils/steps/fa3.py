"""The fastest attention kernel that this machine has, behind one op.

After the projections are fused (it calls fused and separate ones alike), before anything that
traces. On Hopper FlashAttention-3, in float8 with one scale per batch and head unless quantisation
is off: a run that calls itself lossless is lossless. The whole table is `choose()`. With
`--fa3_rotation` Q and K are turned before that cast, which takes a third to a half off its error
(utils/kernels/rotation.py; `python -m tests.lossy_pictures`).

By name only: `int8` (comfy-kitchen, sm75 or newer), whose Q, K, V and P are 8-bit integers. Its
twin (utils/kernels/int8_attention.py) errs by 0.01 to 0.02 where float8 errs by 0.04 to 0.05,
outliers included. Of the int8 kernels it is the better kept: SageAttention's package on PyPI
stopped at 1.0.6 in 2024, keeps V in fp16 and writes into the keys that it is given. Also by name
only: `fa4` on Hopper, in bf16.
"""

from collections.abc import Callable

from utils.errors import UserError
from utils.hardware import Machine
from utils.steps import Verdict, missing_triton, off, refused

NAME = "fa3"
AFTER = ("fused_projections",)
PARTS = ("blocks",)

BACKENDS = (
    *("fa3", "fa4", "fa2", "aiter", "int8"),
    *("sdpa_cudnn", "sdpa_flash", "sdpa_efficient"),
)
INSTALL = {
    "fa3": "pip install fa3-fwd==0.0.3 (CUDA 13; 0.0.2 for CUDA 12)",
    "fa4": 'pip install --pre "flash-attn-4[cu13]"',
    "fa2": "pip install flash-attn --no-build-isolation",
    "aiter": "pip install amd-aiter",
    "int8": "pip install comfy-kitchen",
}
# Where torch has as good a kernel of its own, a missing package stops nothing
TORCH_HAS = {
    "fa2": ("sdpa_flash", "torch's FlashAttention-2"),
    "fa4": ("sdpa_cudnn", "torch's cuDNN attention"),
}


def add_flags(parser) -> None:
    """Add the flags of the attention kernel."""
    parser.add_argument(
        "--disable_fa3", action="store_true", help="keep diffusers' attention processor"
    )
    parser.add_argument(
        "--fa3_dtype",
        choices=["fp8", "bf16"],
        help="precision of FlashAttention-3 (default: fp8 on Hopper, bf16 with --disable_quant)",
    )
    parser.add_argument(
        "--fa3_rotation",
        action="store_true",
        help="turn Q and K by a Hadamard matrix before their float8 cast, in one Triton kernel: "
        "a third to a half less error (unmeasured on a GPU, so off by default)",
    )
    parser.add_argument(
        "--attention_backend",
        choices=["auto", *BACKENDS],
        default="auto",
        help="attention kernel (default: the best that this machine has)",
    )


def probe(backend: str, fp8: bool) -> tuple[str, str]:
    """Import a backend's package: its name, and what is wrong with it ("" if nothing is)."""
    from utils.kernels import flash_attention

    if backend not in flash_attention.PACKAGES:
        return "torch", ""
    try:
        kernel = flash_attention.find(backend)
    except flash_attention.BackendError as error:
        return "", str(error)
    if fp8 and not kernel.takes_fp8:
        return kernel.package, f"{kernel.package} takes no q_descale"
    return kernel.package, ""


def _expected(machine: Machine, backend: str, fp32: bool) -> str:
    """Say what a backend named by the user would need that is not here; "" if it can run."""
    major = (machine.capability or (0, 0))[0]
    ampere = machine.is_cuda and major >= 8
    if machine.device == "cpu":
        return "a GPU"
    if backend == "fa3" and not machine.is_hopper:
        return "a Hopper GPU (sm90)"
    if backend == "fa4" and not (machine.is_cuda and major >= 9):
        return "a Hopper or Blackwell GPU (sm90 or newer)"
    if backend == "int8" and not (machine.is_cuda and machine.capability >= (7, 5)):
        return "an NVIDIA GPU of sm75 or newer"
    if backend == "aiter" and not _is_cdna3(machine):
        return "an AMD GPU of gfx94x or gfx95x"
    if backend == "sdpa_cudnn" and not ampere:
        return "an NVIDIA GPU of sm80 or newer"
    if backend in ("fa2", "sdpa_flash") and not (ampere or machine.hip):
        return "a GPU of sm80 or newer"
    if fp32 and backend != "sdpa_efficient":
        return "bf16: flash kernels have no fp32 (--disable_bf16)"
    if backend == "sdpa_efficient" and not (fp32 or ampere or machine.hip):
        return "a GPU of sm80 or newer for bf16"
    return ""


def _is_cdna3(machine: Machine) -> bool:
    # gfx90a (MI200) reports 9.0, gfx942 (MI300) 9.4, gfx950 (MI350) 9.5
    return machine.hip is not None and (9, 4) <= (machine.capability or (0, 0)) < (10, 0)


def _best(machine: Machine, fp32: bool) -> tuple[str, str]:
    """Name the backend for a machine, and why where it is not the obvious one."""
    major = (machine.capability or (0, 0))[0]
    if machine.device == "cpu":
        return "sdpa", "torch's own attention: no flash kernel runs on a CPU"
    if machine.hip is not None:  # before the capability: an MI300X reports 9.x, too
        if fp32 or not _is_cdna3(machine):
            return "sdpa", "torch's own choice: AITER needs gfx94x or gfx95x and bf16"
        return "aiter", ""
    if fp32:
        return "sdpa_efficient", "fp32 (--disable_bf16): flash kernels have none"
    if major == 9:
        return "fa3", ""
    if major == 8:
        return "fa2", ""
    if major in (10, 11):
        return "fa4", ""
    if major >= 12:  # FA4 runs there, by the instructions of sm80
        return "sdpa_cudnn", ""
    return "sdpa", "torch's own choice: no fused kernel takes bf16 below sm80"


def choose(
    machine: Machine,
    dtype,
    quant_disabled: bool = False,
    fa3_dtype: str | None = None,
    backend: str = "auto",
    probe: Callable[[str, bool], tuple[str, str]] = probe,
    rotation: bool = False,
) -> Verdict:
    """Decide backend and precision from the machine, the run's dtype and the flags.

    `dtype` is a torch dtype. `probe` stands for the installed packages; tests pass their own.
    A default that the hardware lacks falls back, with the reason in settings["why"]; what was
    named and cannot run, and a missing package for what the hardware has, is refused.
    """
    fp32 = str(dtype) == "torch.float32"
    here = f"{machine.short()}{', fp32' if fp32 else ''}"
    if backend == "auto":
        name, why = _best(machine, fp32)
    else:
        name, why = backend, "--attention_backend"
        expected = _expected(machine, name, fp32)
        if expected:
            return refused(
                f"--attention_backend {name}: found {here}, expected {expected}; "
                "use --attention_backend auto or --disable_fa3"
            )
    if fa3_dtype == "fp8" and name != "fa3":
        return refused(
            f"--fa3_dtype fp8: found {here} with {name}, expected FlashAttention-3 on a Hopper "
            "GPU in bf16; leave out --fa3_dtype, or --disable_fa3"
        )
    fp8 = name == "fa3" and (fa3_dtype or ("bf16" if quant_disabled else "fp8")) == "fp8"
    if rotation and not fp8:
        return refused(
            f"--fa3_rotation: found {here} with {name} and no float8 attention, expected "
            "FlashAttention-3 in fp8 on a Hopper GPU; leave out --fa3_rotation"
        )

    package, problem = probe(name, fp8)
    if problem and name in TORCH_HAS and backend == "auto":
        name, instead = TORCH_HAS[name]
        why, package = f"{instead}: found {problem}", "torch"
    elif problem:
        also = ", --fa3_dtype bf16" if fp8 and package else ""
        wanted = "flash_attn_func with q_descale" if fp8 and package else "a working package"
        return refused(
            f"attention {name}: found {problem}; expected {wanted} on {machine.short()}: "
            f"{INSTALL[name]}{also}, or --disable_fa3"
        )
    precision = "fp8" if fp8 else "int8" if name == "int8" else "fp32" if fp32 else "bf16"
    settings = {"backend": name, "dtype": precision, "package": package}
    if rotation:
        settings["rotation"] = "Hadamard"
    if why:
        settings["why"] = why
    return Verdict("on", lossless=precision in ("bf16", "fp32"), settings=settings)


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if args.disable_fa3:
        return off("--disable_fa3")
    found = choose(
        args.machine,
        args.dtype,
        args.disable_quant,
        args.fa3_dtype,
        args.attention_backend,
        probe,  # looked up at the call: a test can put another in its place
        args.fa3_rotation,
    )
    if found.is_on and args.fa3_rotation and (problem := missing_triton("--fa3_rotation")):
        return refused(problem)
    return found


def apply(pipeline, args) -> None:
    """Give every attention of the transformer the processor.

    Raises: UserError if another processor (an IP-adapter's) is there already and would be lost.
    """
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0

    ours = (FluxAttnProcessor, FlashFusedFluxAttnProcessor3_0)
    for name, processor in pipeline.transformer.attn_processors.items():
        if not isinstance(processor, ours):
            raise UserError(
                f"attention: found {type(processor).__name__} at {name}, expected "
                "FluxAttnProcessor; use --disable_fa3"
            )
    settings = args.plan[NAME].settings
    pipeline.transformer.set_attn_processor(
        FlashFusedFluxAttnProcessor3_0(
            settings["backend"], fp8=settings["dtype"] == "fp8", rotate="rotation" in settings
        )
    )

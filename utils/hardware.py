"""What this machine is, as far as a choice of code depends on it."""

import platform
import re
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError


@dataclass(frozen=True)
class Machine:
    """One device as the steps see it; tests build it by hand for machines they do not have."""

    device: str  # "cuda" (NVIDIA and AMD alike) or "cpu"
    name: str  # "NVIDIA H200", "AMD Instinct MI300X", or the processor's model name
    capability: tuple[int, int] | None = None  # CUDA compute capability; an MI300X says 9.x too
    hip: str | None = None  # ROCm's version; looked at before the capability
    memory_gib: float = 0.0  # of the device; the host's on a CPU

    @property
    def is_cuda(self) -> bool:
        """Whether this is an NVIDIA GPU."""
        return self.device == "cuda" and self.hip is None

    @property
    def is_hopper(self) -> bool:
        """Whether FlashAttention-3's kernels exist for this device (sm90, not AMD's 9.x)."""
        return self.is_cuda and self.capability is not None and self.capability[0] == 9

    @property
    def emulates_bf16(self) -> bool:
        """Whether bf16 is computed in other numbers: slower than fp32, by far on such a CPU."""
        if self.device == "cpu":
            import torch

            known = torch.backends.mkldnn.is_available()
            return known and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return self.is_cuda and (self.capability or (8, 0)) < (8, 0)

    def lacks(self, capability: tuple[int, int]) -> str:
        """Say that this is no NVIDIA GPU of such a capability or a newer one; "" if it is."""
        if self.is_cuda and (self.capability or (0, 0)) >= capability:
            return ""
        major, minor = capability
        return f"needs an NVIDIA GPU of capability {major}.{minor} or newer, found {self.short()}"

    def short(self) -> str:
        """Name the device with what decides for or against a step."""
        if self.device == "cpu":
            return "a CPU"
        if self.hip is not None:
            return f"{self.name} (ROCm {self.hip})"
        return f"{self.name} (sm{self.capability[0]}{self.capability[1]})"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def detect(device: str | None = None) -> Machine:
    """Look at the device that was asked for, or at the best one there is.

    Raises: UserError if CUDA was asked for and there is none, or the name is unknown.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    if not re.fullmatch(r"cpu|cuda(:0|:[1-9][0-9]{0,2})?", device):
        raise UserError(f"--device {device}: unknown device (expected cuda, cuda:N or cpu)")
    if kind == "cpu":
        import psutil

        return Machine("cpu", _cpu_name(), memory_gib=psutil.virtual_memory().total / 2**30)
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {device}: no CUDA device found (torch {torch.__version__}); use --device cpu"
        )
    index = int(index or 0)
    if index >= torch.cuda.device_count():
        raise UserError(f"--device {device}: found {torch.cuda.device_count()} CUDA device(s)")
    torch.cuda.set_device(index)  # graphs, packages and memory statistics mean the current device
    properties = torch.cuda.get_device_properties(index)
    return Machine(
        "cuda",
        properties.name,
        capability=(properties.major, properties.minor),
        hip=torch.version.hip,
        memory_gib=properties.total_memory / 2**30,
    )

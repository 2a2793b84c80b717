"""How fast a machine can be: data sheets, and the machine's own ceilings where those are asked for.

A data sheet is a bound that no kernel reaches; a measured ceiling is what the best library call
reaches here and now (clocks, power limit, other users). Floors say which of the two they stand on.
"""

import contextlib
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from utils.benchmark_utils import time_once
from utils.hardware import Machine
from utils.memory import free_bytes

LIMIT_S = 0.3  # of one measurement in measure_ceilings(): what a CPU needs for a large product


@dataclass(frozen=True)
class Peaks:
    """Rates of one machine. Units: TFLOP/s of dense products, TB/s (1e12)."""

    machine: str
    tflop_per_s: dict[str, float]  # by dtype (a key of layers.WIDTH); what it lacks is absent
    tb_per_s: float
    source: str

    def ridge(self, dtype: str) -> float | None:
        """Give the FLOP per byte above which arithmetic is the bound."""
        rate = self.tflop_per_s.get(dtype)
        return None if rate is None else rate / self.tb_per_s


@dataclass(frozen=True)
class Card:
    """A machine that we know by its name."""

    machine: Machine
    pattern: str  # of the whole name as the driver gives it; other variants have other rates
    peaks: Peaks


def _card(
    machine: Machine, pattern: str, tb_per_s: float, rates: dict[str, float], source: str
) -> Card:
    return Card(machine, pattern, Peaks(machine.name, rates, tb_per_s, source))


def _nvidia(name: str, major: int, minor: int) -> Machine:
    return Machine("cuda", f"NVIDIA {name}", (major, minor))


# NVIDIA's newer sheets print rates with 2:4 sparsity: halved here, since FLUX.1 is dense.
CARDS = {
    "H200": _card(
        _nvidia("H200", 9, 0), "NVIDIA H200",
        4.8, {"bf16": 989.5, "fp8": 1979, "int8": 1979},
        "NVIDIA H200 data sheet, SXM (1,979 and 3,958 with sparsity)",
    ),
    "H100": _card(
        _nvidia("H100 80GB HBM3", 9, 0), "NVIDIA H100 80GB HBM3",  # SXM; PCIe and NVL are slower
        3.35, {"bf16": 989.5, "fp8": 1979, "int8": 1979},
        "NVIDIA H100 data sheet, SXM (1,979 and 3,958 with sparsity)",
    ),
    "A100": _card(
        _nvidia("A100-SXM4-80GB", 8, 0), "NVIDIA A100-SXM4-80GB",
        2.039, {"bf16": 312, "int8": 624},
        "NVIDIA A100 data sheet, SXM 80 GB",
    ),
    "L20": _card(
        _nvidia("L20", 8, 9), "NVIDIA L20",
        0.864, {"bf16": 119.5, "fp8": 239, "int8": 239},
        "no public NVIDIA data sheet; vendors' specification of the L20 (PCIe, 48 GB)",
    ),
    "L40S": _card(
        _nvidia("L40S", 8, 9), "NVIDIA L40S",
        0.864, {"bf16": 362.05, "fp8": 733, "int8": 733},
        "NVIDIA L40S data sheet",
    ),
    "RTX 4090": _card(
        _nvidia("GeForce RTX 4090", 8, 9), "NVIDIA GeForce RTX 4090",  # neither D nor Laptop GPU
        1.008, {"bf16": 165.2, "fp8": 330.3, "int8": 660.6},
        "NVIDIA Ada GPU architecture white paper, appendix A (FP32 accumulation)",
    ),
    "B200": _card(
        _nvidia("B200", 10, 0), "NVIDIA B200",
        8.0, {"bf16": 2250, "fp8": 4500, "int8": 4500, "mxfp8": 4500, "nvfp4": 9000},
        "NVIDIA HGX B200 data sheet, one of 8 GPUs (4.5, 9 and 18 PFLOP/s with sparsity)",
    ),
    "MI300X": _card(
        Machine("cuda", "AMD Instinct MI300X", (9, 4), hip="7.0"), "AMD Instinct MI300X( OAM)?",
        5.3, {"bf16": 1307.4, "fp8": 2614.9, "int8": 2614.9},
        "AMD Instinct MI300X data sheet",
    ),
}  # fmt: skip


def datasheet(machine: Machine) -> Peaks | None:
    """Give the data sheet's rates of a machine, or None if we do not know exactly this one."""
    if machine.device == "cpu":
        return None
    for card in CARDS.values():
        if re.fullmatch(card.pattern, machine.name):
            return card.peaks
    return None


def measure_ceilings(device: str, dtype) -> Peaks:
    """Measure what this machine reaches: large products in `dtype` and float8, and a large copy.

    Float8 only on a GPU whose torch._scaled_mm runs: a CPU's is an emulation. Takes about 2 seconds
    on a CPU, less on a GPU; needs up to 2 GiB of memory, or a quarter of what is free.
    """
    import torch

    from utils.hardware import detect

    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    rates = {name: _product_rate(device, partial(_plain, device, dtype))}
    tb_per_s, mib = _copy_rate(device)
    if device.startswith("cuda"):
        with contextlib.suppress(RuntimeError, ValueError):  # what a GPU without float8 raises
            rates["fp8"] = _product_rate(device, partial(_float8, device))
        torch.cuda.empty_cache()  # or a run's peak would contain it
    source = (
        f"measured: best of square products, and a copy of {mib} MiB, torch {torch.__version__}"
    )
    return Peaks(detect(device).name, rates, tb_per_s, source)


def _two(n: int, device: str, dtype) -> tuple:
    """Draw two matrices: zeros would need less power, and so run faster than a model's numbers."""
    import torch

    own = torch.Generator(device).manual_seed(0)  # leaves the run's random state alone
    return tuple(torch.randn(n, n, device=device, dtype=dtype, generator=own) for _ in range(2))


def _plain(device: str, dtype, n: int) -> Callable[[], object]:
    a, b = _two(n, device, dtype)
    return lambda: a @ b


def _float8(device: str, n: int) -> Callable[[], object]:
    import torch

    old_amd = torch.version.hip and torch.cuda.get_device_capability(device) < (9, 5)
    dtype = torch.float8_e4m3fnuz if old_amd else torch.float8_e4m3fn
    a, b = (x.to(dtype) for x in _two(n, device, torch.bfloat16))
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _product_rate(device: str, prepare: Callable[[int], Callable[[], object]]) -> float:
    """Give the best rate of growing square products. Units: TFLOP/s."""
    best, n, seconds = 0.0, 256, 0.0
    while n <= 16384 and 8 * seconds < LIMIT_S and 12 * n * n < free_bytes(device) // 4:
        seconds = _seconds(prepare(n), device)
        best = max(best, 2 * n**3 / seconds / 1e12)
        n *= 2
    return best


def _copy_rate(device: str) -> tuple[float, int]:
    """Copy more than any cache holds. Units: TB/s, read and written; MiB."""
    import torch

    wanted = 1024 if device.startswith("cuda") else 512
    mib = max(1, min(wanted, free_bytes(device) // 8 // 2**20))
    source = torch.ones(mib * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * mib * 2**20 / _seconds(lambda: target.copy_(source), device) / 1e12, mib


def _seconds(run: Callable[[], object], device: str) -> float:
    """Time one call: the shortest of several, after one that does not count."""
    times, end = [], time.perf_counter() + LIMIT_S
    run()
    while not times or (len(times) < 10 and time.perf_counter() <= end):
        times.append(time_once(run, device))
    return min(times)

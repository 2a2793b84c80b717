"""A trial's time: one CUDA graph of many calls, over sets of inputs that no cache holds together.

In the model the weights of a product were last read a step ago, tens of gigabytes earlier; the same
inputs again and again would find a small layer's in the second level cache.
"""

import math
import time
from collections.abc import Callable

import torch

from utils.benchmark_utils import Spread, synchronize, time_once
from utils.cudagraph import CUDARecorder
from utils.kernel_bench.trial import Trial, nbytes

GRAPH_MS, MOST_CALLS, MOST_SETS = 2.0, 64, 8
SAMPLES, LIMIT_S = 30, 0.25  # of one trial; at least LEAST samples
LEAST = 5


def sets_of(trial: Trial, device: str) -> list[tuple]:
    """Draw so many sets of inputs that together they are twice the second level cache, or 8."""
    first = trial.draw(0)
    cache = 0
    if device.startswith("cuda"):
        cache = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(MOST_SETS, max(1, math.ceil(2 * cache / max(1, nbytes(first)))))
    return [first, *(trial.draw(k) for k in range(1, count))]


def measure(trial: Trial, sets: list[tuple], device: str) -> tuple[Spread, int]:
    """Time a trial that has run once already.

    Returns: milliseconds of one call, and how many calls one sample contains.
    """
    if not device.startswith("cuda") or trial.clock == "host":
        return _samples(lambda: _host_ms(lambda: trial.run(*sets[0]), device)), 1
    once_ms = 1e3 * time_once(lambda: trial.run(*sets[0]), device)
    calls = len(sets) * math.ceil(GRAPH_MS / max(once_ms, 1e-3) / len(sets))
    calls = min(calls, max(MOST_CALLS, len(sets)))

    def run() -> None:
        for k in range(calls):
            trial.run(*sets[k % len(sets)])

    if trial.clock == "graph":
        run = CUDARecorder().record(run)
    run()
    return _samples(lambda: 1e3 * time_once(run, device) / calls), calls


def _samples(sample: Callable[[], float]) -> Spread:
    """Take samples until there are enough or the time is up."""
    found, end = [], time.perf_counter() + LIMIT_S
    while len(found) < SAMPLES and (len(found) < LEAST or time.perf_counter() < end):
        found.append(sample())
    return Spread(tuple(found))


def _host_ms(run: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)

"""How time and memory are measured: what is inside of a time, what is outside, and the units."""

import resource
from types import SimpleNamespace

import pytest
import torch

from utils import benchmark_utils, calls, memory
from utils.benchmark_utils import Spread, StageClock, measure, time_once

LAUNCH_S = 0.001


class Device:
    """A GPU and its host's clock: work is queued, and takes its time whether anybody waits."""

    def __init__(self):
        self.now, self.done = 100.0, 0.0

    def work(self, seconds: float) -> None:
        self.done = max(self.done, self.now) + seconds
        self.now += LAUNCH_S

    def synchronize(self) -> None:
        self.now = max(self.now, self.done)


class Event:
    """Stand in for torch.cuda.Event on such a device; like it, refuses what has not happened."""

    device: Device

    def __init__(self, enable_timing: bool = False):
        assert enable_timing

    def record(self) -> None:
        self.at = max(self.device.done, self.device.now)

    def synchronize(self) -> None:
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other: "Event") -> float:
        assert max(self.at, other.at) <= self.device.now, "not ready"
        return 1e3 * (other.at - self.at)  # ms


@pytest.fixture
def device(monkeypatch):
    """Put such a device in the place of CUDA and of the clock."""
    device = Device()
    monkeypatch.setattr(Event, "device", device, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    clock = SimpleNamespace(perf_counter=lambda: device.now)
    monkeypatch.setattr(benchmark_utils, "time", clock)
    return device


def test_a_sample_is_one_run_with_all_of_its_work_and_nothing_else(device):
    order, clock = [], StageClock("cuda")

    def run():
        order.append("run")
        with clock.region("step"):
            device.work(2.0)

    def aside(name: str):
        order.append(name)
        found.append(clock.read())
        device.now += 5.0

    found = []
    spread = measure(run, "cuda", 2, 3, lambda: aside("before"), lambda: aside("after"))
    assert order == ["run"] * 3 + ["before"] + ["run", "after"] * 2
    assert spread.samples == pytest.approx((2.0, 2.0))
    assert [len(stages["step"]) for stages in found] == [3, 1, 1]
    assert found[1]["step"] == pytest.approx([2.0])


def test_only_a_warm_up_may_meet_a_new_kind_of_call():
    def run():
        if next(kinds):
            calls.refuse_if_only_known("recording")

    kinds = iter((True, False, False))
    assert len(measure(run, "cpu", 2, 1).samples) == 2
    kinds = iter((False, True))
    with pytest.raises(RuntimeError, match="recording in a timed run"):
        measure(run, "cpu", 1, 1)
    calls.refuse_if_only_known("recording")  # and afterwards everything may


@pytest.mark.parametrize("name", ["cuda:0", "cpu"])
def test_regions_are_in_seconds_and_read_once(device, name):
    clock = StageClock(name)
    for title, seconds in (("a", 1.0), ("b", 3.0), ("a", 0.5)):
        with clock.region(title):
            device.work(seconds)
            if name == "cpu":
                device.synchronize()
    device.synchronize()
    read = clock.read()
    assert read == {"a": pytest.approx([1.0, 0.5]), "b": pytest.approx([3.0])}
    assert clock.read() == {}


def test_one_call_on_a_gpu_is_timed_without_its_launch(device):
    device.work(7.0)  # of somebody before
    assert time_once(lambda: device.work(2.0), "cuda") == pytest.approx(2.0)
    device.synchronize()
    assert time_once(lambda: device.work(2.0), "cpu") == pytest.approx(LAUNCH_S)


def test_a_spread_keeps_its_samples_in_their_order():
    found = Spread((3.0, 1.0, 2.00000049)).as_dict()
    assert found == {"median": 2.0, "min": 1.0, "max": 3.0, "n": 3, "samples": [3.0, 1.0, 2.0]}


def test_memory_is_asked_of_the_device_and_told_in_gib(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", {"cuda:1": (7, 9)}.get)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 4 * 2**30)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: asked.append("reset"))
    assert memory.free_bytes("cuda:1") == 7
    assert 2**20 < memory.free_bytes("cpu") < 2**50
    host = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    assert memory.peak_memory("cpu") == pytest.approx(host, rel=0.01)
    found = memory.peak_memory("cuda:1")
    assert (found["allocated_peak_gib"], found["reserved_peak_gib"]) == (3, 4)
    memory.reset_peak_memory("cpu")
    memory.reset_peak_memory("cuda")
    assert asked == ["reset"]

"""The CUDA-graph wrapper: its logic on a CPU with a recorder that really runs, capture on a GPU."""

import gc
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch.utils import _pytree as pytree

from utils import card
from utils.calls import only_known_calls
from utils.cudagraph import CUDAGraphWrapper, GraphPool, usage, wrap_components


class RerunRecorder:
    """Stands in for a CUDA graph: runs fn on the static buffers and overwrites its old outputs."""

    def __init__(self):
        self.recorded = 0

    def pool_bytes(self):
        return 0

    def record(self, fn):
        self.recorded += 1
        static = pytree.tree_map_only(torch.Tensor, torch.clone, fn())

        def replay():
            fresh = pytree.tree_leaves(fn())
            for old, new in zip(pytree.tree_leaves(static), fresh, strict=True):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)
            return static

        return replay


def wrapped(fn, name="transformer"):
    recorder = RerunRecorder()
    return CUDAGraphWrapper(fn, name, GraphPool(recorder)), recorder


def scale(x, factor=1.0, extra=None, flag=False):
    y = x * factor
    if extra is not None:
        y = y + extra["bias"]
    return -y if flag else y


def test_equals_the_function_and_records_once_per_kind():
    fn, recorder = wrapped(scale)
    for seed in range(3):
        x = torch.full((2, 3), float(seed + 1))
        assert torch.equal(fn(x, factor=2.0), scale(x, factor=2.0))
    assert recorder.recorded == fn.num_graphs == 1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((torch.ones(2), {}), (torch.ones(3), {})),
        ((torch.ones(2), {}), (torch.ones(2, dtype=torch.float64), {})),
        ((torch.ones(2), {}), (torch.ones(2, device="meta"), {})),
        ((torch.ones(2), {"flag": False}), (torch.ones(2), {"flag": True})),
        ((torch.ones(2), {"factor": 1.0}), (torch.ones(2), {"factor": 2.0})),
        ((torch.ones(2), {"factor": 1}), (torch.ones(2), {"factor": 1.0})),
        ((torch.ones(2), {"factor": 1}), (torch.ones(2), {"factor": True})),
        (
            (torch.ones(2), {"extra": {"bias": torch.ones(2)}}),
            (torch.ones(2), {"extra": {"bias": torch.ones(1)}}),
        ),
        ((torch.ones(2), {"extra": None}), (torch.ones(2), {"extra": {"bias": torch.ones(2)}})),
    ],
    ids=["shape", "dtype", "device", "flag", "value", "int/float", "int/bool", "nested", "None"],
)
def test_every_part_of_a_call_is_in_its_key(first, second):
    fn, recorder = wrapped(scale)
    for x, kwargs in (first, second, first, second):
        expected = scale(x, **kwargs)
        got = fn(x, **kwargs)
        assert (got.dtype, got.device) == (expected.dtype, expected.device)
        if x.device.type != "meta":
            assert torch.equal(got, expected)
    assert recorder.recorded == 2


def test_positional_and_keyword_tensors_are_both_copied_in():
    fn, recorder = wrapped(lambda x, *, y: x - y)
    for k in range(3):
        x, y = torch.full((2,), float(k)), torch.full((2,), 10.0 * k)
        assert torch.equal(fn(x, y=y), x - y)
    assert recorder.recorded == 1


def test_order_of_keywords_does_not_matter():
    fn, recorder = wrapped(lambda a, b: a - 2 * b)
    a, b = torch.ones(2), torch.full((2,), 3.0)
    assert torch.equal(fn(a=a, b=b), fn(b=b, a=a))
    assert recorder.recorded == 1


def test_outputs_survive_later_calls():
    fn, _ = wrapped(lambda x: (x + 1, [x * 2]))
    first = fn(torch.zeros(2))
    fn(torch.ones(2))
    assert torch.equal(first[0], torch.ones(2))
    assert torch.equal(first[1][0], torch.zeros(2))


def test_an_output_that_is_its_input_is_a_copy():
    fn, _ = wrapped(lambda x: x)
    x = torch.zeros(2)
    y = fn(x)
    x += 5
    fn(x)
    assert torch.equal(y, torch.zeros(2))


def test_expanded_and_strided_inputs():
    fn, recorder = wrapped(lambda x: x * 2)
    for x in (
        torch.tensor([3.5]).expand(4),  # Dev's guidance for a batch
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
        torch.arange(8.0)[::2],
    ):
        assert torch.equal(fn(x), x * 2)
    assert recorder.recorded == 1
    image = torch.randn(1, 3, 4, 5).to(memory_format=torch.channels_last)
    assert fn(image).is_contiguous(memory_format=torch.channels_last)


def test_model_outputs_keep_their_class():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    fn, _ = wrapped(lambda x: Transformer2DModelOutput(sample=x + 1))
    first = fn(torch.zeros(2))
    fn(torch.ones(2))
    assert isinstance(first, Transformer2DModelOutput)
    assert torch.equal(first.sample, torch.ones(2))


def test_unhashable_argument_is_refused_by_name():
    fn, _ = wrapped(scale)
    with pytest.raises(TypeError, match=r"transformer.*extra.*set.*not hashable"):
        fn(torch.ones(2), extra={1, 2})


def test_argument_without_a_value_is_refused_by_name():
    fn, _ = wrapped(scale)
    with pytest.raises(TypeError, match=r"extra.*seed.*Generator.*identity"):
        fn(torch.ones(2), extra={"seed": torch.Generator()})


def test_output_that_hides_tensors_is_refused():
    @dataclass
    class Hidden:
        sample: torch.Tensor

    fn, _ = wrapped(lambda x: Hidden(x))
    with pytest.raises(TypeError, match=r"transformer.*Hidden"):
        fn(torch.ones(2))


def test_failed_recording_names_the_component_and_leaves_no_graph():
    def broken(x):
        raise ValueError("synchronises")

    fn, _ = wrapped(broken, "decoder")
    with pytest.raises(RuntimeError, match=r"decoder.*\(2,\).*ValueError: synchronises"):
        fn(torch.ones(2))
    assert fn.num_graphs == 0


class PretendedCuda:
    """The parts of torch.cuda that CUDARecorder uses; tells which stream is the current one."""

    def __init__(self, monkeypatch):
        self.current = "main"
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1 + self.pools[-1]))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
        self.captures = SimpleNamespace(wait_stream=lambda other: None)
        self.forgotten, self.pools = [], [0]
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(
            torch._C,
            "_cuda_endAllocateToPool",
            lambda *args: self.forgotten.append(args),
            raising=False,
        )

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"
        self.pools.append(pool[1])
        capture = self.capture()
        capture.capture_stream = self.captures
        return capture

    @contextmanager
    def capture(self):
        """Leave as torch's own: a capture that failed raises anew, and its stream stays current."""
        before, self.current = self.current, self.captures
        try:
            yield
        except ValueError:
            raise RuntimeError("capture invalidated")  # noqa: B904
        self.current = before


def test_all_recordings_share_one_stream_and_collect_no_garbage_in_a_capture(monkeypatch):
    cuda, seen = PretendedCuda(monkeypatch), []

    def forward(x):
        seen.append((cuda.current, gc.isenabled()))
        return x

    fn = CUDAGraphWrapper(forward, "decoder")
    for n in (1, 2, 3):
        fn(torch.ones(n))
    assert seen == [(cuda.captures, collects) for collects in (True, True, True, False)] * 3
    assert cuda.current == "main" and gc.isenabled()


def test_a_failed_capture_says_why_and_leaves_its_stream(monkeypatch):
    cuda, calls = PretendedCuda(monkeypatch), []

    def forward(x):
        calls.append(x)
        if len(calls) == 4:  # behind the warm-ups
            raise ValueError("synchronises")
        return x

    fn = CUDAGraphWrapper(forward, "decoder")
    with pytest.raises(RuntimeError, match=r"ValueError: synchronises; then .* invalidated"):
        fn(torch.ones(2))
    assert cuda.current == "main" and fn.num_graphs == 0 and gc.isenabled()
    assert cuda.forgotten == [(0, (0, 1))]  # the allocator waits for no end of it
    fn(torch.ones(3))
    assert fn.num_graphs == 1 and len(cuda.forgotten) == 1
    assert cuda.pools == [0, 1, 2]  # the allocator of pinned memory refuses the first from now on


def test_inference_mode_may_come_and_go():
    fn, _ = wrapped(lambda x: x + 1)
    with torch.inference_mode():
        fn(torch.zeros(2))
    assert torch.equal(fn(torch.ones(2)), torch.full((2,), 2.0))


def test_both_components_share_one_recorder():
    class Pipeline:
        transformer = torch.nn.Linear(4, 4)

        class vae:
            decoder = torch.nn.Linear(4, 2)

    recorder = RerunRecorder()
    x = torch.randn(3, 4)
    expected = Pipeline.transformer(x), Pipeline.vae.decoder(x)
    wrap_components(Pipeline, GraphPool(recorder))
    assert torch.equal(Pipeline.transformer(x), expected[0])
    assert torch.equal(Pipeline.vae.decoder(x), expected[1])
    assert recorder.recorded == 2
    assert usage(Pipeline) == {"kept": 2, "limit": 16, "recorded": 2, "dropped": 0, "pool_bytes": 0}
    assert usage(object()) is None and card.cuda_graphs(None) == []
    assert card.cuda_graphs(usage(Pipeline) | {"pool_bytes": 2**29}) == [
        "CUDA graphs 2 kept of at most 16, 2 recorded, 0 dropped; their pool holds 0.50 GiB"
    ]


def test_the_least_recently_used_graph_of_all_components_is_dropped():
    recorder = RerunRecorder()
    pool = GraphPool(recorder, limit=3)
    double = CUDAGraphWrapper(lambda x: x * 2, "transformer", pool)
    triple = CUDAGraphWrapper(lambda x: x * 3, "decoder", pool)
    kept = [fn(torch.ones(n)) for fn, n in ((double, 1), (triple, 1), (double, 2))]
    double(torch.ones(1))  # so the decoder's graph is the one that was used longest ago
    assert torch.equal(double(torch.full((3,), 5.0)), torch.full((3,), 10.0))
    assert (double.num_graphs, triple.num_graphs, pool.usage()["dropped"]) == (3, 0, 1)
    double(torch.ones(2))
    assert recorder.recorded == 4  # the others are still there
    assert torch.equal(triple(torch.ones(1)), torch.full((1,), 3.0))  # recorded anew, and right
    assert recorder.recorded == 5
    assert torch.equal(torch.cat(kept), torch.tensor([2.0, 3.0, 2.0, 2.0]))
    with only_known_calls(), pytest.raises(RuntimeError, match=r"transformer.*in a timed run"):
        double(torch.ones(1))  # dropped when the decoder's came back


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu_only
def test_gpu_capture_equals_eager_for_two_sizes_in_one_pool():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64))
    model = model.cuda()
    fn = CUDAGraphWrapper(model.forward, "model")
    batches = [torch.randn(n, 64, device="cuda") for n in (8, 32, 8, 32, 8)]
    with torch.no_grad():
        expected = [model(x) for x in batches]
    kept = [fn(x) for x in batches]  # all kept while later replays overwrite the graphs' memory
    assert fn.num_graphs == 2 and fn.pool.usage()["pool_bytes"] > 0
    for got, want in zip(kept, expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.gpu
@gpu_only
def test_gpu_expanded_input():
    fn = CUDAGraphWrapper(lambda x: x * 2, "guidance")
    for value in (1.0, 3.5):
        x = torch.full((1,), value, device="cuda").expand(4)
        assert torch.equal(fn(x), x * 2)


@pytest.mark.gpu
@gpu_only
def test_gpu_a_failed_capture_is_named():
    """In a process of its own, and that process can capture again."""
    script = """
import torch
from utils.cudagraph import CUDAGraphWrapper

before = torch.cuda.current_stream()
try:
    CUDAGraphWrapper(lambda x: x * x.sum().item(), "decoder")(torch.ones(2, device="cuda"))
except RuntimeError as error:
    print(torch.cuda.current_stream() == before, error)
double = CUDAGraphWrapper(lambda x: 2 * x, "decoder")
print(double(torch.full((2,), 3.0, device="cuda")).tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.startswith("True CUDA graph of decoder: recording failed"), done
    assert "not permitted when stream is capturing" in done.stdout, done
    assert done.stdout.endswith("[6.0, 6.0]\n"), done

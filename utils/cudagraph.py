"""The one CUDA-graph wrapper: compile and export_aoti both put it around a component's forward.

A graph replays fixed kernels on fixed addresses, so every distinct call gets its own graph and its
own static input buffers: a call copies its inputs in, replays, and clones the outputs, which are
therefore safe to keep. Two calls are distinct if they differ in structure, in any tensor's shape,
dtype or device (positional or keyword, however nested), or in the value of anything that is not a
tensor, since the recorded kernels hold it as a constant. All graphs share one memory pool, because
they never run at the same time; beyond MAX_GRAPHS the least recently used is dropped. Inductor's
own CUDA graphs do not cover AOTI packages and hand out memory that the next call overwrites, so
this wrapper serves both modes.
"""

import gc
from collections import OrderedDict
from collections.abc import Callable
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import torch
from torch.utils import _pytree as pytree

from utils.calls import dense, key_of, name_of, refuse_if_only_known
from utils.steps import components

MAX_GRAPHS = 16  # of all components: eight sizes; each holds its inputs and outputs
WARMUP_CALLS = 3  # autotuning, lazily made workspaces and lazy loading must be over before capture
CONSTANTS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


class Recorder(Protocol):
    """Records a function without arguments, to be replayed on the same memory."""

    def record(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Return replay(), which repeats fn's work and returns the outputs it has overwritten."""

    def pool_bytes(self) -> int:
        """Give the device memory that the recordings share."""


@contextmanager
def uncollected():
    """Keep garbage collection off: a graph or package destroyed in a capture makes it fail."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _forget_capture(pool) -> None:
    """Tell the CUDA allocator that a failed capture is over: torch raises before it does so itself.

    Otherwise every later capture of the process is refused (torch 2.11, CUDAGraph::capture_end).
    The pinned-memory allocator cannot be told; it refuses this pool, and only this one, afterwards.
    """
    with suppress(RuntimeError):  # torch had told it
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)


class CUDARecorder:
    """Record with torch.cuda.CUDAGraph into a memory pool that all graphs share.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self) -> None:
        # The last one is in use. The first is made at the first recording, so that importing
        # touches no device, a new one after every failed capture.
        self.pools: list[tuple[int, int]] = []

    def record(self, fn: Callable[[], Any]) -> Callable[[], Any]:
        """Warm up and capture, both on torch's capture stream, and return the replay.

        One stream for all: cuBLAS keeps a workspace for every stream it has seen, 32 MiB on Hopper.
        """
        if not self.pools:
            self.pools.append(torch.cuda.graph_pool_handle())
        graph, pool = torch.cuda.CUDAGraph(), self.pools[-1]
        # Other threads of a server may allocate meanwhile
        capture = torch.cuda.graph(graph, pool, capture_error_mode="thread_local")
        stream = capture.capture_stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # torch.cuda.graph leaves its own after a failure
            for _ in range(WARMUP_CALLS):
                fn()
            try:
                with uncollected(), capture:  # waits for the device first
                    outputs = fn()  # held by replay(): a later capture cannot take their memory
            except Exception:
                _forget_capture(pool)
                self.pools.append(torch.cuda.graph_pool_handle())
                raise

        def replay() -> Any:
            graph.replay()
            return outputs

        return replay

    def pool_bytes(self) -> int:
        """Sum up the device memory that the pool holds, shared by all graphs."""
        if not self.pools:
            return 0
        segments = torch.cuda.memory_snapshot()
        return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) in self.pools)


class GraphPool:
    """All graphs of a run, on one memory pool: at most `limit`, the least recently used go."""

    def __init__(self, recorder: Recorder | None = None, limit: int = MAX_GRAPHS) -> None:
        self.recorder, self.limit = recorder or CUDARecorder(), limit
        self.recorded = self.dropped = 0
        self._graphs: OrderedDict[tuple, tuple] = OrderedDict()  # (owner, key) -> buffers, replay

    def find(self, owner: object, key: tuple) -> tuple | None:
        """Give what an owner has recorded for this kind of call, and note that it is in use."""
        graph = self._graphs.get((owner, key))
        if graph is not None:
            self._graphs.move_to_end((owner, key))
        return graph

    def add(self, owner: object, key: tuple, graph: tuple) -> None:
        """Keep a graph, and drop the oldest beyond the limit.

        Recording has waited for the device, so the dropped one is not running any more.
        """
        self._graphs[owner, key] = graph
        self.recorded += 1
        while len(self._graphs) > self.limit:
            self._graphs.popitem(last=False)
            self.dropped += 1

    def count(self, owner: object) -> int:
        """Count the graphs of one owner."""
        return sum(other is owner for other, _ in self._graphs)

    def usage(self) -> dict[str, int]:
        """Say what there is, for the card of a run."""
        return {
            "kept": len(self._graphs),
            "limit": self.limit,
            "recorded": self.recorded,
            "dropped": self.dropped,
            "pool_bytes": self.recorder.pool_bytes(),
        }


class CUDAGraphWrapper:
    """Call a function through one recorded graph per distinct call.

    Raises: TypeError for an argument that a graph cannot be keyed by, or an output whose tensors
        cannot be cloned; RuntimeError naming the component if recording fails.
    """

    def __init__(self, fn: Callable, name: str, pool: GraphPool | None = None) -> None:
        self.fn, self.name = fn, name
        self.pool = pool or GraphPool()

    @property
    def num_graphs(self) -> int:
        """Count the distinct calls that have a graph."""
        return self.pool.count(self)

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        """Record on the first call of its kind, replay on every one, and clone what comes out."""
        # Keyword order is no part of a call; sorting gives f(a=, b=) and f(b=, a=) one graph
        call = (args, dict(sorted(kwargs.items())))
        leaves, spec = pytree.tree_flatten(call)
        if not all(isinstance(leaf, (torch.Tensor, *CONSTANTS)) for leaf in leaves):
            self._check_values(call)
        key = key_of(leaves, spec)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        graph = self.pool.find(self, key)
        if graph is None:
            graph = self._record(leaves, spec, tensors)
            self.pool.add(self, key, graph)
        buffers, replay = graph
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor)  # right for any strides, an expanded tensor's included
        return pytree.tree_map(self._keep, replay())

    def _check_values(self, call: tuple) -> None:
        """Refuse the first argument that has no lasting value to be keyed by."""
        for path, leaf in pytree.tree_leaves_with_path(call):
            by_identity = type(leaf).__hash__ is object.__hash__ and not callable(leaf)
            try:
                hash(leaf)
            except TypeError:
                reason = "is not hashable"
            else:
                if isinstance(leaf, torch.Tensor) or not by_identity:
                    continue
                reason = "is compared by identity, so a change of its state would go unseen"
            where = name_of(path[1:])  # the first key only tells positional from keyword arguments
            raise TypeError(
                f"CUDA graph of {self.name}: argument {where} of type {type(leaf).__name__} "
                f"{reason}; expected tensors and plain values"
            )

    def _record(self, leaves: list, spec, tensors: list[torch.Tensor]) -> tuple:
        refuse_if_only_known(f"CUDA graph of {self.name}: a call of a new kind is recorded")
        # Buffers made in inference mode could not be written outside of it; leaving it turns
        # gradients on
        with torch.inference_mode(False), torch.no_grad():
            buffers = [dense(tensor) for tensor in tensors]  # warm-up and capture read values
            remaining = iter(buffers)
            static = [next(remaining) if isinstance(x, torch.Tensor) else x for x in leaves]
            args, kwargs = pytree.tree_unflatten(static, spec)
            return buffers, self._record_call(args, kwargs, tensors)

    def _record_call(self, args: tuple, kwargs: dict, tensors: list) -> Callable[[], Any]:
        try:
            return self.pool.recorder.record(lambda: self.fn(*args, **kwargs))
        except Exception as error:
            shapes = ", ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
            # A capture that fails ends in an error of its own, which does not say why
            found = [error] if error.__context__ is None else [error.__context__, error]
            raise RuntimeError(
                f"CUDA graph of {self.name}: recording failed for inputs {shapes}: "
                + "; then ".join(f"{type(e).__name__}: {e}" for e in found)
            ) from error

    def _keep(self, leaf: Any) -> Any:
        """Clone a tensor out of the graph's memory; let constants pass, and nothing else."""
        if isinstance(leaf, torch.Tensor):
            return leaf.clone()
        if isinstance(leaf, CONSTANTS):
            return leaf
        raise TypeError(
            f"CUDA graph of {self.name}: cannot look for tensors in an output of type "
            f"{type(leaf).__name__}; register it with torch.utils._pytree"
        )


def pool_of(pipeline, pool: GraphPool | None = None) -> GraphPool:
    """Give the pool of all of a pipeline's graphs; the first that asks makes it, or brings it."""
    pipeline.graph_pool = pool or getattr(pipeline, "graph_pool", None) or GraphPool()
    return pipeline.graph_pool


def wrap_components(pipeline, pool: GraphPool | None = None, with_transformer: bool = True) -> None:
    """Put the transformer's and the VAE decoder's forward into graphs of one pool."""
    pool = pool_of(pipeline, pool)
    for name, module in components(pipeline).items():
        if name != "transformer" or with_transformer:
            module.forward = CUDAGraphWrapper(module.forward, name, pool)


def usage(pipeline) -> dict[str, int] | None:
    """Say how many graphs a pipeline has recorded, dropped and kept; None without any."""
    pool = getattr(pipeline, "graph_pool", None)
    return None if pool is None else pool.usage()

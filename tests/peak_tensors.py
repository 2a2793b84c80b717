"""The peak of live tensors of a piece of code, on any device; fake tensors count as well."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class PeakTensors(TorchDispatchMode):
    """Count the bytes of every storage that an operation has made and nothing has dropped since.

    What existed before and kernels' own workspaces are not counted. Units: bytes
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.known |= {self._key(x) for x in tree_iter((args, kwargs)) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if torch.is_tensor(tensor) and self._key(tensor) not in self.known:
                self._add(tensor.untyped_storage())
        return out

    def _key(self, tensor) -> int:
        return id(tensor.untyped_storage())  # a storage keeps its Python object

    def _add(self, storage) -> None:
        key, size = id(storage), storage.nbytes()
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def drop():
            self.known.discard(key)
            self.now -= size

        weakref.finalize(storage, drop)

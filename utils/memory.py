"""Memory of a run, on the device and on the host: what is free, peaks and weights."""

import re
import resource


def parse_size(text: str) -> int | None:
    """Read 20GB, 1.5 GiB or a number of bytes; None if it is none of these. Units: bytes"""
    found = re.fullmatch(r"(\d{1,15}(?:\.\d+)?) ?(?:(?:([kmgt])(i?))?b)?", text.lower())
    if not found:
        return None
    number, letter, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** " kmgt".index(letter or " "))


def free_bytes(device: str) -> int:
    """Ask the device, or on a CPU the system, for what is free now."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available


def reset_peak_memory(device: str) -> None:
    """Start counting anew; the host's peak cannot be reset."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> dict[str, float]:
    """Give the peaks since the last reset. Units: GiB; the host's since the process began."""
    peaks = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.startswith("cuda"):
        import torch

        peaks |= {
            "allocated_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return peaks


def add_graphs(peaks: dict[str, float]) -> None:
    """Count what CUDA graphs work in: their pools are held, and free in the allocator's eyes.

    In place, for a peak of runs that replay them: the allocator sees nothing of a replay.
    """
    import torch

    own = [s for s in torch.cuda.memory_snapshot() if tuple(s["segment_pool_id"]) != (0, 0)]
    unseen = sum(segment["total_size"] - segment["allocated_size"] for segment in own)
    peaks["allocated_peak_gib"] += unseen / 2**30


def weights_gib(pipeline) -> float:
    """Add up the storage of every parameter and buffer, each counted once. Units: GiB."""
    import torch

    storages = {}
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for tensor in (*part.parameters(), *part.buffers()):
                for plain in _plain_tensors(tensor):
                    storage = plain.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values()) / 2**30


def _plain_tensors(tensor) -> list:
    """Look into tensor subclasses such as torchao's float8: data and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in _plain_tensors(getattr(tensor, name))]

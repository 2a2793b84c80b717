"""Peak memory of a run, on the device and on the host."""


def reset_peak_memory(device: str) -> None:
    """Start counting anew; the host's peak cannot be reset."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()


def peak_memory(device: str) -> dict[str, float]:
    """Give the peaks since the last reset. Units: GiB; the host's since the process began."""
    import resource

    peaks = {"host_peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.startswith("cuda"):
        import torch

        peaks |= {
            "allocated_peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "reserved_peak_gib": torch.cuda.max_memory_reserved() / 2**30,
        }
    return peaks

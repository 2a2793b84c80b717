"""Where the time of one call goes: the kernels that take most of it, by what they do.

On a GPU the profiler's device events: kernels, copies, and the gaps in which no kernel runs. On a
CPU the operators' own time. Groups are told by name, so read the names beside them.
"""

from collections import defaultdict

TOP = 10
GROUPS = (  # the first match wins; names of cuBLAS, CUTLASS, cuDNN, Triton and ATen
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("quantisation", ("quant", "fp8_cast", "amax", "to_fp8")),
    ("convolution", ("fprop", "dgrad", "implicit", "winograd")),  # cuDNN's, named xmma ... gemm
    ("linear", ("gemm", "cutlass", "xmma", "nvjet", "matmul", "linear", "mm", "product")),
    ("convolution", ("conv",)),
    ("copies", ("memcpy", "memset", "copy", "cat", "contiguous", "clone")),
    ("norm and elementwise", ("",)),
)
# Inductor's passes; they bear the names of the products whose bias they add, but are none
PASSES = ("triton_poi", "triton_red", "triton_per")


def group_of(name: str) -> str:
    """Sort a kernel by its name."""
    name = name.lower()
    groups = (GROUPS[1], GROUPS[-1]) if name.startswith(PASSES) else GROUPS
    return next(group for group, words in groups if any(word in name for word in words))


def profile(run, device: str) -> tuple[dict[str, tuple[float, int]], float, float]:
    """Profile one call.

    Returns: kernel name -> (seconds, calls); seconds in which nothing ran on the device; seconds
        from the first to the last event.
    """
    import torch

    on_gpu = device.startswith("cuda")
    with torch.profiler.profile() as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    if not on_gpu:
        found = {
            event.key: (event.self_cpu_time_total / 1e6, event.count)
            for event in profiler.key_averages()
            if event.key.startswith(("aten::", "mkldnn::", "flash::", "graph"))
        }
        return found, 0.0, sum(seconds for seconds, _ in found.values())
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
    ]
    return summarise(spans)


def summarise(spans: list[tuple[str, float, float]]) -> tuple[dict, float, float]:
    """Add up kernels by name, and the gaps between them.

    Units: spans in microseconds, results in seconds.
    """
    kernels: dict[str, list] = defaultdict(lambda: [0.0, 0])
    idle, end = 0.0, None
    for name, begin, until in sorted(spans, key=lambda span: span[1]):
        kernels[name][0] += (until - begin) / 1e6
        kernels[name][1] += 1
        if end is not None and begin > end:
            idle += (begin - end) / 1e6
        end = until if end is None else max(end, until)
    first = min((begin for _, begin, _ in spans), default=0.0)
    total = (end - first) / 1e6 if spans else 0.0
    return {name: (seconds, calls) for name, (seconds, calls) in kernels.items()}, idle, total


def render(run, device: str) -> str:
    """Profile one call and write both tables: groups, and the ten kernels that take most time."""
    kernels, idle, total = profile(run, device)
    groups: dict[str, float] = defaultdict(float)
    for name, (seconds, _) in kernels.items():
        groups[group_of(name)] += seconds
    groups["idle gaps"] = idle
    lines = [f"kernels     one call of {1e3 * total:.2f} ms under the profiler"]
    for name, seconds in sorted(groups.items(), key=lambda item: -item[1]):
        lines.append(f"  {name:22s} {1e3 * seconds:9.2f} ms {100 * seconds / (total or 1):5.1f} %")
    lines.append(f"  the {TOP} that take most:")
    top = sorted(kernels.items(), key=lambda item: -item[1][0])[:TOP]
    for name, (seconds, calls) in top:
        lines.append(
            f"  {1e3 * seconds:9.2f} ms {100 * seconds / (total or 1):5.1f} % {calls:6d} x  "
            f"{group_of(name)}: {name[:90]}"
        )
    return "\n".join(lines)

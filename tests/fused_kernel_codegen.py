"""What Inductor writes for an H200 between FLUX.1's products, on a machine without one.

python -m tests.fused_kernel_codegen      prints one JSON line per place: kernels and bytes (MB)

Each place is traced in plain torch as diffusers, the attention processor and torchao write it, and
by our kernels; Inductor then generates its code for sm_90, which is read and never run. Bytes are
those of every kernel's arguments, once each, slices of a fused product as a third: a lower bound
for the plain code, whose reductions read a row several times. It is Inductor's private interface
and a pretended device: `bash results/gpu_session.sh fused-kernels` measures what this counts.
"""

import contextlib
import json
import math
import re
from types import SimpleNamespace
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb

from utils.kernels.flash_attention import quantize_heads
from utils.kernels.modulate import launch_gelu_quantize, launch_norm_modulate
from utils.kernels.norm_rope import launch_norm_rope
from utils.kernels.rotation import rotate_heads

TXT, IMG, H, D, C = 512, 4096, 24, 128, 3072  # FLUX.1-dev, 1024x1024, one image
ALL = TXT + IMG
TORCH = torch.__version__.partition("+")[0]  # another one fuses otherwise
SIZES = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


def torchao_rows(x):
    """Quantise as torchao's PerRow."""
    scale = (x.abs().amax(-1, keepdim=True) / 448).float()
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def plain_norm(x, y, gate, shift, scale):
    x = x + gate[:, None] * y
    out = F.layer_norm(x, (C,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    return x, *torchao_rows(out)


def fused_norm(x, y, gate, shift, scale):
    return launch_norm_modulate(x, shift, scale, y, gate, True)


def plain_gelu(mlp, attention):
    return torchao_rows(torch.cat([attention, F.gelu(mlp, approximate="tanh")], dim=2))


def _plain_heads(streams, norms, cos, sin, float8, rotate=False):
    parts = [[x.unflatten(-1, (H, D)) for x in stream.chunk(3, -1)] for stream in streams]
    for part, (norm_q, norm_k) in zip(parts, norms, strict=True):
        part[0] = F.rms_norm(part[0], (D,), norm_q, 1e-6)
        part[1] = F.rms_norm(part[1], (D,), norm_k, 1e-6)
    q, k, v = parts[0] if len(parts) == 1 else (torch.cat(x, 1) for x in zip(*parts, strict=True))
    q, k = (apply_rotary_emb(x, (cos, sin), sequence_dim=1) for x in (q, k))
    q, k = (rotate_heads(x.float()) for x in (q, k)) if rotate else (q, k)
    return [y for x in (q, k, v) for y in quantize_heads(x)] if float8 else [q, k, v]


def _fused_heads(streams, norms, cos, sin, float8, rotate=False):
    *txt, img = ([x.unflatten(-1, (H, D)) for x in stream.chunk(3, -1)] for stream in streams)
    weights = [x for pair in reversed(norms) for x in pair]
    return launch_norm_rope(img, txt[0] if txt else [], weights, cos, sin, 1e-6, float8, rotate)


def _double(run, *how):
    return lambda t, i, a, b, c, d, cos, sin: run((t, i), ((a, b), (c, d)), cos, sin, *how)


def _single(run, *how):
    return lambda i, a, b, cos, sin: run((i,), ((a, b),), cos, sin, *how)


ROW, WEIGHT = ((1, C), torch.bfloat16), ((D,), torch.bfloat16)
ANGLES = ((ALL, D), torch.float32)


def tokens(count: int, width: int) -> tuple:
    return (1, count, width), torch.bfloat16


NORM = [tokens(IMG, C), tokens(IMG, C), ROW, ROW, ROW]
DOUBLE = [tokens(TXT, 3 * C), tokens(IMG, 3 * C), *[WEIGHT] * 4, ANGLES, ANGLES]
SINGLE = [tokens(ALL, 3 * C), WEIGHT, WEIGHT, ANGLES, ANGLES]
PLACES = {  # name: inputs, plain, ours
    "norm + modulate, float8": (NORM, plain_norm, fused_norm),
    "GELU, float8": ([tokens(ALL, 4 * C), tokens(ALL, C)], plain_gelu, launch_gelu_quantize),
    "double block's heads, float8": (DOUBLE, _double(_plain_heads, 1), _double(_fused_heads, 1)),
    "single block's heads, float8": (SINGLE, _single(_plain_heads, 1), _single(_fused_heads, 1)),
    "double block's heads, rotated": (
        *(DOUBLE, _double(_plain_heads, 1, 1), _double(_fused_heads, 1, 1)),
    ),
    "single block's heads, rotated": (
        *(SINGLE, _single(_plain_heads, 1, 1), _single(_fused_heads, 1, 1)),
    ),
    "double block's heads, bf16": (DOUBLE, _double(_plain_heads, 0), _double(_fused_heads, 0)),
    "single block's heads, bf16": (SINGLE, _single(_plain_heads, 0), _single(_fused_heads, 0)),
}


def pretend_h200() -> None:
    """Let Inductor and Triton find an H200; nothing can run on it."""
    import torch._dynamo.device_interface as interface
    import triton
    from torch._inductor.fx_passes import fuse_attention
    from torch._subclasses import fake_tensor
    from triton.backends.compiler import GPUTarget

    properties = SimpleNamespace(
        name="H200",
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=140 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block_optin=232448,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )
    answers = {
        "is_available": True,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "current_device": 0,
        "device_count": 1,
        "_lazy_init": None,
        "synchronize": None,
    }
    for name, answer in answers.items():
        mock.patch.object(torch.cuda, name, lambda *_, answer=answer: answer).start()
    cuda = interface.CudaInterface
    for owner, name, answer in (
        (cuda.Worker, "get_device_properties", properties),
        (cuda.Worker, "current_device", 0),
        (cuda, "get_device_properties", properties),
        (cuda, "current_device", 0),
        (cuda, "is_available", True),
        (cuda, "get_compute_capability", 90),
    ):
        mock.patch.object(owner, name, staticmethod(lambda *_, answer=answer: answer)).start()
    mock.patch.object(fuse_attention, "_sfdp_init", lambda *_: None).start()  # allocates
    mock.patch.object(fake_tensor, "init_gpu_context", lambda *_: None).start()  # so does it
    target = GPUTarget("cuda", 90, 32)
    triton.runtime.driver.set_active(
        SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: 0)
    )


def _channels_last():
    """Let convolutions write as cuDNN does, which a torch without it does not know."""
    from torch._inductor import ir
    from torch._inductor.kernel import conv

    layout_of = conv.conv_layout

    def layout(*args, **kwargs):
        found = layout_of(*args, **kwargs)
        _, c, h, w = found.size
        strides = [c * h * w, 1, w * c, c]
        return ir.FixedLayout(found.device, found.dtype, found.size, strides)

    return mock.patch.object(conv, "conv_layout", layout)


def generate(run, inputs, on_cpu: bool, channels_last: bool = False) -> str:
    """Trace, lower for the pretended GPU and give the code.

    Plain code is traced on a CPU and moved, since some of torch's indexing asks for a real device.
    `channels_last`: convolutions in the layout in which cuDNN, absent here, would give them.
    """
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import post_grad_passes
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    with FakeTensorMode() as fake, torch._inductor.config.patch(compile_threads=1):
        made = [torch.empty(s, dtype=d, device="cpu" if on_cpu else "cuda") for s, d in inputs]
        graph = make_fx(run, decomposition_table=select_decomp_table())(*made)
        if on_cpu:
            for node in graph.graph.nodes:
                if "device" in node.kwargs:
                    node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
            made = [torch.empty(s, dtype=d, device="cuda") for s, d in inputs]
            FakeTensorProp(graph, fake).propagate(*made)
            with V.set_fake_mode(fake):
                post_grad_passes(graph, True)
        FakeTensorProp(graph, fake).propagate(*made)
        lowering = GraphLowering(graph, example_inputs=made, layout_opt=channels_last or None)
        handlers = V.set_graph_handler(lowering), V.set_fake_mode(fake)
        layouts = _channels_last() if channels_last else contextlib.nullcontext()
        with handlers[0], handlers[1], V.set_debug_handler(DebugContext()), layouts:
            lowering.run(*made)
            code = lowering.codegen()[0]
    return getattr(code, "value", code)


def split_arguments(text: str) -> list[str]:
    """Split a call's arguments at the commas that are in no bracket."""
    found, depth = [""], 0
    for letter in text.replace(", ", ","):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    return found


def count(code: str, inputs: list) -> tuple[int, int]:
    """Count the kernels that a call launches, and the bytes of their arguments, each view once."""
    call = code[code.index("def call(") :]
    names = re.search(r"(\w+(?:, \w+)*),? = args", call)[1].split(", ")
    size, item = {}, {}
    for name, (shape, dtype) in zip(names, inputs, strict=True):
        third = 3 if shape[-1] == 3 * C else 1
        item[name] = dtype.itemsize
        size[name] = math.prod(shape) * dtype.itemsize // third

    def size_of(argument: str) -> int:
        if not (view := re.match(r"reinterpret_tensor\((\w+),\(([^)]*)\)", argument)):
            return size.get(argument, 0)
        edges = map(int, view[2].rstrip(",").split(","))
        return min(size.get(view[1], 0), math.prod(edges) * item.get(view[1], 0))

    kernels = total = 0
    for line in map(str.strip, call.splitlines()):
        if found := re.match(r"(\w+) = empty_strided_cuda\((\([^)]*\)), .*torch\.(\w+)\)$", line):
            item[found[1]] = SIZES[found[3]]
            size[found[1]] = math.prod(json.loads("[" + found[2][1:-1].rstrip(", ") + "]"))
            size[found[1]] *= SIZES[found[3]]
        elif found := re.match(r"(\w+) = (?:reinterpret_tensor\()?(\w+)[;,]", line):
            size[found[1]] = size.get(found[2], 0)
            item[found[1]] = item.get(found[2], 0)
        elif found := re.match(r"assert_size_stride\((\w+), \(([^)]*)\), .*'torch.ops.flash", line):
            item[found[1]] = SIZES["bfloat16"]  # the attention's output
            size[found[1]] = math.prod(map(int, found[2].split(", "))) * SIZES["bfloat16"]
        elif found := re.match(r"\w+\.run\((.*)\)$", line):
            kernels += 1
            total += sum(map(size_of, {*split_arguments(found[1])}))
    return kernels, total


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_h200()
    for place, (inputs, plain, ours) in PLACES.items():
        row = {"torch": TORCH, "place": place}
        for who, run in (("inductor", plain), ("ours", ours)):
            code = generate(run, inputs, on_cpu=who == "inductor")
            row[f"{who}_kernels"], size = count(code, inputs)
            row[f"{who}_mb"] = round(size / 1e6)
        print(json.dumps(row), flush=True)

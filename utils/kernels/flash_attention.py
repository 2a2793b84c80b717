"""Attention as one opaque op, `flash::flash_attn_func`, and the fp8 quantiser in front of it.

Every kernel library (FlashAttention-2, -3 and -4, AITER, comfy-kitchen's int8, torch's own) is
called inside one custom op with a fake kernel and a CPU kernel. So the same graph traces on any
machine through torch.compile(fullgraph=True), torch.export and AOTI, although FA3's extension has
no fake kernel, its Python wrapper makes CUDA tensors in its own, and FA4 is Python that compiles a
kernel at its first call. The price: Inductor sees nothing of the inside and fuses nothing into it.
That is why the float8 quantiser stays outside, in plain torch ops that Inductor can fuse with what
comes before: on a CPU into one kernel, on a GPU into several. int8 quantises inside its kernel.

Layout: (batch, tokens, heads, head_dim) everywhere, any strides with a dense last dimension.
Backward: none. Inference only; calling backward() through the op raises.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from utils.kernels.int8_attention import int8_attention
from utils.steps import import_problem

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
# Smallest descale: still a normal fp32 number, with a finite reciprocal, on GPUs that flush
# subnormals to zero. Heads with an amax below 448 times this lose precision, never sign or sense.
TINY = torch.finfo(torch.float32).tiny

PINNED = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
PACKAGES = {  # import names: distribution names lie (PyPI's flash-attn-3 is empty)
    "fa3": ("fa3_fwd_interface", "flash_attn_interface"),
    "fa4": ("flash_attn.cute",),
    "fa2": ("flash_attn",),
    "aiter": ("aiter",),
    "int8": ("comfy_kitchen",),
}
BACKENDS = (*PACKAGES, *PINNED, "sdpa")  # "sdpa" is torch's own choice


class BackendError(Exception):
    """A backend's package cannot be used; the text says what was found."""


@dataclass(frozen=True)
class Kernel:
    """A loaded attention function: (q, k, v, q_descale, k_descale, v_descale) -> output."""

    package: str
    takes_fp8: bool
    call: Callable


def quantize_heads(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale every (batch, head) by its own largest magnitude and cast to float8 e4m3.

    RMSNorm's learned weights and V make some heads tens of times larger than others: one scale for
    all, or none, leaves the small ones a few bits. NaN and Inf come out as NaN, not as numbers.

    Shapes: x (B, S, H, D) any float dtype -> (B, S, H, D) float8_e4m3fn, descale (B, H) fp32,
        with x = x_fp8 * descale.
    """
    x = x.float()
    descale = (x.abs().amax(dim=(1, 3)) / E4M3_MAX).clamp(min=TINY)  # [B, H]
    return (x * descale.reciprocal()[:, None, :, None]).to(E4M3), descale


def dequantize_heads(x: torch.Tensor, descale: torch.Tensor) -> torch.Tensor:
    """Undo quantize_heads.

    Shapes: x (B, S, H, D) float8_e4m3fn, descale (B, H) fp32 -> (B, S, H, D) fp32
    """
    return x.float() * descale[:, None, :, None]


def _checked(q, k, v, q_descale, k_descale, v_descale, backend) -> bool:
    """Say whether the inputs are fp8; raise on what no kernel would notice."""
    if backend not in BACKENDS:
        raise ValueError(f"attention backend: got {backend!r}, expected one of {BACKENDS}")
    if q.dim() != 4 or k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[2:] != k.shape[2:]:
        raise ValueError(f"attention: got q {q.shape}, k {k.shape}, v {v.shape}: (B, S, H, D) each")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: got {q.dtype}, {k.dtype}, {v.dtype}; expected one dtype")
    fp8 = q.dtype == E4M3
    descales = (q_descale, k_descale, v_descale)
    if any((d is not None) != fp8 for d in descales):
        raise ValueError(f"attention: {q.dtype} inputs; descales go with float8_e4m3fn, all three")
    if fp8 and any(d.shape != (q.shape[0], q.shape[2]) for d in descales):
        raise ValueError(f"attention: descales must be (B, H), got {[d.shape for d in descales]}")
    return fp8


def _sdpa(q, k, v, pinned: SDPBackend | None = None) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
    if pinned is None:
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    with sdpa_kernel(pinned):  # raises if it cannot run: no silent fallback to another kernel
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@torch.library.custom_op("flash::flash_attn_func", mutates_args=(), device_types="cpu")
def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    backend: str = "sdpa",
) -> torch.Tensor:
    """Attend with the named backend; this body is the CPU kernel and takes any backend's name.

    It is exact for all that are but rounding, and int8's twin for int8, whose error is its own.

    Shapes: q (B, Sq, H, D), k, v (B, Sk, H, D): bf16, fp16, fp32, or float8_e4m3fn together with
        fp32 descales (B, H) -> (B, Sq, H, D) contiguous, bf16 for float8, else the inputs' dtype.
    Raises: ValueError on shapes, dtypes or descales that do not belong together.
    """
    if _checked(q, k, v, q_descale, k_descale, v_descale, backend):
        q = dequantize_heads(q, q_descale)
        k = dequantize_heads(k, k_descale)
        v = dequantize_heads(v, v_descale)
        return _sdpa(q, k, v).to(torch.bfloat16).contiguous()
    return (int8_attention if backend == "int8" else _sdpa)(q, k, v).contiguous()


@flash_attn_func.register_fake
def _fake(q, k, v, q_descale=None, k_descale=None, v_descale=None, backend="sdpa"):
    fp8 = _checked(q, k, v, q_descale, k_descale, v_descale, backend)
    return q.new_empty(q.shape, dtype=torch.bfloat16 if fp8 else q.dtype)


@flash_attn_func.register_kernel("cuda")
def _cuda(q, k, v, q_descale=None, k_descale=None, v_descale=None, backend="sdpa"):
    fp8 = _checked(q, k, v, q_descale, k_descale, v_descale, backend)
    if backend not in PACKAGES:
        if fp8:
            raise ValueError(f"attention: {backend} takes no float8 inputs; only fa3 does")
        return _sdpa(q, k, v, PINNED.get(backend)).contiguous()
    kernel = load(backend)
    if fp8 and not kernel.takes_fp8:
        raise ValueError(f"attention: {kernel.package} takes no descales; only fa3 does")
    # Hopper's copies need a dense last dimension; a chunk of a fused projection has one
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = kernel.call(q, k, v, q_descale, k_descale, v_descale)
    out = out if isinstance(out, torch.Tensor) else out[0]  # some versions add the log-sum-exp
    return out.contiguous()


@register_flop_formula(torch.ops.flash.flash_attn_func)
def attention_flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    """Count the two products, 2 FLOP per multiply-add; softmax and scaling are not counted.

    Shapes: q_shape (B, Sq, H, D), k_shape (B, Sk, H, D)
    """
    batch, queries, heads, head_dim = q_shape
    return 4 * batch * heads * queries * k_shape[1] * head_dim


def _fa3_fwd(module) -> Kernel:
    # The op itself: the wrapper's own fake kernel and autograd are of no use inside our op
    op = torch.ops.fa3_fwd.fwd.default
    takes = {argument.name for argument in op._schema.arguments}

    def call(q, k, v, q_descale, k_descale, v_descale):
        if q_descale is None:
            return op(q, k, v, num_splits=1)
        descales = {"q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
        return op(q, k, v, num_splits=1, **descales)

    return Kernel("fa3_fwd_interface", "q_descale" in takes, call)


def _function(name: str, module) -> Kernel:
    function = getattr(module, "flash_attn_func", None)
    if function is None:  # flash-attn-4 alone makes `flash_attn` importable, and empty
        raise BackendError(f"{name} has no flash_attn_func")

    def call(q, k, v, q_descale, k_descale, v_descale):
        if q_descale is None:
            return function(q, k, v)
        return function(q, k, v, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)

    # Only FA3 scales each head; AITER's float8 attention takes one scale for the whole tensor
    takes_fp8 = name in PACKAGES["fa3"] and "q_descale" in inspect.signature(function).parameters
    return Kernel(name, takes_fp8, call)


def _comfy_kitchen(module) -> Kernel:
    if not module.int8_attention_is_available():  # its extension is not loaded, or not for this GPU
        raise BackendError("comfy_kitchen has no int8 kernel for this GPU, CUDA or Python")

    def call(q, k, v, *_):  # its layout is (B, H, S, D), any strides
        return module.int8_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return Kernel("comfy_kitchen", False, call)


SPECIAL = {"fa3_fwd_interface": _fa3_fwd, "comfy_kitchen": _comfy_kitchen}


def find(backend: str) -> Kernel:
    """Import the package behind a backend and look at what its function takes.

    Raises: BackendError that says, for each package tried, whether it is missing, broken (with the
        import's error) or without the function.
    """
    found = []
    for name in PACKAGES[backend]:
        try:
            if problem := import_problem(name):
                raise BackendError(problem)
            module = sys.modules[name]
            return SPECIAL[name](module) if name in SPECIAL else _function(name, module)
        except (BackendError, AttributeError) as error:
            found.append(str(error))
    raise BackendError("; ".join(found))


load = functools.cache(find)  # in the hot path; check() uses find(), which looks again

"""Products of a GPU by their numbers on a CPU: torchao casts as there, sums are fp32 here.

Only its checks of the hardware are put aside, and products that a CPU lacks are made from the same
float8, MXFP8 or NVFP4 numbers, attention's second one from weights in float8. For pictures and
errors; times mean nothing.
"""

import warnings
from contextlib import contextmanager
from unittest import mock

import torch

from utils.kernels import flash_attention


@contextmanager
def float8():
    """Let torchao quantise to float8 on a CPU, whose products run through torch._scaled_mm."""
    from torchao.float8 import inference
    from torchao.quantization import quant_api

    with (
        mock.patch.object(quant_api, "_check_hardware_support", lambda granularity: None),
        mock.patch.object(inference, "_check_hardware_support", lambda granularity: None),
    ):
        yield


def _product(x, w, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, fast=False):
    out = (x.float() @ w.float()) * scale_a * scale_b
    return (out if bias is None else out + bias.float()).to(out_dtype)


@contextmanager
def products(where_refused: bool = False):
    """Multiply float8 in fp32: torch's own product on a CPU takes minutes for a picture.

    `where_refused`: only if that takes no scale per row (torch 2.11's does not).
    """
    x = torch.ones(16, 16).to(torch.float8_e4m3fn)
    scales = torch.ones(16, 1), torch.ones(1, 16)
    with torch.library._scoped_library("aten", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a kernel that is overridden: that is wanted
        try:
            torch._scaled_mm(x, x.t(), *scales, out_dtype=torch.bfloat16)
            refused = False
        except RuntimeError:
            refused = True
        if refused or not where_refused:
            library.impl("_scaled_mm", _product, "CPU")
        yield


@contextmanager
def blocks():
    """Let torchao quantise to MXFP8 and NVFP4 here, and multiply what it has quantised in fp32."""
    from torchao.prototype import mx_formats
    from torchao.prototype.mx_formats import inference_workflow, nvfp4_tensor
    from torchao.quantization.quantize_.common import KernelPreference

    def dispatch(a, b, op, bias=None):
        out = (a.dequantize(torch.float32) @ b.dequantize(torch.float32)).to(a.orig_dtype)
        return out if bias is None else out + bias

    name = "MXDynamicActivationMXWeightConfig"
    config = getattr(mx_formats, name)

    def emulated():
        return config(kernel_preference=KernelPreference.EMULATED)

    with (
        mock.patch.object(inference_workflow, "is_sm_at_least_100", lambda: True),
        mock.patch.object(nvfp4_tensor, "_addmm_nvfp4_dispatch", dispatch),
        mock.patch.object(mx_formats, name, emulated),
    ):
        yield


@contextmanager
def softmax():
    """Round attention's weights to e4m3 where Q, K and V are, as FlashAttention-3's kernel does.

    Its weights reach from 0 to 2**8, and their sum is that before the rounding; up to 224 keys, a
    tile of its own, the largest score is known before any weight. The op multiplies in fp32 what
    was float8, so a model in bf16 is told from it by that.
    Source: hopper/softmax.h of FlashAttention 3 (Max_offset)
    """
    plain = flash_attention._sdpa

    def attend(q, k, v, pinned=None):
        if q.dtype != torch.float32:
            return plain(q, k, v, pinned)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, H, S, D]
        scores = q @ k.mT * q.shape[-1] ** -0.5
        weights = (scores - scores.amax(dim=-1, keepdim=True)).exp() * 2**8
        out = weights.to(flash_attention.E4M3).float() @ v / weights.sum(dim=-1, keepdim=True)
        return out.transpose(1, 2)

    with mock.patch.object(flash_attention, "_sdpa", attend):
        yield

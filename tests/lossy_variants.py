"""Numbers that were tried and are not in the stack: other scales, parts of float8, other rotations.

Each is a context manager over (pipeline, args), entered once the steps are applied: it changes that
pipeline, which is used once, or what the pipeline calls. Numbers are rounded to e4m3 and back, and
multiplied in fp32, as in tests/emulation.py.
"""

import copy
import tempfile
from contextlib import contextmanager
from functools import partial, reduce
from unittest import mock

import torch

from utils import calibrate, calibrate_scales, quality, scales_file
from utils.kernels import attention_processor, flash_attention, norm_rope
from utils.kernels.flash_attention import E4M3, E4M3_MAX, TINY, dequantize_heads, quantize_heads
from utils.pipeline_utils import load_pipeline
from utils.steps import quant, static_scales

EXACT = flash_attention._sdpa  # emulation.softmax puts a rounding one in its place


def rounded(x: torch.Tensor, scale: torch.Tensor | float) -> torch.Tensor:
    """Round to e4m3 and back; what lies beyond 448 scales saturates. Shapes: fp32 -> the same"""
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float() * scale


def by_block(
    x: torch.Tensor, rows: int = 0, columns: int = 0, largest: float = E4M3_MAX
) -> torch.Tensor:
    """Round with a scale per block of so many rows and columns (0: all), in bf16 as torchao's.

    `largest`: what a block's largest magnitude becomes.
    Shapes: (R, C) fp32 -> the same
    """
    blocks = x.unflatten(1, (-1, columns or x.shape[1])).unflatten(0, (-1, rows or x.shape[0]))
    scale = (blocks.abs().amax((1, 3), keepdim=True) / largest).clamp(min=TINY)
    return rounded(blocks, scale.bfloat16().float()).reshape(x.shape)


by_row = partial(by_block, rows=1)


def _linears(pipeline) -> list[torch.nn.Linear]:
    """Find what step quant quantises."""
    names, _ = quant.select(pipeline.transformer, "row", "blocks")
    return [pipeline.transformer.get_submodule(name) for name in names]


def _replace(linear: torch.nn.Linear, weights, activations) -> None:
    """Let a Linear multiply what two functions of fp32 matrices make of its operands."""
    weight = weights(linear.weight.float())

    def forward(x):
        out = activations(x.flatten(0, -2).float()) @ weight.T
        out = out if linear.bias is None else out + linear.bias.float()
        return out.to(x.dtype).unflatten(0, x.shape[:-1])

    linear.forward = forward


@contextmanager
def linears(pipeline, args, *, activations, weights=by_row):
    """Put scales of another kind into the blocks' Linears."""
    for linear in _linears(pipeline):
        _replace(linear, weights, activations)
    yield


@contextmanager
def static(pipeline, args):
    """Scale each Linear's activations by one number, from the calibration's prompts and seeds."""
    largest = dict.fromkeys(_linears(pipeline), 0.0)

    def look(linear, inputs):
        largest[linear] = max(largest[linear], float(inputs[0].abs().amax()))

    hooks = [linear.register_forward_pre_hook(look) for linear in largest]
    seen = copy.copy(args)
    seen.seed += calibrate.SEED
    quality.run(pipeline, seen, calibrate.prompts_of(args))
    for hook in hooks:
        hook.remove()
    for linear, most in largest.items():
        _replace(linear, by_row, partial(rounded, scale=most / E4M3_MAX))
    yield


@contextmanager
def behind_gelu(pipeline, args):
    """Do as step static_scales, whose file is made before."""
    plain, seen = load_pipeline(args), copy.copy(args)
    seen.seed += calibrate.SEED
    names = static_scales.select(plain.transformer)
    with calibrate_scales.largest_inputs(plain.transformer, names) as largest:
        quality.run(plain, seen, calibrate.prompts_of(args))
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        file.write(scales_file.dump(scales_file.ScalesFile(largest, args.ckpt, "", {})))
        file.flush()
        args.static_scales = file.name
        static_scales.apply(pipeline, args)
    yield


@contextmanager
def attention(pipeline, args, *, parts: tuple[str, ...]):
    """Round only these of attention's q, k, v and softmax to float8."""

    def attend(*heads, backend):
        named = zip("qkv", heads, strict=True)
        q, k, v = (
            dequantize_heads(*quantize_heads(x)) if n in parts else x.float() for n, x in named
        )
        product = flash_attention._sdpa if "softmax" in parts else EXACT
        return product(q, k, v).to(torch.bfloat16)

    with mock.patch.object(attention_processor, "flash_attn_func", attend):
        yield


def mixed(x: torch.Tensor, channels: int, apart: int) -> torch.Tensor:
    """Turn groups of channels, so far apart, by a Hadamard matrix. Shapes: (..., D) -> the same"""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    matrix = reduce(torch.kron, [pair] * (channels.bit_length() - 1), torch.ones(1, 1))
    return (matrix @ x.unflatten(-1, (-1, channels, apart))).flatten(-3) * channels**-0.5


@contextmanager
def rotation(pipeline, args, *, channels: int, apart: int):
    """Turn Q and K by another matrix than utils/kernels/rotation.py."""
    turn = partial(mixed, channels=channels, apart=apart)
    with mock.patch.object(norm_rope, "rotate_heads", turn):
        yield

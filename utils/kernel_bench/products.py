"""The transformer's linear layers: every way to multiply in float8, beside bf16.

A variant is one line of VARIANTS: how the operands are cast, and a function of them. Its error is
that of the product alone, against fp64 of the operands that it was given, on some rows; its loss
that against the operands before they were cast.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F

from utils.kernel_bench.trial import Case, Setting, Trial, Unavailable, compiled, relative_l2
from utils.kernels import float8_product
from utils.kernels.flash_attention import E4M3, E4M3_MAX, TINY
from utils.kernels.modulate import quantize_rows
from utils.random_weights import OUTLIER_SCALE, OUTLIERS
from utils.steps import persistent_tma, quant, triton_float8

BLOCK = 128  # of blockwise scales
CHECKED_ROWS = 64
# Relative L2: one rounding to bf16, or two; Hopper's fast accumulation keeps some 14 bits and is
# allowed what one cast to e4m3 loses
EXACT, FAST = 4e-3, 0.026


@dataclass(frozen=True)
class Shape:
    """x (M, K) times the weight (N, K) of one layer."""

    name: str
    m: int
    n: int
    k: int
    is_key: bool = False  # large enough to decide about a kernel that takes long to compile


def shapes(setting: Setting) -> list[Shape]:
    """List the layers of both kinds of block; `joint` is a single block's QKV and MLP in one."""
    full = setting.is_full
    d = 3072 if full else 64
    double = {"qkv": (3 * d, d), "out": (d, d), "up": (4 * d, d), "down": (d, 4 * d)}
    single = {"qkv": (3 * d, d), "up": (4 * d, d), "joint": (7 * d, d), "out": (d, 5 * d)}
    both = (4608, 4352, 8704) if full else (16,)  # text and image tokens: Dev, Schnell, Kontext
    streams = (("image", 4096), ("text", 512), ("text", 256)) if full else (("image", 16),)
    found = [
        Shape(f"single-{name}-{m}", m, n, k, m == both[0])
        for m in both
        for name, (n, k) in single.items()
    ]
    found += [
        Shape(f"{stream}-{name}-{m}", m, n, k, (stream, name) == ("image", "down"))
        for stream, m in streams
        for name, (n, k) in double.items()
    ]
    return found


def none(x: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Leave an operand as it is."""
    return x, None


def per_row(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast with one scale per row. Shapes: (M, K) -> e4m3, (M, 1)"""
    return quantize_rows(x)


def per_tensor(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast with one scale. Shapes: (M, K) -> e4m3, ()"""
    scale = (x.float().abs().amax() / E4M3_MAX).clamp(min=TINY)
    return (x.float() / scale).to(E4M3), scale


def per_block(x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cast with one scale per `rows` x 128 elements.

    Shapes: (M, K) -> e4m3, (M / rows, K / 128)
    """
    parts = x.float().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, rows))  # [M/r, r, K/128, 128]
    scale = (parts.abs().amax(dim=(1, 3), keepdim=True) / E4M3_MAX).clamp(min=TINY)
    scales = scale[:, 0, :, 0]
    if rows == 1:  # the product wants them along the rows
        scales = scales.t().contiguous().t()
    return (parts / scale).to(E4M3).flatten(2, 3).flatten(0, 1), scales


# name -> casts of x and of the weight
CASTS: dict[str, tuple[Callable, Callable]] = {
    "none": (none, none),
    "row": (per_row, per_row),
    "one": (per_row, per_row),  # the numbers alone: whoever reads the product applies the scales
    "tensor": (per_tensor, per_tensor),
    "block": (partial(per_block, rows=1), partial(per_block, rows=BLOCK)),
}


def dequantize(x: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """Undo a cast, in fp64. Shapes: (M, K), scale of any cast -> (M, K)"""
    x = x.double()
    if scale is None:
        return x
    if scale.dim() == 2 and scale.shape[1] > 1:
        rows = x.shape[0] // scale.shape[0]
        scale = scale.repeat_interleave(rows, 0).repeat_interleave(BLOCK, 1)
    return x * scale.double()


def plain(x, x_scale, w, w_scale, bias, one) -> torch.Tensor:
    """Multiply in bf16."""
    return F.linear(x, w, bias)


def scaled(x, x_scale, w, w_scale, bias, one, fast=True, with_bias=True) -> torch.Tensor:
    """Multiply by torch's float8 product, with the scales as the casts gave them."""
    return torch._scaled_mm(
        x,
        w.t(),
        scale_a=x_scale,
        scale_b=w_scale.t(),
        bias=bias if with_bias else None,
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def bare(x, x_scale, w, w_scale, bias, one, with_bias=True) -> torch.Tensor:
    """Multiply the float8 numbers with scale 1: what deferred scales leave to the product."""
    return scaled(x, one, w, one, bias, one, with_bias=with_bias)


def deferred(x, x_scale, w, w_scale, bias, one) -> torch.Tensor:
    """Multiply with scale 1; scales and bias follow, for a compiler to put where it likes."""
    out = bare(x, x_scale, w, w_scale, bias, one, with_bias=False).float()
    return (out * x_scale * w_scale.t() + bias.float()).to(torch.bfloat16)


def then_bias(x, x_scale, w, w_scale, bias, one) -> torch.Tensor:
    """Do as step persistent_tma: the bias is an addition of its own."""
    return scaled(x, x_scale, w, w_scale, bias, one, with_bias=False) + bias


def own(x, x_scale, w, w_scale, bias, one, tile=None) -> torch.Tensor:
    """Multiply by the Triton kernel of step triton_float8, in its own choice of tile or another."""
    run = float8_product.launch_float8_product
    return run(x[None], x_scale[None], w, w_scale, bias, tile=tile)[0]


@dataclass(frozen=True)
class Variant:
    """One way to compute x w^T + bias.

    `run` takes x (M, K), its scale, w (N, K), its scale, bias (N,), a one () -> (M, N) bf16.
    """

    cast: str  # of CASTS
    run: Callable
    bound: float = EXACT
    has_bias: bool = True
    options: dict | None = None  # of Inductor: run is compiled, and on key shapes only
    key_only: bool = False  # seconds of compilation a shape
    lacking: Callable = field(default=lambda machine: "")  # beside float8 itself


TMA = {"triton.enable_persistent_tma_matmul": True}
VARIANTS: dict[str, Variant] = {
    "bf16": Variant("none", plain),
    "row": Variant("row", scaled, FAST),
    "row-nobias": Variant("row", partial(scaled, with_bias=False), FAST, has_bias=False),
    "row-exact": Variant("row", partial(scaled, fast=False)),
    "tensor": Variant("tensor", scaled, FAST),
    "tensor-nobias": Variant("tensor", partial(scaled, with_bias=False), FAST, has_bias=False),
    "tensor-exact": Variant("tensor", partial(scaled, fast=False)),
    "one": Variant("one", bare, FAST),
    "one-nobias": Variant("one", partial(bare, with_bias=False), FAST, has_bias=False),
    "block-nobias": Variant(
        "block", partial(scaled, fast=False, with_bias=False), has_bias=False,
        lacking=persistent_tma.lacking,  # Hopper too
    ),
    "row-inductor": Variant("row", scaled, FAST, options={}),
    "row-inductor-tma": Variant("row", then_bias, FAST, options=TMA),
    "deferred-inductor": Variant("row", deferred, FAST, options={}),
    "triton": Variant("row", own, FAST, lacking=triton_float8.lacking),
} | {
    f"triton-{tile[0]}x{tile[1]}": Variant(
        "row", partial(own, tile=tile), FAST, key_only=True, lacking=triton_float8.lacking
    )
    for tile in float8_product.TILES
}  # fmt: skip


def operands(setting: Setting, shape: Shape, seed: int) -> tuple[torch.Tensor, ...]:
    """Draw x with channels that stand out, the weight and the bias, in bf16."""
    x = setting.randn(shape.m, shape.k, seed=3 * seed)
    x[:, OUTLIERS // 2 % shape.k :: OUTLIERS] *= OUTLIER_SCALE
    w = setting.randn(shape.n, shape.k, seed=3 * seed + 1) * shape.k**-0.5
    return x, w, setting.randn(shape.n, seed=3 * seed + 2)


def draw(setting: Setting, shape: Shape, cast: str, seed: int) -> tuple:
    """Give a variant's arguments."""
    x, w, bias = operands(setting, shape, seed)
    cast_x, cast_w = CASTS[cast]
    return *cast_x(x), *cast_w(w), bias, torch.ones((), device=x.device)


def check(setting: Setting, shape: Shape, variant: Variant, out, inputs: tuple) -> dict:
    """Compare some rows with both truths; with scale 1 there is nothing to lose against."""
    rows = torch.arange(0, shape.m, max(1, shape.m // CHECKED_ROWS), device=out.device)
    x, x_scale, w, w_scale, bias, _ = inputs
    bias = bias.double() if variant.has_bias else 0.0
    if variant.cast == "one":
        x_scale = w_scale = None
    given = dequantize(x, x_scale)[rows] @ dequantize(w, w_scale).t() + bias
    found = {"error": relative_l2(out[rows], given)}
    if variant.cast != "one":
        x, w, _ = operands(setting, shape, 0)
        found["loss"] = relative_l2(out[rows], x[rows].double() @ w.double().t() + bias)
    return found


def make(setting: Setting, shape: Shape, variant: Variant) -> Trial:
    """Prepare one variant at one shape."""
    is_float8 = variant.cast != "none"
    lacking = (is_float8 and setting.is_full and quant.lacking(setting.machine)) or variant.lacking(
        setting.machine
    )
    if lacking:
        raise Unavailable(lacking)
    run = variant.run
    if variant.options is not None:
        run = compiled(setting, run, **variant.options)
    return Trial(
        run=run,
        draw=partial(draw, setting, shape, variant.cast),
        check=partial(check, setting, shape, variant),
        bound=variant.bound,
        flop=2 * shape.m * shape.n * shape.k,
        dtype="fp8" if is_float8 else "bf16",
    )


def cases(setting: Setting) -> list[Case]:
    """List every variant at every shape; compiled ones at the key shapes."""
    return [
        Case(
            f"product/{shape.name}/{name}",
            partial(make, setting, shape, variant),
            compiles=variant.options is not None,
        )
        for shape in shapes(setting)
        for name, variant in VARIANTS.items()
        if shape.is_key or (variant.options is None and not variant.key_only)
    ]

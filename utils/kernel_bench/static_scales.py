"""What static activation scales could bring: GELU and the cast to float8 inside of the product.

A row's scale is known when all of the row is, so GELU's output is stored in bf16 and read again: in
a single block of Dev 226 MB more than the float8 numbers alone. With one scale that was fixed
beforehand the cast can stand in the product's epilogue, if a kernel with an epilogue is as fast as
the library's without. Both ways begin with a float8 input and end with one. `static-kernel` is the
product of step static_scales.
"""

from functools import partial

import torch
import torch.nn.functional as F

from utils.kernel_bench import products
from utils.kernel_bench.between import FP8_BOUND
from utils.kernel_bench.trial import Case, Setting, Trial, Unavailable, compiled, relative_l2
from utils.kernels import float8_gelu, modulate
from utils.kernels.flash_attention import E4M3, E4M3_MAX
from utils.steps import fused_kernels, quant, triton_float8


def by_row(quantize, x, x_scale, w, w_scale, bias, one, out_scale) -> tuple:
    """Multiply, then GELU and one scale per row. Shapes: -> (1, M, N) e4m3, (1, M, 1)"""
    return quantize(products.scaled(x, x_scale, w, w_scale, bias, one)[None])


def static(x, x_scale, w, w_scale, bias, one, out_scale) -> tuple:
    """Multiply and do all else in one expression. Shapes: out_scale (2,) -> (M, N) e4m3, ()"""
    out = products.bare(x, x_scale, w, w_scale, bias, one, with_bias=False).float()
    out = F.gelu(out * (x_scale * w_scale.t()) + bias.float(), approximate="tanh")
    return (out * out_scale[1]).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3), out_scale[0]


def own(x, x_scale, w, w_scale, bias, one, out_scale) -> tuple:
    """Do all of it by our kernel. Shapes: out_scale (2,) -> (M, N) e4m3, ()"""
    out = float8_gelu.float8_gelu(x[None], x_scale[None], w, w_scale, bias, out_scale)
    return out[0], out_scale[0]


VARIANTS = {  # name -> the input's cast, what runs, Inductor's options or None
    "row-kernel": (products.per_row, partial(by_row, modulate.gelu_quantize), None),
    "row-inductor": (products.per_row, partial(by_row, modulate.plain_gelu_quantize), {}),
    "static-kernel": (products.per_row, own, None),
    "static-inductor": (products.per_tensor, static, {}),
    "static-inductor-tma": (products.per_tensor, static, products.TMA),
}


def truth(x, x_scale, w, w_scale, bias) -> torch.Tensor:
    """Compute gelu(x w' + bias) of the operands as they were cast. Shapes: (M, N) fp32"""
    out = (x.float() * x_scale) @ (w.float() * w_scale).t() + bias.float()
    return F.gelu(out, approximate="tanh")


def draw(setting: Setting, shape: products.Shape, cast, seed: int) -> tuple:
    """Give the arguments; the output's scale is what a perfect calibration would find."""
    x, w, bias = products.operands(setting, shape, seed)
    operands = *cast(x), *products.per_row(w), bias
    out_scale = truth(*operands).abs().amax().item() / E4M3_MAX
    return *operands, torch.ones((), device=x.device), float8_gelu.static_scale(out_scale, x.device)


def check(outputs: tuple, inputs: tuple) -> dict:
    """Give the error of the float8 output."""
    values, scale = outputs
    return {"error": relative_l2(values.float().squeeze(0) * scale.squeeze(0), truth(*inputs[:5]))}


def make(setting: Setting, shape: products.Shape, variant: str) -> Trial:
    """Prepare one way at one shape."""
    cast, run, options = VARIANTS[variant]
    reason = setting.is_full and quant.lacking(setting.machine)
    if options is None:
        step = triton_float8 if run is own else fused_kernels
        reason = reason or step.lacking(setting.machine)
    if reason:
        raise Unavailable(f"{variant}: {reason}")
    return Trial(
        run=run if options is None else compiled(setting, run, **options),
        draw=partial(draw, setting, shape, cast),
        check=check,
        bound=FP8_BOUND,
        flop=2 * shape.m * shape.n * shape.k,
        dtype="fp8",
    )


def cases(setting: Setting) -> list[Case]:
    """List every way for the first half of a single block's MLP."""
    shape = next(s for s in products.shapes(setting) if s.name.startswith("single-up-"))
    return [
        Case(
            f"static/{shape.name}/{name}", partial(make, setting, shape, name), options is not None
        )
        for name, (_, _, options) in VARIANTS.items()
    ]

"""What stands between the products: our Triton kernels, and what the compiler makes of their twins.

The twin in fp32, without a cast, is the truth. GELU's has none, so that is written here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from utils.kernel_bench.trial import Case, Setting, Trial, Unavailable, compiled, relative_l2
from utils.kernels import modulate, norm_rope
from utils.steps import fused_kernels

BF16_BOUND, FP8_BOUND = 2**-8, 0.05
EPS = 1e-6


@dataclass(frozen=True)
class Place:
    """One place in a block: inputs, kernel, twin and truth."""

    name: str
    draw: Callable[[int], tuple]
    kernel: Callable
    twin: Callable
    truth: Callable  # of the same inputs -> the outputs' values in fp32, in order
    values: Callable  # outputs of kernel or twin -> the same
    bound: float


def _fp32(tree):
    return torch.utils._pytree.tree_map(lambda x: x.float(), tree)


def _rows(outputs) -> list[torch.Tensor]:
    """Give the values of [..., e4m3, row scale]."""
    *others, values, scale = outputs
    return [*others, values.float() * scale]


def _heads(outputs) -> list[torch.Tensor]:
    """Give the values of Q, K and V, cast by head or not."""
    if len(outputs) < 6:
        return list(outputs)
    descales = [descale[:, None, :, None] for descale in outputs[3:]]
    return [x.float() * descale for x, descale in zip(outputs[:3], descales, strict=True)]


def true_norm_modulate(x, shift, scale, y=None, gate=None) -> list[torch.Tensor]:
    """Add, normalise and modulate in fp32; what is normalised has been rounded to bf16."""
    if y is None:
        return modulate.plain_norm_modulate(*_fp32((x, shift, scale)))
    hidden = modulate.plain_norm_modulate(x, shift, scale, y, gate)[0]
    return [hidden, *modulate.plain_norm_modulate(*_fp32((hidden, shift, scale)))]


def true_gelu(mlp, attention=None) -> list[torch.Tensor]:
    """Compute [attention, gelu(mlp)] in fp32."""
    out = F.gelu(mlp.float(), approximate="tanh")
    return [out if attention is None else torch.cat([attention.float(), out], dim=-1)]


def true_norm_rope(img, txt, norms, cos, sin, rotate=False) -> list[torch.Tensor]:
    """Normalise and turn in fp32."""
    img, txt, norms = _fp32((img, txt, norms))
    outputs = norm_rope.plain_norm_rope(img, txt, norms, cos, sin, EPS, rotate=rotate)
    return outputs if txt else [*outputs, img[2]]  # V, which only a cast would touch


def places(setting: Setting) -> list[Place]:
    """List the places of both kinds of block; what a fused product gave is a slice of it."""
    full = setting.is_full
    width, heads, head_dim = (3072, 24, 128) if full else (128, 2, 64)
    single, image = (4608, 4096) if full else (24, 16)
    text = single - image

    def rows(tokens: int, columns: int, seed: int) -> torch.Tensor:
        return setting.randn(1, tokens, columns, seed=seed)

    def norm(tokens: int, residual: bool, seed: int) -> tuple:
        shift, scale, gate = rows(1, 3 * width, 10 * seed)[0].chunk(3, dim=1)
        x = rows(tokens, width, 10 * seed + 1)
        return (x, shift, scale, *((rows(tokens, width, 10 * seed + 2), gate) if residual else ()))

    def gelu(tokens: int, joined: bool, seed: int) -> tuple:
        mlp = rows(tokens, 4 * width, 10 * seed)
        return (mlp, rows(tokens, width, 10 * seed + 1)) if joined else (mlp,)

    def rope(image: int, text: int, seed: int) -> tuple:
        streams = []
        for k, tokens in enumerate((image, text)):
            fused = rows(max(tokens, 1), 3 * width, 10 * seed + k)
            streams.append([x.unflatten(-1, (heads, head_dim)) for x in fused.chunk(3, dim=-1)])
        norms = [setting.randn(head_dim, seed=k).exp() for k in range(4 if text else 2)]
        angle = setting.randn(image + text, head_dim // 2, dtype=torch.float32)
        angle = angle.repeat_interleave(2, 1)
        return streams[0], streams[1] if text else [], norms, angle.cos(), angle.sin()

    def norm_place(name: str, tokens: int, residual: bool) -> Place:
        return Place(
            name,
            partial(norm, tokens, residual),
            partial(modulate.norm_modulate, float8=True),
            partial(modulate.plain_norm_modulate, float8=True),
            true_norm_modulate,
            _rows,
            FP8_BOUND,
        )

    def gelu_place(name: str, tokens: int, joined: bool) -> Place:
        return Place(
            name,
            partial(gelu, tokens, joined),
            modulate.gelu_quantize,
            modulate.plain_gelu_quantize,
            true_gelu,
            _rows,
            FP8_BOUND,
        )

    def rope_place(name: str, image: int, text: int, float8: bool, rotate=False) -> Place:
        how = {"eps": EPS, "float8": float8, "rotate": rotate}
        return Place(
            name,
            partial(rope, image, text),
            partial(norm_rope.norm_rope, **how),
            partial(norm_rope.plain_norm_rope, **how),
            partial(true_norm_rope, rotate=rotate),
            _heads,
            FP8_BOUND if float8 else BF16_BOUND,
        )

    return [
        norm_place(f"norm-modulate-{single}", single, residual=False),
        norm_place(f"residual-norm-modulate-{image}", image, residual=True),
        gelu_place(f"attention-gelu-{single}", single, joined=True),
        gelu_place(f"gelu-{image}", image, joined=False),
        rope_place(f"norm-rope-fp8-{single}", single, 0, float8=True),
        rope_place(f"norm-rope-fp8-{text}+{image}", image, text, float8=True),
        rope_place(f"norm-rope-rotated-{text}+{image}", image, text, float8=True, rotate=True),
        rope_place(f"norm-rope-bf16-{text}+{image}", image, text, float8=False),
    ]


def check(place: Place, outputs, inputs: tuple) -> dict:
    """Give the worst error of the outputs."""
    pairs = zip(place.values(outputs), place.truth(*inputs), strict=True)
    return {"error": max(relative_l2(found, truth) for found, truth in pairs)}


def make(setting: Setting, place: Place, variant: str) -> Trial:
    """Prepare one of the two ways at one place."""
    if variant == "kernel" and (reason := fused_kernels.lacking(setting.machine)):
        raise Unavailable(f"kernel: {reason}")
    return Trial(
        run=place.kernel if variant == "kernel" else compiled(setting, place.twin),
        draw=place.draw,
        check=partial(check, place),
        bound=place.bound,
    )


def cases(setting: Setting) -> list[Case]:
    """List both ways at every place."""
    return [
        Case(f"between/{place.name}/{variant}", partial(make, setting, place, variant), compiles)
        for place in places(setting)
        for variant, compiles in (("kernel", False), ("inductor", True))
    ]

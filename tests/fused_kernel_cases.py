"""Inputs and fp64 truth for the fused kernels, and their run under Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.fused_kernel_cases      prints one JSON line per case

The interpreter is chosen when Triton is imported, so it needs a process of its own. It truncates
fp32 to bf16 and gets about 2 % of its float8 casts wrong; here both go through torch instead.
"""

import json

import torch

from tests.test_attention import head_errors
from utils.kernels import modulate, norm_rope
from utils.kernels.rotation import rotate_heads

KINDS = ("random", "large", "tiny", "constant", "outliers")
ROWS = [(1, 5, 256), (2, 7, 3072), (3, 1, 200)]  # B, S, D; the last is no power of two, nor of 16
HEADS = [(1, 0, 5, 2), (2, 3, 5, 3), (2, 7, 1, 24)]  # B, T, S, H; heads of 128
# Worst row or head: one rounding to bf16 (measured up to 0.0033), and to e4m3 (up to 0.044)
BF16_TOLERANCE, FP8_TOLERANCE = 2**-8, 0.05
# Q and K below RMSNorm's eps are small against the bound that sets their scale: half of e4m3's
# smallest step, 2**-10 * sqrt(128) / 448 of the largest weight
TINY_TOLERANCE = 2**-15
TIES = 1e-3  # fraction of values that may differ from the twin's: sums of another order


def rows(kind: str, shape, seed: int = 0, device: str = "cpu") -> torch.Tensor:
    """Make (B, S, D) in bf16 of one kind."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "large":
        x = x * 1e4
    elif kind == "tiny":
        x = x * 1e-6
    elif kind == "constant":
        x = torch.full(shape, 0.37)
    elif kind == "outliers":  # some channels far out, and rows of very different size
        x[..., ::37] *= 300
        x = x * torch.logspace(-3, 3, shape[1])[None, :, None]
    return x.bfloat16().to(device)


def in_two(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Part (B, S, D) into image and text tokens, slices of two tensors with other strides."""
    count = (x.shape[1] + 2) // 3
    text = torch.cat([x[:, :count], torch.full_like(x, 7)], dim=1)[:, :count]
    image = torch.cat([torch.full_like(x[:, :1], 7), x[:, count:]], dim=1)[:, 1:]
    return image, text


def vectors(batch: int, width: int, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    """Make gate, shift and scale as chunk() gives them: slices of one row per image."""
    row = torch.randn(batch, 3 * width, generator=torch.Generator().manual_seed(9))
    return row.bfloat16().to(device).chunk(3, dim=1)


def heads(kind: str, case, device: str = "cpu", seed: int = 0) -> tuple:
    """Make norm_rope's arguments, both streams as slices of fused products."""
    batch, txt_tokens, img_tokens, count = case
    streams = []
    for tokens, stream in ((img_tokens, 1), (txt_tokens, 2)):
        fused = rows(kind, (batch, max(tokens, 1), 3 * count * 128), 3 * seed + stream, device)
        streams.append([x.unflatten(-1, (count, 128)) for x in fused.chunk(3, dim=-1)])
    img, txt = streams[0], streams[1] if txt_tokens else []
    generator = torch.Generator().manual_seed(3 * seed)
    norms = torch.randn(4 if txt else 2, 128, generator=generator).exp().bfloat16().to(device)
    angle = torch.randn(txt_tokens + img_tokens, 64, generator=generator).repeat_interleave(2, 1)
    return img, txt, list(norms), angle.cos().to(device), angle.sin().to(device), 1e-6


def true_norm_modulate(x, shift, scale, y=None, gate=None) -> torch.Tensor:
    """LayerNorm and modulation of the stored x, in fp64."""
    if y is not None:
        x = (x.double() + gate.double()[:, None] * y.double()).to(x.dtype)
    x = x.double()
    x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return x * (1 + scale.double()[:, None]) + shift.double()[:, None]


def true_gelu(mlp, attention=None) -> torch.Tensor:
    """[attention, gelu(mlp)] in fp64."""
    x = mlp.double()
    x = 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return x if attention is None else torch.cat([attention.double(), x], dim=-1)


def true_norm_rope(img, txt, norms, cos, sin, eps) -> list[torch.Tensor]:
    """Give Q, K and V of all tokens in fp64."""
    outputs = []
    for i in range(3):
        parts = []
        for tensors, weights in ((txt, norms[2:]), (img, norms[:2])):
            if not tensors:
                continue
            x = tensors[i].double()
            if i < 2:
                x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weights[i].double()
            parts.append(x)
        x = torch.cat(parts, dim=1)
        if i < 2:
            turned = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
            x = x * cos.double()[None, :, None] + turned * sin.double()[None, :, None]
        outputs.append(x)
    return outputs


def tolerance(found: dict) -> float:
    """Give the bound on a case's error."""
    if not found["float8"]:
        return BF16_TOLERANCE
    bounded = found["kernel"] in ("norm_rope q", "norm_rope k")
    return TINY_TOLERANCE if bounded and found["kind"] == "tiny" else FP8_TOLERANCE


def row_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Worst relative error of a row."""
    error, size = (found.double() - truth).norm(dim=-1), truth.norm(dim=-1)
    return (error / size.clamp(min=1e-30)).max().item()


def differing(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Fraction of values that differ."""
    return (found.float() != expected.float()).double().mean().item()


def of_rows(kind: str, shape, run=modulate.launch_norm_modulate, device="cpu") -> list[dict]:
    """Compare norm_modulate in its six variants with the truth and with the twin."""
    x, y = rows(kind, shape, 0, device), rows("random", shape, 1, device)
    gate, shift, scale = vectors(shape[0], shape[2], device)
    found = []
    about = {"kernel": "norm_modulate", "kind": kind}
    image, text = in_two(x)
    for residual, given, front in (((), x, None), ((y, gate), x, None), ((), image, text)):
        truth = true_norm_modulate(x, shift, scale, *residual)
        for float8 in (False, True):
            inputs = given, shift, scale, *(residual or (None, None)), float8, front
            outputs, twins = run(*inputs), modulate.plain_norm_modulate(*inputs)
            if residual:
                ((hidden, *outputs), (expected, *twins)) = outputs, twins
                assert differing(hidden, expected) < TIES  # a GPU multiplies and adds at once
            found.append(about | _compare(outputs, twins, truth, float8))
    return found


def of_gelu(kind: str, shape, run=modulate.launch_gelu_quantize, device="cpu") -> list[dict]:
    """Compare gelu_quantize with and without attention."""
    mlp, attention = rows(kind, shape, 0, device), rows("random", (*shape[:2], 72), 1, device)
    found = []
    for inputs in ((mlp, None), (mlp, attention)):
        outputs, twins = run(*inputs), modulate.plain_gelu_quantize(*inputs)
        scores = _compare(outputs, twins, true_gelu(*inputs), True)
        found.append({"kernel": "gelu_quantize", "kind": kind} | scores)
    return found


def _compare(outputs, twins, truth, float8) -> dict:
    out = outputs[0].float() * outputs[1] if float8 else outputs[0]
    if float8:
        torch.testing.assert_close(outputs[1], twins[1], rtol=2**-7, atol=0)  # a tie in bf16
    return {
        "float8": float8,
        "error": row_error(out, truth),
        "differs": differing(outputs[0], twins[0]),
    }


def of_heads(kind: str, case, run=norm_rope.launch_norm_rope, device="cpu") -> list[dict]:
    """Compare norm_rope, each head by itself: bf16, float8, and float8 behind the rotation."""
    inputs, found = heads(kind, case, device), []
    for float8, rotate in ((False, False), (True, False), (True, True)):
        truth = true_norm_rope(*inputs)
        truth[:2] = [rotate_heads(x) for x in truth[:2]] if rotate else truth[:2]
        outputs = run(*inputs, float8, rotate)
        twins = norm_rope.plain_norm_rope(*inputs, float8, rotate)
        values = outputs[:3]
        if float8:
            pairs = zip(values, outputs[3:], strict=True)
            values = [x.float() * descale[:, None, :, None] for x, descale in pairs]
            for descale, expected in zip(outputs[3:], twins[3:], strict=True):
                torch.testing.assert_close(descale, expected, rtol=1e-5, atol=0)
        for i, (name, value) in enumerate(zip("qkv", values, strict=False)):
            error = max(head_errors(value, truth[i]))
            if float8 and kind == "tiny" and i < 2:
                largest = torch.stack(inputs[2][i::2]).abs().max().item()
                beyond = (value.double() - truth[i]).abs() - truth[i].abs() / 16
                error = beyond.max().item() / largest
            found.append(
                {
                    "kernel": f"norm_rope {name}",
                    "kind": kind,
                    "float8": float8,
                    "rotate": rotate,
                    "error": error,
                    "differs": differing(outputs[i], twins[i]),
                }
            )
    return found


def exact_casts() -> None:
    """Give Triton's interpreter torch's rounding; float8 saturates as on a GPU."""
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    kinds = {tl.bfloat16: torch.bfloat16, tl.float8e4nv: torch.float8_e4m3fn}
    kinds[tl.float16] = torch.float16  # which the interpreter multiplies float8 in

    def convert(data, source, target, rounding):
        x = torch.from_numpy(np.ascontiguousarray(data))
        x = x.view(kinds.get(source, torch.float32)).float()
        if target == tl.float8e4nv:
            x = x.clamp(-448, 448)
        bits = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}
        x = x.to(kinds.get(target, torch.float32))
        return x.view(bits[x.element_size()]).numpy()

    interpreter._convert_float = convert
    for module in (modulate, norm_rope):
        module.wrap_triton = lambda kernel: kernel


if __name__ == "__main__":
    torch.set_num_threads(1)
    exact_casts()
    for case_of, cases in ((of_rows, ROWS), (of_gelu, ROWS), (of_heads, HEADS)):
        for case in cases:
            for kind in KINDS:
                for found in case_of(kind, case):
                    print(json.dumps({"case": case, **found}), flush=True)

"""Q3_K, Q4_K, Q5_K and Q6_K of a matrix, which the gguf package can only read.

python -m tests.k_quants tiny-schnell Q4_K FILE.gguf writes a checkpoint's transformer.

A superblock of 256 numbers has parts with integer scales of their own, which share one fp16 scale.
Scales come from each part's largest number, without llama.cpp's search for better ones, so the
errors are upper bounds. What a field means is in gguf.quants' `dequantize_blocks`; tests decode
with that.

Source: github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block_q3_K to block_q6_K)
"""

from pathlib import Path

import numpy as np

from utils.errors import run_script

SUPER = 256


def _ratio(a, b):
    return np.divide(
        a, b, out=np.zeros(np.broadcast_shapes(a.shape, b.shape), np.float32), where=b != 0
    )


def _signed(x, parts: int, top: int, scale_top: int):
    """Round to signed integers, `parts` scales each.

    Shapes: x (n, 256) -> q (n, parts, 256 / parts) in [-top, top - 1]; scales (n, parts);
        d (n, 1) fp16
    """
    x = x.reshape(len(x), parts, -1)
    at = np.abs(x).argmax(-1, keepdims=True)
    extreme = np.take_along_axis(x, at, -1)[..., 0]  # its sign makes -top the best used integer
    wanted = extreme / -top
    d = _ratio(np.abs(wanted).max(-1, keepdims=True), np.float32([[scale_top]])).astype(np.float16)
    scales = np.clip(np.rint(_ratio(wanted, d.astype(np.float32))), -scale_top, scale_top - 1)
    step = (d.astype(np.float32) * scales)[..., None]
    q = np.clip(np.rint(_ratio(x, step)), -top, top - 1)
    return q.astype(np.int8), scales.astype(np.int8), d


def _unsigned(x, top: int):
    """Round to 0..top above a minimum, eight parts of 32.

    Shapes: x (n, 256) -> q (n, 8, 32) uint8; scales, minima (n, 8) uint8; d, dmin (n, 1) fp16
    """
    x = x.reshape(len(x), 8, 32)
    low = np.minimum(x.min(-1), 0)
    wanted = (x.max(-1) - low) / top
    d = (wanted.max(-1, keepdims=True) / 63).astype(np.float16)
    dmin = (-low.min(-1, keepdims=True) / 63).astype(np.float16)
    scales = np.clip(np.rint(_ratio(wanted, d.astype(np.float32))), 0, 63)
    minima = np.clip(np.rint(_ratio(-low, dmin.astype(np.float32))), 0, 63)
    step = (d.astype(np.float32) * scales)[..., None]
    offset = (dmin.astype(np.float32) * minima)[..., None]
    q = np.clip(np.rint(_ratio(x + offset, step)), 0, top).astype(np.uint8)
    return q, scales.astype(np.uint8), minima.astype(np.uint8), d, dmin


def _bytes(*parts) -> np.ndarray:
    return np.concatenate([p.reshape(len(p), -1).view(np.uint8) for p in parts], axis=1)


def _six_bits(scales, minima) -> np.ndarray:
    """Pack eight scales and eight minima of 6 bits into 12 bytes."""
    low = (scales[:, :4] & 63) | (scales[:, 4:] >> 4 << 6)
    mid = (minima[:, :4] & 63) | (minima[:, 4:] >> 4 << 6)
    return np.concatenate([low, mid, (scales[:, 4:] & 15) | (minima[:, 4:] & 15) << 4], axis=1)


def _nibbles(q) -> np.ndarray:
    """Pack (n, 8, 32): two rows of 32 share 32 bytes, the first in the low halves."""
    return q[:, 0::2] | q[:, 1::2] << 4


def q6_k(x: np.ndarray) -> np.ndarray:
    """Encode. Shapes: (n, 256) fp32 -> (n, 210) uint8"""
    q, scales, d = _signed(x, 16, 32, 128)
    q = (q + 32).astype(np.uint8).reshape(len(x), 2, 4, 32)  # halves of 128, quarters of 32
    low, high = q & 15, q >> 4
    ql = np.concatenate([low[:, :, :2] | low[:, :, 2:] << 4], axis=-1)
    qh = high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6
    return _bytes(ql, qh, scales, d)


def q5_k(x: np.ndarray) -> np.ndarray:
    """Encode. Shapes: (n, 256) fp32 -> (n, 176) uint8"""
    q, scales, minima, d, dmin = _unsigned(x, 31)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    high = np.bitwise_or.reduce(q >> 4 << bits, axis=1)
    return _bytes(d, dmin, _six_bits(scales, minima), high, _nibbles(q & 15))


def q4_k(x: np.ndarray) -> np.ndarray:
    """Encode. Shapes: (n, 256) fp32 -> (n, 144) uint8"""
    q, scales, minima, d, dmin = _unsigned(x, 15)
    return _bytes(d, dmin, _six_bits(scales, minima), _nibbles(q))


def q3_k(x: np.ndarray) -> np.ndarray:
    """Encode. Shapes: (n, 256) fp32 -> (n, 110) uint8"""
    q, scales, d = _signed(x, 16, 4, 32)
    q = (q + 4).astype(np.uint8).reshape(len(x), 8, 32)
    bits = np.arange(8, dtype=np.uint8)[:, None]
    mask = np.bitwise_or.reduce(q >> 2 << bits, axis=1)
    low = (q & 3).reshape(len(x), 2, 4, 32)
    qs = low[:, :, 0] | low[:, :, 1] << 2 | low[:, :, 2] << 4 | low[:, :, 3] << 6
    s = (scales + 32).astype(np.uint8)
    lower = (s[:, :8] & 15) | (s[:, 8:] & 15) << 4
    top = s.reshape(len(x), 4, 4) >> 4
    upper = top[:, 0] | top[:, 1] << 2 | top[:, 2] << 4 | top[:, 3] << 6
    return _bytes(mask, qs, lower, upper, d)


KINDS = {"Q6_K": q6_k, "Q5_K": q5_k, "Q4_K": q4_k, "Q3_K": q3_k}


def encode(matrix: np.ndarray, kind: str) -> np.ndarray:
    """Encode a matrix. Shapes: (rows, columns) fp32, columns divisible by 256 -> (rows, bytes)"""
    blocks = KINDS[kind](np.ascontiguousarray(matrix, np.float32).reshape(-1, SUPER))
    return blocks.reshape(len(matrix), -1)


def main(argv: list[str] | None = None) -> None:
    """Parse, write, and say how many tensors there are of each type."""
    from extras.write_gguf import transformer_folder, write
    from utils.benchmark_utils import Parser

    parser = Parser(description="Write a checkpoint's transformer as a GGUF file of K-quants.")
    parser.add_argument("ckpt", help="bundled name or folder")
    parser.add_argument("type", choices=KINDS, help="of the matrices")
    parser.add_argument("file", type=Path, help="name ending in .gguf")
    args = parser.parse_args(argv)
    print(write(transformer_folder(args.ckpt), args.file, args.type, encode))


if __name__ == "__main__":
    run_script(main)

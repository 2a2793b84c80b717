"""A float8 product of our own: rows and columns scaled, bias, gate and residual in one kernel.

`flux::float8_product` is a candidate beside torch._scaled_mm and Inductor's template. One program
on each multiprocessor works through the tiles, loads them through Hopper's tensor memory
accelerator, multiplies e4m3 with fp32 sums (the tensor core's own, fast ones) and writes bf16 after
one rounding. A block's last product ends in x + gate * product, which costs a pass of its own
elsewhere; here x is read where the tile is written. An MLP's first product can end in GELU and
the cast to float8, where the scale is known beforehand (utils/kernels/float8_gelu.py).

The descriptors are made in the kernel: those of the host do not pass through a traced triton_op
(torch 2.11 to 2.13). They lie in scratch memory, which Inductor provides, or eager code below.

A triton_op with a CPU twin, as in utils/kernels/modulate.py. Backward: none. Inference only.
"""

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton

# Tile: rows, columns, warps, stages. All fit sm_90's registers and 227 KiB of shared memory
TILES = ((128, 256, 8, 4), (128, 128, 8, 4), (64, 128, 4, 5))
BLOCK_K, GROUP = 128, 8  # columns of a step; rows of tiles that stay together, for the L2 cache


def choose_tile(rows: int, columns: int, programs: int) -> tuple[int, int, int, int]:
    """Give the tile with which the busiest multiprocessor loads least.

    A tile loads its height and its width in every step, and without clusters that share loads they
    bound the kernel, not the tensor cores. (Triton 3.6 and 3.7 write no multicast for Hopper:
    num_ctas=2 loads twice, or fails to compile.) So the largest tile wins, unless it leaves
    multiprocessors without work.
    """

    def loads(tile) -> int:
        height, width, *_ = tile
        return -(-(-(-rows // height) * -(-columns // width)) // programs) * (height + width)

    return min(TILES, key=loads)


def plain_float8_product(
    x, x_scale, weight, weight_scale, bias=None, residual=None, gate=None, front=None
) -> torch.Tensor:
    """Do what `float8_product` does, in torch."""
    x_scale = x_scale if x_scale.dim() == 3 else x_scale[0]
    out = (x.float() @ weight.float().t()) * x_scale * weight_scale.t()
    if bias is not None:
        out = out + bias.float()
    if residual is not None:
        residual = residual if front is None else torch.cat([front, residual], dim=1)
        out = residual.float() + gate[:, None].float() * out
    return out.bfloat16()


@triton.jit
def scaled_gelu(x, factor):
    """Compute factor * GELU(x), by the GPU's own instruction for tanh.

    Nothing hides an epilogue: the warps that end a tile begin the next. By exp and a division this
    took 11 instructions and 2 slow ones a number, by tanh 5 and 1. Its tanh errs by 2**-11.
    """
    u = x * (0.7978845608028654 + 0.035677408136300125 * x * x)
    tanh = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1
    )
    half = x * (0.5 * factor)
    return half + half * tanh


@triton.jit
def float8_product_kernel(
    x_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    front_ptr,
    gate_ptr,
    out_scale_ptr,
    out_ptr,
    count,  # rows
    tokens,  # rows of an image
    front_tokens,  # of them, whose residual stands in front
    residual_batch,  # strides
    front_batch,
    gate_batch,
    N: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,  # columns of the output
    FIRST: tl.constexpr,  # where the product's own begin
    ROW_SCALES: tl.constexpr,  # of x; else it has one scale
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GELU: tl.constexpr,  # and the cast to float8
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Compute every num_programs-th tile, from program_id on; flattened, tiles overlap."""
    x = tl.make_tensor_descriptor(x_ptr, [count, K], [K, 1], [BLOCK_M, BLOCK_K])
    weight = tl.make_tensor_descriptor(weight_ptr, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    down, across = tl.cdiv(count, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * across) * GROUP
        height = tl.minimum(down - first, GROUP)
        place = tile % (GROUP * across)
        row, column = (first + place % height) * BLOCK_M, place // height * BLOCK_N
        out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            out = tl.dot(x.load([row, k]), weight.load([column, k]).T, out)
        rows = row + tl.arange(0, BLOCK_M)
        if ROW_SCALES:
            scale = tl.load(x_scale_ptr + rows, rows < count, 0.0)
        else:
            scale = tl.full((BLOCK_M,), 0.0, tl.float32) + tl.load(x_scale_ptr)
        # Half a tile at a time: whole ones spill registers
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(out, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        for side in tl.static_range(2):
            columns = column + side * HALF + tl.arange(0, HALF)
            within = columns < N
            column_scale = tl.load(weight_scale_ptr + columns, within, 0.0)
            half = (left if side == 0 else right) * scale[:, None] * column_scale[None, :]
            if BIAS:
                half += tl.load(bias_ptr + columns, within, 0.0).to(tl.float32)[None, :]
            inside = (rows < count)[:, None] & within[None, :]
            at = rows.to(tl.int64)[:, None] * WIDTH + FIRST + columns[None, :]
            if RESIDUAL:
                image, token = (rows // tokens).to(tl.int64), rows % tokens
                gate_at = gate_ptr + (image * gate_batch)[:, None] + columns[None, :]
                gate = tl.load(gate_at, inside, 0.0).to(tl.float32)
                before = tl.where(
                    token < front_tokens,
                    front_ptr + image * front_batch + token * N,
                    residual_ptr + image * residual_batch + (token - front_tokens) * N,
                )
                before = tl.load(before[:, None] + columns[None, :], inside, 0.0).to(tl.float32)
                half = before + gate * half
            if GELU:  # the cast saturates, NaN stays NaN
                half = scaled_gelu(half, tl.load(out_scale_ptr + 1))
            tl.store(out_ptr + at, half.to(out_ptr.dtype.element_ty), inside)


def _scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _rows(x: torch.Tensor) -> torch.Tensor:
    """Give a tensor whose rows follow each other within an image. Shapes: (B, S, N) -> the same"""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def launch_float8_product(
    x,
    x_scale,
    weight,
    weight_scale,
    bias=None,
    residual=None,
    gate=None,
    front=None,
    programs=None,
    tile=None,
) -> torch.Tensor:
    """Do what `float8_product` does, by its kernel.

    By default on one program a multiprocessor, in tiles of choose_tile().
    """
    out = x.new_empty((*x.shape[:2], int(weight.shape[0])), dtype=torch.bfloat16)
    end = None
    if residual is not None:
        residual = _rows(residual)
        end = residual, residual if front is None else _rows(front), gate
    return launch_into(out, x, x_scale, weight, weight_scale, bias, end, None, 0, programs, tile)


def launch_into(
    out,
    x,
    x_scale,
    weight,
    weight_scale,
    bias,
    end=None,
    gelu=None,
    first=0,
    programs=None,
    tile=None,
) -> torch.Tensor:
    """Write the product into `out` (B, S, W), from column `first` on, and give it back.

    `end`: residual, what stands in front of it (or the residual again) and gate; `gelu`: the static
    scale of gelu(product) in float8, as (scale, inverse).
    """
    residual, front, gate = end or (weight_scale,) * 3  # unread where there is none
    if programs is None:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
        triton.set_allocator(_scratch)
    columns, inner = map(int, weight.shape)  # constants of the kernel, never symbols
    batch, tokens = x.shape[:2]
    count = batch * tokens
    # Of a size that the compiler leaves open nothing may be asked
    known = isinstance(count, int)
    tile = tile or (choose_tile(count, columns, programs) if known else TILES[0])
    height, width, warps, stages = tile
    wrap_triton(float8_product_kernel)[(programs,)](
        x.contiguous(),
        x_scale.contiguous(),
        weight,
        weight_scale.contiguous(),
        weight_scale if bias is None else bias,
        residual,
        front,
        gate,
        weight_scale if gelu is None else gelu,
        out,
        count,
        tokens,
        0 if front is residual else front.shape[1],
        residual.stride(0),
        front.stride(0),
        gate.stride(0),
        N=columns,
        K=inner,
        WIDTH=int(out.shape[2]),
        FIRST=first,
        ROW_SCALES=x_scale.dim() == 3,
        BIAS=bias is not None,
        RESIDUAL=end is not None,
        GELU=gelu is not None,
        BLOCK_M=height,
        BLOCK_N=width,
        BLOCK_K=BLOCK_K,
        GROUP=GROUP,
        num_warps=warps,
        num_stages=stages,
    )
    return out


def _check(x, x_scale, weight, weight_scale, bias, residual, gate, front) -> None:
    batch, tokens, inner = x.shape
    columns = weight.shape[0]
    ok = weight.shape[1] == inner and weight.is_contiguous() and inner % 16 == 0
    ok = ok and tuple(x_scale.shape) in ((batch, tokens, 1), (2,))
    ok = ok and weight_scale.shape == (columns, 1)
    ok = ok and (bias is None or bias.shape == (columns,)) and (residual is None) == (gate is None)
    ok = ok and (front is None or residual is not None)
    if ok and residual is not None:
        front_tokens = 0 if front is None else front.shape[1]
        ok = tuple(residual.shape) == (batch, tokens - front_tokens, columns)
        ok = ok and (front is None or front.shape[::2] == residual.shape[::2])
        ok = ok and tuple(gate.shape) == (batch, columns) and gate.stride(1) == 1
    if not ok:
        given = (x, x_scale, weight, weight_scale, bias, residual, gate, front)
        found = [None if tensor is None else tuple(tensor.shape) for tensor in given]
        raise ValueError(f"float8_product: shapes that do not belong together: {found}")


@triton_op("flux::float8_product", mutates_args=())
def float8_product(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    front: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute y = x_scale * weight_scale * (x @ weight') + bias, or residual + gate * y.

    The residual may be in two parts, [front, residual] along the tokens.

    Shapes: x (B, S, K), weight (N, K), both float8_e4m3fn; x_scale (B, S, 1), or (2,) for a static
        scale and its inverse, weight_scale (N, 1) fp32; bias (N,), residual (B, S - T, N), front
        (B, T, N), gate (B, N) bf16 -> (B, S, N) bf16
    Raises: ValueError on shapes that do not belong together, and K no multiple of 16.
    """
    given = x, x_scale, weight, weight_scale, bias, residual, gate, front
    _check(*given)
    return (launch_float8_product if x.is_cuda else plain_float8_product)(*given)

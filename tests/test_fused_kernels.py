"""The fused kernels: interpreted and compiled for sm_90, their twins in whole transformers.

On a GPU: tests/test_fused_kernels_gpu.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import fused_kernel_cases as cases
from tests.flux_pieces import (
    inputs,
    relative_error,
    stepped,
    traced_and_exported,
    transformer,
)
from utils.kernels import modulate, norm_rope
from utils.kernels.flash_attention import flash_attn_func, quantize_heads
from utils.steps import fa3, fused_kernels, fused_projections, quant

ROOT = Path(__file__).resolve().parent.parent
FEW = {"text": 3, "height": 1, "width": 5}  # tokens: torch's float8 product on a CPU is a slow one


def lines_of(module: str, **variables: str) -> list[dict]:
    """Run a module that prints JSON lines, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def interpreted() -> list[dict]:
    """Run every case under Triton's interpreter."""
    return lines_of("tests.fused_kernel_cases", TRITON_INTERPRET="1")


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.parametrize("name", ["norm_modulate", "gelu_quantize", "norm_rope"])
def test_interpreted_kernels_against_truth_and_twin(name, kind, interpreted):
    chosen = [x for x in interpreted if x["kernel"].startswith(name) and x["kind"] == kind]
    assert len(chosen) == {"norm_modulate": 18, "gelu_quantize": 6, "norm_rope": 26}[name]
    for found in chosen:
        assert found["error"] < cases.tolerance(found), found
        assert found["differs"] < cases.TIES, found


NORM, GELU = modulate.norm_modulate_kernel, modulate.gelu_quantize_kernel
ROPE, CAST = norm_rope.norm_rope_kernel, norm_rope.cast_heads_kernel
FULL_HEADS = {"H": 24, "D": 128, "HEADS": norm_rope.heads_at_a_time(24)}
FULL_MLP = {"D_MLP": 12288, "BLOCK_MLP": 16384}
COMPILED = [  # kernel, constants at FLUX.1's size, warps, most registers (measured)
    (NORM, {"D": 3072, "BLOCK": 4096, "RESIDUAL": False, "FLOAT8": False}, 8, 48),  # 40
    (NORM, {"D": 3072, "BLOCK": 4096, "RESIDUAL": True, "FLOAT8": True}, 8, 56),  # 48
    (GELU, {**FULL_MLP, "D_ATTENTION": 0, "BLOCK_ATTENTION": 1}, 16, 64),  # 50
    (GELU, {**FULL_MLP, "D_ATTENTION": 3072, "BLOCK_ATTENTION": 4096}, 16, 72),  # 64
    (ROPE, {**FULL_HEADS, "TEXT": True, "FLOAT8": False, "ROTATE": False}, 4, 72),  # 62
    (ROPE, {**FULL_HEADS, "TEXT": True, "FLOAT8": True, "ROTATE": False}, 4, 72),  # 63
    (ROPE, {**FULL_HEADS, "TEXT": False, "FLOAT8": True, "ROTATE": False}, 4, 64),  # 56
    (ROPE, {**FULL_HEADS, "TEXT": True, "FLOAT8": True, "ROTATE": True}, 4, 72),  # 64
    (CAST, {**FULL_HEADS, "TEXT": True}, 4, 32),  # 23
]


def signature(kernel, constants: dict) -> tuple[dict, dict]:
    """Give the types of a kernel's arguments in bf16, and which are multiples of 16."""
    float8 = constants.get("FLOAT8", kernel in (GELU, CAST))
    out = "*fp8e4nv" if float8 else "*bf16"
    known = {"eps": "fp32", "bound": "fp32", "cos_ptr": "*fp32", "sin_ptr": "*fp32"}
    known |= {"row_scale_ptr": "*fp32", "descale_ptr": "*fp32", "out_ptr": out}
    known |= {"q_descale_ptr": "*fp32", "k_descale_ptr": "*fp32", "q_out_ptr": out}
    known |= {"k_out_ptr": out, "v_out_ptr": "*fp32" if float8 else "*bf16"}
    types, multiples = {}, {}
    for i, name in enumerate(kernel.arg_names):
        default = "*bf16" if name.endswith("_ptr") else "i32"
        types[name] = "constexpr" if name in constants else known.get(name, default)
        strides = types[name] == "i32" and not name.endswith("tokens")
        if types[name].startswith("*") or strides:
            multiples[(i,)] = [["tt.divisibility", 16]]
    return types, multiples


@pytest.mark.parametrize(("kernel", "constants", "warps", "registers"), COMPILED)
def test_compiled_for_hopper_without_spills(kernel, constants, warps, registers, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types, multiples = signature(kernel, constants)
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, at, multiples)
    target = GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps})
    ptx = tmp_path / "kernel.ptx"
    ptx.write_text(compiled.asm["ptx"])
    assert "ld.global.v4" in compiled.asm["ptx"]  # 16 bytes at a time
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    command = [ptxas, "-v", "-arch=sm_90a", ptx, "-o", tmp_path / "kernel.cubin"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}, said
    assert int(re.search(r"Used (\d+) registers", said)[1]) <= registers, said


def test_the_committed_counts_are_what_the_page_says():
    text = (ROOT / "results" / "kernels" / "fused-kernel-codegen.jsonl").read_text()
    rows, page = map(json.loads, text.splitlines()), (ROOT / "docs/performance.md").read_text()
    cells = {}  # of a place: what Inductor of each torch does, and what our kernels do
    for row in rows:
        counted = [f"{row[f'{who}_kernels']}, {row[f'{who}_mb']}" for who in ("inductor", "ours")]
        cells.setdefault(row["place"], []).append(counted)
    names = {"norm + modulate, float8", "GELU, float8", "double block's heads, bf16"}
    names |= {f"{kind} block's heads, float8" for kind in ("double", "single")}
    for name in names:
        (new, ours), (old, the_same) = cells[name]
        assert ours == the_same and f"| {new} | {old} | {ours} |" in page, name


@pytest.mark.slow
def test_heads_take_fewer_kernels_and_bytes_than_inductors_own_code():
    rows = {row["place"]: row for row in lines_of("tests.fused_kernel_codegen")}
    for place, least in (
        ("double block's heads, float8", 4),
        ("single block's heads, float8", 2.5),
    ):
        row = rows[place]
        assert row["ours_kernels"] == 4 and row["inductor_kernels"] >= 10, row  # 16 and 10
        assert row["inductor_mb"] > least * row["ours_mb"], row  # 672 and 472 against 161
    for place in ("norm + modulate, float8", "GELU, float8", "double block's heads, bf16"):
        assert rows[place]["ours_mb"] <= rows[place]["inductor_mb"], rows[place]
        assert rows[place]["ours_kernels"] == 1, rows[place]


def ready(
    dtype=torch.bfloat16,
    float8=False,
    fused=True,
    kernels=True,
    float8_attention=True,
    device="cpu",
):
    """Give a transformer with every structural step, the fused kernels on or off."""
    attention = "fp8" if float8 and float8_attention else "bf16"
    steps = [fused_projections] * fused + [fa3] + [fused_kernels] * kernels + [quant] * float8
    return stepped(steps, dtype, float8, attention, device)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_fused_blocks_equal_diffusers(fused, batch):
    call = inputs(batch, dtype=torch.float32)
    truth = transformer(torch.float32)(**call)[0]
    model = ready(torch.float32, fused=fused)
    assert relative_error(model(**call)[0], truth) < 1e-6  # measured 0
    call = inputs(batch)
    eager = relative_error(transformer()(**call)[0], truth)
    found = relative_error(ready(fused=fused)(**call)[0], truth)
    assert found < 1.25 * eager  # measured 0.95 and 1.002


@pytest.mark.parametrize("fused", [False, True])
def test_float8_is_no_worse_than_torchaos_own(fused, float8_on_cpu):
    truth = transformer(torch.float32)(**inputs(2, **FEW, dtype=torch.float32))[0]
    call = inputs(2, **FEW)
    found, own = (
        relative_error(ready(float8=True, fused=fused, kernels=kernels)(**call)[0], truth)
        for kernels in (True, False)
    )
    assert found < 1.1 * own  # measured 0.0211 and 0.0219


def test_a_bound_is_as_good_a_scale_as_the_largest_value():
    """Attention in float8 with Q's and K's scale from the norms' weights, against amax."""
    ratios = []
    for seed in range(8):
        given = cases.heads("random", (1, 7, 65, 4), seed=seed)
        q, k, v = cases.true_norm_rope(*given)
        truth = flash_attn_func(q, k, v)
        pairs = [quantize_heads(x) for x in (q, k, v)]
        by_amax = flash_attn_func(*(x for x, _ in pairs), *(scale for _, scale in pairs))
        by_bound = flash_attn_func(*norm_rope.norm_rope(*given, True))
        ratios.append(relative_error(by_bound, truth) / relative_error(by_amax, truth))
    assert sum(ratios) / len(ratios) < 1.05, ratios  # measured 1.00 on average, 0.84 to 1.08


def test_zeros_stay_zeros_and_nan_is_not_hidden():
    x = torch.zeros(1, 3, 64, dtype=torch.bfloat16)
    x[0, 1] = 1.0
    x[0, 2, 5] = float("nan")
    for run in (modulate.quantize_rows, modulate.gelu_quantize):
        values, scale = run(x)
        back = values.float() * scale
        assert back[0, 0].eq(0).all() and back[0, 1].isfinite().all()
        assert back[0, 2].isnan().any()


def test_opcheck():
    row, x = cases.vectors(2, 64), cases.rows("random", (2, 3, 64))
    rope = cases.heads("random", (1, 3, 5, 2))
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for op, arguments in (
        ("norm_modulate", (x, *row[1:])),
        ("norm_modulate", (x, *row[1:], x + 1, row[0], True)),
        ("norm_modulate", (x, *row[1:], None, None, True, x[:, :2])),
        ("gelu_quantize", (x, x[..., :16].contiguous())),
        ("norm_rope", rope),
        ("norm_rope", (*rope, True)),
        ("norm_rope", (*rope, True, True)),
    ):
        operator = getattr(torch.ops.flux, op).default
        torch.library.opcheck(operator, arguments, test_utils=utilities)


def test_ops_refuse_what_no_kernel_would_notice():
    (gate, shift, scale), x = cases.vectors(2, 64), cases.rows("random", (2, 3, 64))
    img, txt, norms, cos, sin, eps = cases.heads("random", (1, 3, 5, 2))
    for op, arguments in (
        (modulate.norm_modulate, (x, shift[:1], scale)),
        (modulate.norm_modulate, (x, shift, scale[:, :1])),
        (modulate.norm_modulate, (x, shift, scale, x)),
        (modulate.norm_modulate, (x, shift, scale, x[:, :1], gate)),
        (modulate.norm_modulate, (x, shift, scale, x, gate, False, x)),
        (modulate.norm_modulate, (x, shift, scale, None, None, False, x[:1])),
        (modulate.gelu_quantize, (x, x[:, :1])),
        (norm_rope.norm_rope, (img[:2], txt, norms, cos, sin, eps)),
        (norm_rope.norm_rope, (img, [x[:, :, :1] for x in txt], norms, cos, sin, eps)),
        (norm_rope.norm_rope, (img, txt, norms[:2], cos, sin, eps)),
        (norm_rope.norm_rope, (img, txt, norms, cos[1:], sin[1:], eps)),
    ):
        with pytest.raises(ValueError, match=op._name):
            op(*arguments)


@pytest.mark.parametrize("float8", [False, True])
def test_traces_whole_and_exports(float8, float8_on_cpu):
    names = traced_and_exported(ready(float8=float8), inputs(2, **FEW), 1e-6)
    counts = {op: names.count(f"flux.{op}.default") for op in ("norm_modulate", "norm_rope")}
    assert counts == {"norm_modulate": 6, "norm_rope": 3}  # 2 x 2 + 2, one in each block
    assert names.count("flux.gelu_quantize.default") == 4 * float8
    assert names.count("aten._scaled_mm.default") == 14 * float8


def test_blocks_compile_once_for_all_of_a_kind():
    model, call = ready(), inputs(**FEW)
    expected = model(**call)[0]
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        assert relative_error(model(**call)[0], expected) < 1e-6
    assert counter.frame_count <= 3  # the second single block gets slices of the first's output


@pytest.mark.slow
def test_a_compiled_double_block():
    """About a minute of C++ compilation on an idle machine; aot_eager above covers the graph."""
    model, call = ready(), inputs(**FEW)
    block = model.transformer_blocks[0]
    truth, expected = (m(**call)[0] for m in (transformer(), model))
    torch._dynamo.reset()
    block.compile(fullgraph=True)
    with torch.no_grad():
        found = relative_error(model(**call)[0], truth)
    assert found < 2 * max(relative_error(expected, truth), 5e-3)

"""The float8 product: interpreted, compiled for sm_90, in Linears, blocks and Inductor's code."""

import re
import subprocess
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, optimized
from test_fused_kernels import lines_of

from tests import float8_product_cases as cases
from tests.flux_pieces import inputs, relative_error, stepped, transformer
from utils import quality
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels import float8_product
from utils.kernels.float8_linear import TritonFloat8Linear
from utils.kernels.float8_product import TILES, choose_tile
from utils.steps import fa3, fused_kernels, fused_mlp, fused_projections, quant, triton_float8

FEW = {"text": 3, "height": 1, "width": 5}
H200 = Machine("cuda", "NVIDIA H200", (9, 0))
SHARED = 232448  # bytes of a block on sm_90


def test_interpreted_against_truth_and_twin():
    lines = lines_of("tests.float8_product_cases", TRITON_INTERPRET="1")
    gelu, found = ([line for line in lines if ("gelu" in line) is end] for end in (True, False))
    count = len(cases.KINDS) + len(cases.SHAPES) + 1
    assert (len(found), len(gelu)) == (5 * count, 2 * count)
    for line in gelu:
        assert line["error"] < cases.GELU_TOLERANCE, line
    for line in found:
        assert line["error"] < cases.TOLERANCE, line
        assert line["differs"] < 1e-3, line  # measured 0
    shapes = {tuple(line["shape"]) for line in found}
    chosen = {choose_tile(shape[0] * shape[1], shape[2], cases.PROGRAMS) for shape in shapes}
    assert chosen == set(TILES)


@pytest.mark.parametrize(
    ("rows", "columns", "height", "width"),
    [
        (4608, 21504, 128, 256),  # Dev's single blocks at 1024x1024, both products as one
        (4352, 3072, 128, 256),  # 4 rounds of 384 against 7 of 256
        (512, 9216, 128, 256),  # 144 tiles: two rounds, as 288 halves take three
        (512, 3072, 128, 128),  # 48 tiles leave 84 multiprocessors without work, 96 halves 36
        (256, 3072, 64, 128),
    ],
)
def test_the_tile_that_loads_least(rows, columns, height, width):
    assert choose_tile(rows, columns, 132)[:2] == (height, width)


ENDS = {  # of a product, read with row scales or a static one
    "plain": {},
    "residual": {"K": 15360, "RESIDUAL": True},
    "static residual": {"K": 15360, "RESIDUAL": True, "ROW_SCALES": False},
    "gelu": {"N": 12288, "WIDTH": 12288, "GELU": True},
    "gelu behind attention": {"N": 12288, "WIDTH": 15360, "FIRST": 3072, "GELU": True},
}


@pytest.mark.parametrize(
    ("tile", "end"), [(TILES[0], "plain"), *product(TILES, list(ENDS)[1:])], ids=str
)
def test_compiled_for_hopper_with_its_instructions_and_without_spills(tile, end, tmp_path):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = float8_product.float8_product_kernel
    height, width, warps, stages = tile
    constants = {"N": 3072, "K": 3072, "WIDTH": 3072, "FIRST": 0, "BIAS": True, "GROUP": 8}
    constants |= {"RESIDUAL": False, "GELU": False, "ROW_SCALES": True}
    constants |= {"BLOCK_M": height, "BLOCK_N": width, "BLOCK_K": 128} | ENDS[end]
    float8 = ["x_ptr", "weight_ptr"] + ["out_ptr"] * constants["GELU"]
    fp32 = ("x_scale_ptr", "weight_scale_ptr", "out_scale_ptr")
    types, multiples = {}, {}
    for i, name in enumerate(kernel.arg_names):
        pointer = "*fp8e4nv" if name in float8 else "*fp32" if name in fp32 else "*bf16"
        number = pointer if name.endswith("_ptr") else "i32"
        types[name] = "constexpr" if name in constants else number
        if types[name] != "constexpr":  # ints too: counts, strides
            multiples[(i,)] = [["tt.divisibility", 16]]
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    compiled = triton.compile(
        ASTSource(kernel, types, at, multiples),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert compiled.metadata.shared <= SHARED
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (tmp_path / "kernel.ptx").write_text(compiled.asm["ptx"])
    command = [tools / "ptxas", "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    run = {"capture_output": True, "text": True, "check": True, "cwd": tmp_path}
    said = subprocess.run(command, **run).stderr
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}, said
    code = subprocess.run([tools / "cuobjdump", "-sass", "kernel.cubin"], **run).stdout
    assert "UTMALDG" in code and f"QGMMA.64x{width}x32.F32.E4M3.E4M3" in code
    special = re.findall(r"MUFU\.(TANH|EX2)", code)  # of GELU one a number, or it costs too much
    numbers = height * width // (32 * warps)
    assert special == ["TANH"] * numbers * constants["GELU"]
    assert "STG.E.128" in code and "LDG.E.U16" not in code  # no narrow ones, of float8 either


def test_opcheck_and_what_no_kernel_would_notice():
    given = cases.case("random", (2, 3, 64, 32))
    front = given[5][:, :1]
    for some in (given[:4], given, (*given[:5], given[5][:, 1:], given[6], front)):
        utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
        operator = torch.ops.flux.float8_product.default
        torch.library.opcheck(operator, some, test_utils=utilities)
    x, x_scale, weight, weight_scale, bias, residual, gate = given
    for wrong in (
        (x, x_scale[:1], weight, weight_scale),
        (x, x_scale, weight[:, :16], weight_scale),
        (x[..., :24], x_scale, weight[:, :24].contiguous(), weight_scale),  # TMA: 16 bytes
        (x, x_scale, weight, weight_scale[:3]),
        (x, x_scale, weight, weight_scale, bias[:3]),
        (x, x_scale, weight, weight_scale, bias, residual),
        (x, x_scale, weight, weight_scale, bias, residual, gate[:1]),
        (x, x_scale, weight, weight_scale, bias, residual, gate, front),  # a token too many
        (x, x_scale, weight, weight_scale, bias, residual[:, 1:], gate, front[:1]),
        (x, x_scale, weight, weight_scale, bias, None, None, residual),
    ):
        with pytest.raises(ValueError, match="float8_product: shapes that do not belong"):
            float8_product.float8_product(*wrong)


def ready(kernels=False, step=True, device="cpu"):
    """Give a transformer with float8 Linears, whose products are torch's or the op's."""
    steps = [fused_projections, fused_mlp, fa3] + [fused_kernels] * kernels + [quant]
    return stepped(steps + [triton_float8] * step, float8=True, device=device)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_transformer_is_no_worse_than_with_torchs_products(kernels, float8_on_cpu):
    truth = transformer(torch.float32)(**inputs(2, **FEW, dtype=torch.float32))[0]
    call = inputs(2, **FEW)
    model, own = (ready(kernels, step) for step in (True, False))
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    taken = [m for m in linears if isinstance(m, TritonFloat8Linear)]
    assert len(taken) == 12 and {m for m in linears if quant.is_float8(m)} == set(taken)
    found = model(**call)[0]
    assert relative_error(found, truth) < 1.1 * relative_error(own(**call)[0], truth)

    from utils import aoti

    torch._dynamo.reset()
    component = aoti.Component("transformer", model)
    component.inputs = component.bind((), call)[0]
    program = aoti.export(component)
    names = [str(node.target) for node in program.graph.nodes]
    assert names.count("flux.float8_product.default") == 12
    assert "aten._scaled_mm.default" not in names
    assert relative_error(program.module()(**component.inputs)[0], found) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("mode", [("disabled",), ("compile", "--compile_scope", "blocks")], ids=str)
@pytest.mark.parametrize("kernels", [(), ("--fused_kernels",)], ids=str)
def test_pictures(mode, kernels, reference, float8_on_cpu, monkeypatch):
    monkeypatch.setattr(triton_float8, "lacking", lambda machine: "")
    monkeypatch.setattr(fused_kernels, "lacking", lambda machine: "")
    plain = ("--prompt", "a red circle on a blue background", "--num_inference_steps", "2")
    torch._dynamo.reset()
    flags = (*plain, *kernels, "--triton_float8", "--fused_mlp", "--compile_export_mode", *mode)
    made, args = optimized(*flags)
    assert args.plan["triton_float8"].is_on
    scores = quality.compare(quality.run(made, args), reference(*plain))
    assert scores["psnr_db_worst"] > 28, scores


@pytest.mark.slow
def test_inductors_code_holds_these_kernels_and_no_copy():
    end, mlp = lines_of("tests.float8_product_codegen")
    assert end["kernels"] == ["float8_product_kernel"] and end["allocations"] == 1, end
    assert mlp["kernels"] == ["cast_rows_kernel", "float8_product_kernel"], mlp
    assert mlp["allocations"] == 1, mlp


def checked(machine=H200, **flags):
    defaults = {
        "triton_float8": True,
        "persistent_tma": False,
        "deferred_scales": False,
        "disable_quant": False,
        "gguf_file": None,
        "swap_loras": False,
        "quant_granularity": "row",
        "quant_dtype": None,
        "quant_filter": "blocks",
        "dtype": torch.bfloat16,
        "compile_export_mode": "compile",
    }
    return triton_float8.check(SimpleNamespace(machine=machine, **(defaults | flags)))


def test_it_is_asked_for_and_needs_hopper_and_float8(monkeypatch):
    assert make_args("--device", "cpu").plan["triton_float8"].reason == "no --triton_float8"
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    assert checked().is_on and checked(compile_export_mode="export_aoti").is_on
    for machine in (
        Machine("cpu", "EPYC"),
        Machine("cuda", "L40S", (8, 9)),
        Machine("cuda", "RTX 5090", (12, 0)),
        Machine("cuda", "MI300X", (9, 4), hip="7.0"),
    ):
        verdict = checked(machine)
        assert verdict.state == "unavailable" and machine.short() in verdict.reason
    for flags, found in (
        ({"disable_quant": True}, "found --disable_quant"),
        ({"quant_granularity": "tensor"}, "found --quant_granularity tensor"),
        ({"persistent_tma": True}, "found --persistent_tma"),
        ({"deferred_scales": True}, "found --deferred_scales"),
    ):
        verdict = checked(**flags)
        assert verdict.state == "refused" and found in verdict.reason
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
    verdict = checked(compile_export_mode="export_aoti")
    assert verdict.state == "refused" and "packages of torch 2.11.0 give" in verdict.reason
    assert checked().is_on
    with pytest.raises(UserError, match=r"--require triton_float8: .*needs a Hopper GPU"):
        make_args("--device", "cpu", "--triton_float8", "--require", "triton_float8")


def test_which_torch_allots_scratch_to_every_program():
    """The reason for refusing packages: if it is gone from the older torch, so may the refusal."""
    from torch._inductor.codegen.common import TritonScratchWorkspace
    from torch._inductor.codegen.cuda.device_op_overrides import CUDADeviceOpOverrides

    workspace = TritonScratchWorkspace(size=256, generate_dtype_str=lambda: "uint8")
    lines, _ = CUDADeviceOpOverrides().cpp_scratch(0, workspace)
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    assert ("grid_0" in "".join(lines)) == (version >= (2, 13))

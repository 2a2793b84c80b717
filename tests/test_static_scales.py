"""Static activation scales: the op, the step in blocks and packages, the file, its calibration."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import MODES, make_args, optimized
from test_float8_product import H200

from tests import float8_product_cases as cases
from tests.flux_pieces import inputs, relative_error, stepped, traced_and_exported, transformer
from utils import calibrate, calibrate_scales, quality, scales_file
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels import float8_gelu
from utils.kernels.flash_attention import E4M3_MAX
from utils.steps import (
    fa3,
    fused_kernels,
    fused_mlp,
    fused_projections,
    quant,
    static_scales,
    triton_float8,
)

FEW = {"text": 3, "height": 1, "width": 5}
SHORT = ("--prompt", "a red circle on a blue background", "--num_inference_steps", "2")
KERNELS = ("--fused_kernels", "--triton_float8")


def test_the_op_and_what_no_kernel_would_notice():
    *given, attention = cases.gelu_case("random", (2, 3, 64, 32))
    utilities = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    for behind in (None, attention):
        operator = torch.ops.flux.float8_gelu.default
        torch.library.opcheck(operator, (*given, behind), test_utils=utilities)
    x, x_scale, weight, weight_scale, bias, scale = given
    for wrong in (
        (x, x_scale[:1], weight, weight_scale, bias, scale),
        (x, scale, weight, weight_scale, bias, scale),
        (x, x_scale, weight[:, :16], weight_scale, bias, scale),
        (x[..., :24], x_scale, weight[:, :24].contiguous(), weight_scale, bias, scale),
        (x, x_scale, weight, weight_scale[:3], bias, scale),
        (x, x_scale, weight, weight_scale, bias[:3], scale),
        (x, x_scale, weight, weight_scale, bias, scale[:1]),
        (x, x_scale, weight, weight_scale, bias, scale, attention[:, :2]),
    ):
        with pytest.raises(ValueError, match="float8_gelu: shapes that do not belong"):
            float8_gelu.float8_gelu(*wrong)


def test_what_lies_beyond_saturates_and_nan_stays():
    *given, attention = cases.gelu_case("random", (2, 3, 64, 32), within=0.25)
    attention = attention.clone()
    attention[0, 0, 0] = float("nan")
    out = float8_gelu.float8_gelu(*given, attention).float()
    assert out[0, 0, 0].isnan() and out.isnan().sum() == 1
    assert out.nan_to_num().abs().max() == E4M3_MAX


def scales_of(model, call: dict, path, **others) -> str:
    """Write the file of a model that has just met one call."""
    names = static_scales.select(model)
    with calibrate_scales.largest_inputs(model, names) as largest, torch.no_grad():
        model(**call)
    about = {"checkpoint": "x", "identity": "y", "weights": {}} | others
    path.write_bytes(scales_file.dump(scales_file.ScalesFile(largest, **about)))
    return str(path)


def ready(path: str | None, device="cpu", joint=False):
    """Give a transformer over the kernels, with the static scales of a file or without."""
    steps = [fused_projections] + [fused_mlp] * joint + [fa3, fused_kernels, quant, triton_float8]
    model = stepped(steps, float8=True, device=device)
    if path:
        static_scales.apply(SimpleNamespace(transformer=model), SimpleNamespace(static_scales=path))
    return model


def test_a_transformer_is_as_good_as_with_a_scale_per_row(float8_on_cpu, tmp_path):
    call = inputs(2, **FEW)
    truth = transformer(torch.float32)(**inputs(2, **FEW, dtype=torch.float32))[0]
    path = scales_of(transformer(), call, tmp_path / "scales.json")
    model = ready(path)
    error, by_row = (relative_error(m(**call)[0], truth) for m in (model, ready(None)))
    assert error < 1.2 * by_row, (error, by_row)
    names = traced_and_exported(model, call, 1e-6)
    assert names.count("flux.float8_gelu.default") == 4  # two streams, two single blocks
    assert "flux.gelu_quantize.default" not in names and model.dtype == torch.bfloat16


def test_the_largest_input_of_all_calls_is_kept_whatever_its_sign():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with calibrate_scales.largest_inputs(model, ["0"]) as largest:
        for value in (1.0, -3.0, 2.0):
            model(torch.full((1, 4), value))
    assert largest == {"0": 3.0}


def test_each_block_has_its_own_scale_in_an_input_of_the_graph(float8_on_cpu, tmp_path):
    """Scales of two blocks differ: one that were folded into code would be the other's, too."""
    call = inputs(2, **FEW)
    path = scales_of(transformer(), call, tmp_path / "scales.json")
    largest = scales_file.load(path).largest
    assert len(largest) == 4 and len(set(largest.values())) > 2
    model = ready(path)
    for name, value in largest.items():
        found = model.get_submodule(name).input_scale
        expected = torch.tensor([2 * value / E4M3_MAX, E4M3_MAX / 2 / value])
        torch.testing.assert_close(found, expected)
    first = model.single_transformer_blocks[0].proj_out.input_scale
    before = model(**call)[0]
    first.mul_(torch.tensor([0.01, 100.0]))  # nearly all saturates
    assert relative_error(model(**call)[0], before) > 0.1


def test_files_and_blocks_that_do_not_fit(float8_on_cpu, tmp_path):
    path = scales_of(transformer(), inputs(1, **FEW), tmp_path / "scales.json")
    found = json.loads((tmp_path / "scales.json").read_text())
    del found["largest"]["single_transformer_blocks.1.proj_out"]
    other = tmp_path / "other.json"
    other.write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"other Linears .*single_transformer_blocks\.1\.proj_out"):
        ready(str(other))
    model = ready(None)
    model.single_transformer_blocks[1].float8 = False
    pipeline, args = SimpleNamespace(transformer=model), SimpleNamespace(static_scales=path)
    with pytest.raises(UserError, match=r"single_transformer_blocks\.1 has Linears that are not"):
        static_scales.apply(pipeline, args)
    for text, said in (
        ("{", "cannot be read"),
        ("[]", "expected a file of python -m utils.calibrate_scales"),
        (json.dumps({"format": 1, "mask": "110"}), "expected a file of python -m"),
        (json.dumps(found | {"largest": {}}), "of another kind"),
        (json.dumps(found | {"identity": 3}), "of another kind"),
        (json.dumps(found | {"further": 3}), "damaged"),
        *(
            (json.dumps(found | {"largest": {"a": v}}), "expected above 0")
            for v in (0.0, -1.0, "1")
        ),
        (json.dumps(found | {"largest": {"a": float("inf")}}), "expected above 0"),
    ):
        other.write_text(text)
        with pytest.raises(ValueError, match=said):
            scales_file.load(str(other))


@pytest.fixture
def path(tmp_path):
    """Give a file of tiny-schnell's scales, found by the command's own parts."""
    args = calibrate_scales.settle(["--ckpt", "tiny-schnell"], calibrate_scales.parser())
    identity = args.checkpoint.identity(args.cache_dir)
    names = [f"transformer_blocks.0.{n}.net.2" for n in ("ff", "ff_context")]
    names += [f"single_transformer_blocks.{i}.proj_out" for i in (0, 1)]
    weights = scales_file.brought_weights(args)
    found = scales_file.ScalesFile(dict.fromkeys(names, 20.0), "tiny-schnell", identity, weights)
    (tmp_path / "tiny.json").write_bytes(scales_file.dump(found))
    return str(tmp_path / "tiny.json")


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as caught:
        make_args("--device", "cpu", *flags)
    return str(caught.value)


def test_what_it_needs_and_refuses(path, monkeypatch):
    assert make_args("--device", "cpu").plan["static_scales"].reason == "no --static_scales"
    given = ("--static_scales", path)
    verdict = make_args("--device", "cpu", *given, *KERNELS).plan["static_scales"]
    assert verdict.state == "unavailable" and "needs a Hopper GPU" in verdict.reason
    assert "expected --triton_float8 and --fused_kernels" in refusal(*given)
    assert "expected --fused_kernels;" in refusal(*given, "--triton_float8")
    assert "found --fused_mlp" in refusal(*given, *KERNELS, "--fused_mlp")
    said = refusal(*given, *KERNELS, "--ckpt", "tiny-dev")
    assert "calibrated for other weights, those of tiny-schnell" in said and "\n" not in said
    lora = "tiny_flux/loras/tiny-schnell-night.safetensors"
    said = refusal(*given, *KERNELS, "--lora", lora)
    assert "calibrated with none, found ['tiny-schnell-night.safetensors:1@" in said
    assert "cannot be read" in refusal("--static_scales", "absent.json", *KERNELS)
    args = make_args("--device", "cpu", *given, *KERNELS)
    args.machine = H200
    monkeypatch.setattr(torch, "__version__", "2.13.0+cu130")
    verdict = static_scales.check(args)
    assert verdict.is_on and not verdict.lossless and verdict.settings["headroom"] == 2
    args.machine = Machine("cuda", "L40S", (8, 9))
    assert static_scales.check(args).state == "unavailable"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--scales_file", "x.txt"), "--scales_file x.txt: expected a name ending in .json"),
        (("--scales_file", "no/such/x.json"), "--scales_file no/such/x.json: "),
        (("--triton_float8",), "--triton_float8: the calibration keeps no picture"),
        (("--static_scales", "x.json"), "--static_scales: the calibration keeps no picture"),
    ],
)
def test_what_the_calibration_refuses(flags, said):
    with pytest.raises(UserError) as caught:
        calibrate_scales.settle(["--device", "cpu", *flags], calibrate_scales.parser())
    assert str(caught.value).startswith(said)


def test_the_calibrations_run_is_plain_and_its_prompts_are_others():
    words = ["--device", "cpu", "--ckpt", "tiny-schnell"]
    args = calibrate_scales.settle(words, calibrate_scales.parser())
    assert args.seed == calibrate.SEED and len(args.prompt) == calibrate.PROMPTS
    assert not args.plan["quant"].is_on and args.compile_export_mode == "disabled"


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Let the steps run here, where their ops are their twins."""
    monkeypatch.setattr(triton_float8, "lacking", lambda machine: "")
    monkeypatch.setattr(fused_kernels, "lacking", lambda machine: "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [*MODES, ("export_aoti", "--compile_scope", "blocks")],
    ids=str,
)
def test_calibrated_pictures(mode, reference, float8_on_cpu, on_a_cpu, tmp_path):
    """By the command itself; packages of two blocks have to find each block's own scale."""
    file = tmp_path / "scales.json"
    command = [sys.executable, "-m", "utils.calibrate_scales", "--ckpt", "tiny-schnell"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--scales_file", file], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "scales      of 4 Linears" in done.stdout
    torch._dynamo.reset()
    where = ("--static_scales", str(file), "--cache-dir", str(tmp_path / "packages"))
    made, args = optimized(*SHORT, *KERNELS, *where, "--compile_export_mode", *mode)
    assert args.plan["static_scales"].is_on
    scores = quality.compare(quality.run(made, args), reference(*SHORT))
    assert scores["psnr_db_worst"] > 28, scores
    by_row, _ = optimized(*SHORT, *KERNELS, "--compile_export_mode", "disabled")
    others = quality.compare(quality.run(by_row, args), reference(*SHORT))
    assert scores["latents_relative_l2"] < 1.3 * others["latents_relative_l2"], (scores, others)

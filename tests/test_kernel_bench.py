"""The kernels' own benchmark, at toy size on a CPU: cases, checks, failures, rows and table."""

import dataclasses
import json
import sys

import pytest
import torch

from tests.test_cli import script
from utils import peaks
from utils.errors import UserError
from utils.hardware import Machine, detect
from utils.kernel_bench import __main__ as bench
from utils.kernel_bench import attention, between, decoder, products, text, timing, trial
from utils.kernel_bench import static_scales as static
from utils.peaks import Peaks

CPU = trial.Setting("cpu", trial.TINY, detect("cpu"))
HOPPER = trial.Setting("cpu", trial.FULL, Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139))
PEAKS = Peaks("made up", {"bf16": 1.0, "fp8": 2.0}, 0.01, "by hand")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    """Take one sample of everything: nobody reads these times."""
    monkeypatch.setattr(timing, "LEAST", 1)
    monkeypatch.setattr(timing, "LIMIT_S", 0.0)


def measured(pattern: str) -> dict[str, dict]:
    chosen = bench.choose(bench.all_cases(CPU), pattern)
    return {case.name: bench.run_case(case, CPU) for case in chosen}


def test_help_and_list_are_quick_and_name_the_cases():
    done = script("-X", "importtime", "-m", "utils.kernel_bench", "--help")
    assert done.returncode == 0 and "--cases" in done.stdout
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "numpy"}


def test_full_size_has_the_shapes_of_the_three_checkpoints():
    names = {case.name for case in bench.all_cases(HOPPER)}
    shapes = {(s.m, s.n, s.k) for s in products.shapes(HOPPER)}
    for tokens in (4608, 4352, 8704):
        assert {f"attention/{tokens}/fa3-fp8", f"attention/{tokens}/sdpa"} <= names
        assert {(tokens, 9216, 3072), (tokens, 12288, 3072), (tokens, 21504, 3072)} <= shapes
        assert (tokens, 3072, 15360) in shapes
    assert {(m, 3072, 12288) for m in (4096, 512, 256)} <= shapes
    assert all(case.name.count("/") == 2 for case in bench.all_cases(HOPPER))
    compiles = [case.compiles for case in bench.all_cases(HOPPER)]
    assert compiles == sorted(compiles) and 20 < sum(compiles) < 40
    quick = bench.choose(bench.all_cases(HOPPER), "*", skip_compiled=True)
    assert [case.compiles for case in quick] == [False] * compiles.count(False)


def test_every_full_size_case_has_a_group_of_the_table():
    rows = [(case.name,) for case in bench.all_cases(HOPPER)]
    assert {row[0].split("/")[0] for row in sorted(rows, key=bench.order)} == set(bench.GROUPS)


@pytest.mark.parametrize(
    ("pattern", "states"),
    [
        ("product/image-out-16/[bt]*", {"ok", "unavailable"}),
        ("attention/*", {"ok", "unavailable"}),
        ("between/gelu-16/*", {"ok", "unavailable"}),
        ("static/*[lr]", {"ok", "unavailable"}),
        ("decoder/[ag]*/[se]*", {"ok", "unavailable"}),
        ("decoder/whole/eager", {"ok"}),
        ("text/*/eager", {"ok"}),
        ("transfer/*", {"ok", "unavailable"}),
    ],
)
def test_each_group_runs_and_is_checked(pattern, states):
    rows = measured(pattern)
    assert {row["state"] for row in rows.values()} == states, rows
    for row in rows.values():
        if row["state"] == "ok":
            assert row["ms"]["min"] > 0 and 0 < row["error"] <= row["bound"]
        else:
            assert "GPU" in row["reason"]


@pytest.mark.parametrize("cast", [name for name in products.CASTS if name != "none"])
def test_casts_are_undone(cast):
    x = CPU.randn(256, 256, dtype=torch.float32)
    for way in products.CASTS[cast]:
        values, scale = way(x)
        assert values.dtype == torch.float8_e4m3fn
        assert trial.relative_l2(products.dequantize(values, scale), x) < 0.03


def test_blockwise_scales_lie_as_the_product_wants_them():
    x, w = (way(CPU.randn(384, 256))[1] for way in products.CASTS["block"])
    assert (x.shape, x.stride()) == ((384, 2), (1, 384))
    assert (w.t().shape, w.t().stride()) == ((2, 3), (1, 2))


@pytest.mark.parametrize("name", ["row-inductor", "row-inductor-tma", "deferred-inductor", "one"])
def test_every_way_to_multiply_in_float8_gives_the_same(name, monkeypatch):
    """With the product emulated: a CPU's takes row scales only in newer versions of torch."""

    def emulated(x, w, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        out = (x.float() @ w.float()) * scale_a * scale_b
        return (out if bias is None else out + bias.float()).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", emulated)
    variant, shape = products.VARIANTS[name], products.shapes(CPU)[0]
    inputs = products.draw(CPU, shape, variant.cast, 0)
    found = products.check(CPU, shape, variant, variant.run(*inputs), inputs)
    assert found["error"] < variant.bound
    assert ("loss" in found) == (name != "one")


@pytest.mark.parametrize("name", ["row-inductor", "static-kernel", "static-inductor-tma"])
def test_a_static_scale_and_a_rows_end_at_the_same_values(name):
    """And one that a bad calibration found too small is seen: it saturates."""
    cast, run, _ = static.VARIANTS[name]
    shape = next(s for s in products.shapes(CPU) if s.name == "single-up-16")
    *operands, scale = static.draw(CPU, shape, cast, 0)
    outputs = run(*operands, scale)
    values, found = outputs
    assert values.dtype == torch.float8_e4m3fn and found.numel() == (
        1 if name.startswith("static") else 16
    )
    assert static.check(outputs, (*operands, scale))["error"] < between.FP8_BOUND
    small = (*operands, scale * scale.new_tensor([1 / 8, 8]))
    is_static = name.startswith("static")
    assert (static.check(run(*small), small)["error"] > between.FP8_BOUND) is is_static


def test_a_single_blocks_rope_has_a_truth_for_v():
    places = {place.name: place for place in between.places(CPU)}
    place = places["norm-rope-fp8-24"]
    inputs = place.draw(0)
    assert between.check(place, place.twin(*inputs), inputs)["error"] < place.bound


@pytest.mark.parametrize(("variant", "dtype"), [("fa3-fp8", "fp8"), ("int8", "int8")])
def test_attention_in_8_bits_is_within_its_bound(variant, dtype, monkeypatch):
    monkeypatch.setattr(attention, "lacking", lambda *where: "")
    found = measured(f"attention/48/{variant}")[f"attention/48/{variant}"]
    assert found["state"] == "ok" and found["error"] > 0.01 and found["dtype"] == dtype


def test_the_decoders_truth_is_cudnns_in_fp32():
    """torch.backends.cudnn.flags() switches cuDNN off where it is not asked to keep it."""
    cudnn, seen = torch.backends.cudnn, []
    hook = decoder.decoder(CPU).register_forward_pre_hook(
        lambda *_: seen.append((cudnn.enabled, cudnn.allow_tf32))
    )
    try:
        assert decoder.truth.__wrapped__(CPU).dtype == torch.float32
    finally:
        hook.remove()
    assert seen == [(True, False)]


@pytest.mark.parametrize("case", ["text/t5-16/graph", "text/clip-77/graph"])
def test_a_captured_encoder_has_the_masks_of_its_warm_up(case, monkeypatch):
    from transformers import masking_utils

    asked, one = [], bench.choose(bench.all_cases(CPU), case)[0].make()
    hook = text.encoder(CPU, case[5:].partition("-")[0]).register_forward_pre_hook(
        lambda *_: asked.append(masking_utils.is_tracing(None))
    )
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    try:
        one.run(*one.draw(0))
    finally:
        hook.remove()
    assert asked == [False]


def test_a_wrong_or_failing_case_is_one_line_and_the_rest_goes_on():
    case = bench.choose(bench.all_cases(CPU), "decoder/group-norm*/eager")[0]
    wrong = trial.Case(case.name, lambda: dataclasses.replace(case.make(), bound=1e-9))
    row = {"case": case.name, **bench.run_case(wrong, CPU)}
    assert row["state"] == "wrong" and row["ms"]["n"] == 1 and "> 1e-09" in row["reason"]
    assert "WRONG" in bench.line(row) and "error" in bench.line(row)

    def nan(x):
        return torch.full_like(x, float("nan"))

    broken = trial.Case(case.name, lambda: dataclasses.replace(case.make(), run=nan))
    assert bench.run_case(broken, CPU)["state"] == "wrong"

    def fail():
        raise RuntimeError("first\nsecond")

    row = {"case": case.name, **bench.run_case(trial.Case(case.name, fail), CPU)}
    assert row == {"case": case.name, "state": "failed", "reason": "RuntimeError: first second"}
    assert bench.rates(row, PEAKS, PEAKS) == {}
    assert bench.cells(row)[:2] == (case.name, "failed: RuntimeError: first second")


def test_rates_and_shares_by_hand():
    row = {"ms": {"median": 2.0}, "flop": 10**9, "bytes": 10**7, "dtype": "fp8"}
    # 1 GFLOP at 2 TFLOP/s takes 0.5 ms, 10 MB at 0.01 TB/s 1 ms
    assert bench.rates(row, PEAKS, None) == {
        "tflop_per_s": 0.5,
        "tb_per_s": 0.005,
        "of_ceiling": 0.5,
    }
    assert "of_sheet" not in bench.rates(row | {"dtype": "fp4"}, PEAKS, PEAKS)


def test_more_sets_of_inputs_than_the_cache_holds(monkeypatch):
    properties = type("Properties", (), {"L2_cache_size": 1000})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    one = trial.Trial(
        run=None, draw=lambda k: (torch.full((150,), k),), check=None, bound=0.0
    )  # 1200 bytes
    assert [int(s[0][0]) for s in timing.sets_of(one, "cuda")] == [0, 1]
    assert len(timing.sets_of(one, "cpu")) == 1


def test_the_command_writes_rows_and_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peaks, "measure_ceilings", lambda device, dtype: PEAKS)
    path = tmp_path / "rows.jsonl"
    words = ["kernel_bench", "--device", "cpu", "--cases", "transfer/*", "--results", str(path)]
    monkeypatch.setattr(sys, "argv", words)
    bench.main()
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["state"] for row in rows] == ["unavailable", "unavailable", "ok", "ok"]
    assert all(row["size"] == "tiny" and row["ceilings"]["tb_per_s"] > 0 for row in rows)
    assert all(row["environment"]["versions"]["torch"] for row in rows)
    assert printed.count("| transfer/") == 4 and "| --- |" in printed
    monkeypatch.setattr(sys, "argv", [*words, "--limit_s", "1e-9"])
    bench.main()
    assert "left out: 4 cases from transfer/graph-replay/host" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--cases", "product/nothing"], "--cases product/nothing: found no such case"),
        (["--limit_s", "0"], "--limit_s 0: expected more than 0"),
        (["--limit_s", "nan", "--list"], "--limit_s nan: expected more than 0"),
        (["--cases", "transfer/*", "--results", "/nowhere/x"], "--results /nowhere/x: cannot be"),
    ],
)
def test_wrong_words_are_one_line(words, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["kernel_bench", "--device", "cpu", *words])
    with pytest.raises(UserError, match=expected.replace("*", r"\*")):
        bench.main()


def test_without_triton_it_is_one_line(monkeypatch):
    monkeypatch.setattr(bench, "import_problem", lambda *names: "no module triton")
    with pytest.raises(UserError, match="found no module triton; pip install triton"):
        bench.settle(bench.parser().parse_args(["--device", "cpu"]))

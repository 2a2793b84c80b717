"""Other projects beside ours: what they are, what is mended in a copy, what their rows say."""

import json
import subprocess
import sys

import pytest
from conftest import make_args
from report_pieces import row

import run_benchmark
from utils import flux_fast, peers, report, roofline, series
from utils.errors import UserError
from utils.hardware import Machine
from utils.prepare import prepare
from utils.report_rows import read
from utils.report_series import series_of

H200 = Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=140.0)
FULL_SIZE = ("--ckpt", "black-forest-labs/FLUX.1-schnell", "--random_weights")
SHORT = ("--device", "cpu", "--num_runs", "2", "--num_warmup", "0", "--quality_prompts", "1")


def settled(peer: str, *flags: str, **others):
    """Settle the run of a peer as run_benchmark.py does."""
    args = make_args(*flags, checks=False)
    vars(args).update({"peer": peer, "quality_source": "none"} | others)
    prepare(args)
    return args


def made_up_copy(folder):
    """Write a file that holds, on their lines, the words that are mended; nothing of the real."""
    lines = ["\n"] * max(edit.line for edit in flux_fast.EDITS)
    for edit in flux_fast.EDITS:
        lines[edit.line - 1] = f"before {edit.found} after\n"
    (folder / flux_fast.SOURCE).parent.mkdir()
    (folder / flux_fast.SOURCE).write_text("".join(lines))
    return "".join(lines)


def test_a_copy_is_mended_beside_itself(tmp_path):
    before = made_up_copy(tmp_path)
    lines = flux_fast.mend(tmp_path).read_text().splitlines()
    assert (tmp_path / flux_fast.SOURCE).read_text() == before
    changed = [k + 1 for k, line in enumerate(before.splitlines()) if line != lines[k]]
    assert changed == sorted(edit.line for edit in flux_fast.EDITS)
    assert "fa3_fwd_interface import flash_attn_func as  after" in lines[42]
    (tmp_path / flux_fast.SOURCE).write_text("\n" * 460)
    with pytest.raises(ValueError, match=r"pipeline_utils\.py:43: expected 'flash_attn"):
        flux_fast.mend(tmp_path)


def test_a_copy_that_is_missing_or_another_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    assert "git clone https://github.com/huggingface/flux-fast" in flux_fast.copy_problem(tmp_path)
    made_up_copy(tmp_path)
    found = flux_fast.copy_problem(tmp_path)
    assert "has sha256" in found and flux_fast.REVISION[:12] in found and "\n" not in found
    monkeypatch.setattr(flux_fast.copy_problem, "__defaults__", (tmp_path / "nowhere",))
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", "--device", "cpu", "--peer", "flux-fast"])
    with pytest.raises(UserError, match="--peer flux-fast: no copy of it in"):
        run_benchmark.main()
    assert not capsys.readouterr().out  # before the card, the weights and all else


def test_flux_fast_may_link_a_package_where_ours_may(tmp_path, monkeypatch):
    mended = tmp_path / "mended.py"
    mended.write_text("import os\ndef optimize(pipeline, args): return os.environ['CUDA_HOME']\n")
    monkeypatch.setattr(flux_fast, "mend", lambda: mended)
    monkeypatch.setattr(flux_fast, "flags", lambda args: {})
    monkeypatch.setattr("torch.utils.cpp_extension.CUDA_HOME", "/toolkit")
    monkeypatch.setenv("CUDA_HOME", "")  # to be put back
    monkeypatch.delenv("CUDA_HOME")
    assert flux_fast.apply(None, None) == "/toolkit"


def test_a_peer_is_described_in_the_words_of_our_steps(as_machine, monkeypatch):
    as_machine(H200)
    monkeypatch.setattr(flux_fast, "copy_problem", lambda: "")
    monkeypatch.setattr(flux_fast, "import_problem", lambda *_: "")
    monkeypatch.setattr(peers, "import_problem", lambda *_: "")
    on = {}
    for name in peers.PEERS:
        args = settled(name, *FULL_SIZE, "--modulation_once", "--compile_scope", "blocks")
        on[name] = {step: v.lossless for step, v in args.plan.items() if v.is_on}
        assert args.plan["modulation"].reason == f"not in {name}"
        assert not roofline.call_of(args).modulation_once
        assert peers.about(args)["peer"]["name"] == name
        floats = roofline.precision_of(args)
        assert (floats.linear, floats.other) == (("fp8",) * 2 if name == "flux-fast" else ("", ""))
    compiled = dict.fromkeys(("fused_projections", "channels_last", "compile"), True)
    assert on["diffusers-eager"] == {} and on["diffusers-compile"] == compiled
    assert on["diffusers-fa3"] == compiled | {"fa3": True}
    assert on["flux-fast"].pop("export_aoti") and not on["flux-fast"].pop("quant")
    assert not on["flux-fast"].pop("fa3")  # unscaled float8
    assert set(on["flux-fast"]) == {"fused_projections", "channels_last", "inductor_tuning_flags"}
    assert peers.about(make_args("--device", "cpu", checks=False)) == {}


@pytest.mark.parametrize(
    ("peer", "flags", "others", "expected"),
    [
        ("flux-fast", ("--height", "768"), {}, "written for height 1024, found 768"),
        ("flux-fast", ("--num_images_per_prompt", "2"), {}, "written for images 1, found 2"),
        ("flux-fast", ("--max_sequence_length", "512"), {}, "max_sequence_length 256, found 512"),
        ("flux-fast", ("--disable_bf16",), {}, "dtype torch.bfloat16, found torch.float32"),
        ("flux-fast", (), {"quality_source": "bundled"}, "add --quality_source none"),
        ("flux-fast", ("--disable_fused_projections",), {}, "add --disable_fa3"),
        ("diffusers-eager", ("--cache_dit_config", "cache_config.yaml"), {}, "no peer has a step"),
    ],
)
def test_calls_that_a_peer_cannot_make_are_refused(
    as_machine, monkeypatch, peer, flags, others, expected
):
    as_machine(H200)
    monkeypatch.setattr(flux_fast, "copy_problem", lambda: "")
    monkeypatch.setattr(flux_fast, "import_problem", lambda *_: "")
    with pytest.raises(UserError, match=f"--peer {peer}: .*{expected}"):
        settled(peer, *FULL_SIZE, *flags, **others)


@pytest.mark.slow
def test_peers_and_ours_stand_in_one_table(monkeypatch, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    names = "ours,peer:diffusers-eager,peer:diffusers-fa3"
    flags = ("--peers", "--rows", names, "--compile_export_mode", "disabled", *SHORT)
    flags = (*flags, "--results", str(path))
    monkeypatch.setattr(sys, "argv", ["run_benchmark.py", *flags])
    args = run_benchmark.parse_arguments()
    assert series.run_series(args, list(flags)) == 0
    assert "peer:diffusers-fa3: unavailable: FlashAttention-3" in capsys.readouterr().out
    ours, eager = read(path)
    assert "--compile_export_mode disabled" in ours["command"]  # ours as it was typed
    assert "--peer diffusers-eager" in eager["command"] and "--peers" not in eager["command"]
    assert eager["peer"] == {"name": "diffusers-eager"} and "peer" not in ours
    assert eager["quality"]["psnr_db_worst"] is None  # the reference itself
    (found,) = series_of([ours, eager])
    assert found.kind == "peers" and found.base["row"] == "ours"
    text = report.markdown("x.jsonl", [ours, eager])
    assert "Beside other projects on the same call: tiny-schnell" in text
    assert "| row | seconds | ours is ahead |" in text


def test_how_far_ours_is_ahead_is_a_peers_time_over_ours():
    rows = [
        row("peer:flux-fast", 1.5, series="peers", position=1),
        row("ours", 1.0, series="peers"),
    ]
    text = report.markdown("x.jsonl", rows)
    cells = [
        line.split(" | ")[2] for line in text.splitlines() if line.startswith(("| ours", "| p"))
    ]
    assert cells == ["-", "1.50x"]


@pytest.mark.slow
def test_diffusers_compiled_blocks_keep_the_picture(reference):
    from utils import quality
    from utils.pipeline_utils import load_pipeline

    args = settled("diffusers-compile", "--device", "cpu", "--compile_scope", "blocks")
    result = quality.run(peers.optimize(load_pipeline(args), args), args)
    assert quality.compare(result, reference())["psnr_db_worst"] > 35


@pytest.mark.skipif(bool(flux_fast.copy_problem()), reason="no copy of flux-fast in .peers")
def test_flux_fast_itself_runs_on_our_pipeline():
    """What of it runs on a CPU: fused projections and channels-last, so eager's own latents.

    In a process of its own, as always: it registers an op of the same name as ours.
    """
    command = [sys.executable, "run_benchmark.py", "--peer", "flux-fast", *SHORT]
    done = subprocess.run(command, cwd=series.SCRIPT.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["peer"]["revision"] == flux_fast.REVISION and len(found["peer"]["mended"]) == 5
    states = {name: step["state"] for name, step in found["steps"].items()}
    assert states["fused_projections"] == states["channels_last"] == "on"
    assert states["fa3"] == states["quant"] == "unavailable"
    assert found["quality"]["latents_relative_l2"] == 0 and not found["step_cache"]

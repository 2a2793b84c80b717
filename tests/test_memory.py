"""Memory tiers: estimates against measured peaks, choices, pictures, refusals, and running out."""

import argparse
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import make_args, optimized
from diffusers import AutoencoderKL, FluxTransformer2DModel
from test_cli import ROOT, script
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.peak_tensors import PeakTensors
from utils import card, memory_tiers, quality, row
from utils.errors import UserError
from utils.hardware import Machine
from utils.memory import parse_size
from utils.memory_tiers import GIB, TIERS, estimate
from utils.pipeline_utils import generate
from utils.prompts import quality_prompts
from utils.random_weights import TRANSFORMER, VAE
from utils.reference import check_room
from utils.steps.memory import _tier_or_size, out_of_memory_explained

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", (9, 0), memory_gib=78.0)  # what is free of 79.2
ADA = Machine("cuda", "RTX 6000 Ada", (8, 9), memory_gib=48.0)
FLUX = ("--ckpt", "black-forest-labs/FLUX.1-dev", "--random_weights", "--disable_fa3")
SMALL = ("--height", "64", "--width", "64")  # one tile


def test_sizes_are_read_as_people_write_them():
    assert parse_size("10GiB") == 10 * 2**30
    assert parse_size("10GB") == 10**10
    assert parse_size("1.5 GiB") == 3 * 2**29
    assert parse_size("512MiB") == 2**29
    assert parse_size("20gb") == parse_size("20 GB") == 2 * 10**10
    assert parse_size("10") == 10
    with pytest.raises(argparse.ArgumentTypeError, match="or a size such as 10GiB"):
        _tier_or_size("10")
    assert parse_size("10G") is parse_size("10iB") is parse_size("-1GiB") is None
    assert parse_size("9" * 400 + "GB") is None  # no float has it


@pytest.mark.parametrize(("image", "text"), [(4096, 512), (1024, 256)])
def test_a_step_of_full_width_holds_so_many_tensors(image, text):
    """One block of each kind is as wide as all of them: nothing is kept from block to block."""
    kwargs = {
        "hidden_states": (1, image, 64),
        "encoder_hidden_states": (1, text, 4096),
        "pooled_projections": (1, 768),
        "timestep": (1,),
        "img_ids": (image, 3),
        "txt_ids": (text, 3),
    }
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(
            TRANSFORMER | {"num_layers": 1, "num_single_layers": 1}
        ).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        model.to_empty(device="cpu")
        inputs = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in kwargs.items()}
        with PeakTensors() as peak, torch.no_grad():
            model(**inputs)
    tensor = (image + text) * 3072 * 2
    assert peak.peak / tensor == pytest.approx(memory_tiers.TENSORS_OF_A_STEP, rel=0.02)


@pytest.mark.parametrize("edge", [1024, 512])
def test_decoding_at_full_width_holds_so_many_tensors(edge):
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(VAE).bfloat16()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        vae.to_empty(device="cpu")
        latents = torch.zeros(1, 16, edge // 8, edge // 8, dtype=torch.bfloat16)
        with PeakTensors() as peak, torch.no_grad():
            vae.decode(latents)
    tensor = edge * edge * 256 * 2
    assert peak.peak / tensor == pytest.approx(memory_tiers.TENSORS_OF_THE_VAE, rel=0.02)


@pytest.mark.parametrize("size", [128, 512])
def test_the_estimate_of_a_call_is_its_measured_peak(size):
    """Live tensors of a real call, without the weights; kernels' workspaces are in the reserve."""
    flags = ("--height", str(size), "--width", str(size), "--memory", "full")
    pipeline, args = optimized(*flags, "--num_inference_steps", "1")
    with PeakTensors() as peak:
        generate(pipeline, args)
    assert 0.7 < args.memory_estimate.moment / peak.peak < 1.3


def test_the_weights_of_an_estimate_are_those_of_the_modules():
    from utils.memory import weights_gib

    pipeline, args = optimized("--memory", "full")
    assert args.memory_estimate.weights / GIB == pytest.approx(weights_gib(pipeline), rel=0.01)


@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K", "Q3_K"])
def test_decoding_a_matrix_stays_within_its_estimate(kind):
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    layer = GGUFLinear(1024, 512, compute_dtype=torch.bfloat16)
    data = torch.zeros(512, 1024 // block * size, dtype=torch.uint8)
    layer.weight = GGUFParameter(data, quant_type=kind)
    with PeakTensors() as peak, torch.no_grad():
        layer(torch.zeros(1, 1024, dtype=torch.bfloat16))
    assert peak.peak <= memory_tiers.GGUF_BYTES_OF_A_WEIGHT * 512 * 1024


@pytest.fixture
def flux(as_machine):
    """Give a function: flags -> the settled run of a full-size FLUX.1-dev on a GPU with float8."""
    as_machine(ADA)
    return lambda *flags: make_args(*FLUX, *flags)


def test_every_tier_needs_less_than_the_one_before(flux):
    args = flux("--memory", "full", "--num_images_per_prompt", "2")
    needed = [estimate(args, tier, "fp8").gib for tier in TIERS]
    assert needed == sorted(needed, reverse=True)
    assert len(set(needed)) == len(TIERS)


@pytest.mark.parametrize(
    ("free", "tier", "loaded"),
    [
        ("40GiB", "full", "cuda"),  # bf16 weights while loading: 31 GiB
        ("28GiB", "full", "cpu"),  # float8 fits, what it is made from does not
        ("20GiB", "encoders", "cpu"),
        ("7GiB", "group", "cpu"),
        ("2.2GiB", "sequential", "cpu"),
    ],
)
def test_the_free_memory_chooses(free, tier, loaded, flux):
    args = flux("--memory", free, "--device", "cuda")
    assert (args.tier, args.load_device) == (tier, loaded)
    assert f"tier {tier}, chosen for {free}" in card.render(args).replace(".0GiB", "GiB")
    offloaded = tier in ("group", "sequential")
    assert args.compile_export_mode == ("disabled" if offloaded else "export_aoti")


@pytest.mark.parametrize(
    ("bits", "gib", "tier"),
    [(8.5, 16, "encoders"), (6.5625, 12, "tiled"), (4.5, 10, "encoders"), (3.4375, 8, "encoders")],
)
def test_files_of_fewer_bits_keep_small_gpus_resident(bits, gib, tier, flux):
    """Q8 on 12 to 24 GB, Q6, Q4 and Q3 on 8 to 12: at 1024x1024, from the types' sizes."""
    args = flux("--memory", "full", "--disable_quant")
    size = int(11_901_408_320 * bits / 8)
    fits = [t for t in TIERS if estimate(args, t, "", size).gib <= gib * 0.98]
    assert tier in fits and "full" not in fits


def test_a_compressed_file_needs_room_to_decode_its_largest_matrix(flux):
    args = flux("--memory", "full", "--disable_quant")
    plain, compressed = (estimate(args, "tiled", "", size) for size in (None, 7 * GIB))
    largest = 3072 * 6 * 3072 + 6 * 3072  # a double block's modulation
    assert compressed.moment - plain.moment == memory_tiers.GGUF_BYTES_OF_A_WEIGHT * largest
    transformer = 11_901_408_320  # parameters
    assert plain.weights - compressed.weights == pytest.approx(2 * transformer - 7 * GIB, abs=2)


@pytest.mark.parametrize("kind", ["schnell", "dev", "Kontext-dev"])
@pytest.mark.parametrize(
    "flags",
    [
        ("--disable_quant", "--compile_export_mode", "disabled"),
        ("--num_images_per_prompt", "4"),
        ("--disable_quant", "--num_images_per_prompt", "4"),
    ],
)
def test_full_size_rows_stay_on_an_h100(kind, flags, as_machine):
    """What results/gpu_session.sh runs there: all weights are on the device, bf16 while loading."""
    as_machine(H100)
    image = ("--image", "tiny_flux/source.png") if kind == "Kontext-dev" else ()
    args = make_args("--ckpt", f"black-forest-labs/FLUX.1-{kind}", *FLUX[2:], *image, *flags)
    assert (args.tier, args.load_device) == ("full", "cuda")
    assert estimate(args, "full").gib < 40
    assert args.plan["memory"].state == "off"


def test_an_fp32_reference_is_refused_where_it_has_no_room(as_machine):
    """33 GiB of bf16 weights stay while fp32's 67 are loaded."""
    as_machine(H100)
    with pytest.raises(UserError, match=r"--fp32_reference: .*98\.\d GiB, found 78\.0 GiB free"):
        check_room(make_args(*FLUX))
    check_room(make_args(*FLUX, "--memory", "group", "--disable_quant"))
    check_room(make_args("--ckpt", "tiny-dev", "--disable_fa3"))
    as_machine(replace(H100, memory_gib=140.0))
    check_room(make_args(*FLUX))
    args = make_args(*FLUX, "--memory", "60GiB")
    vars(args).update(fp32_reference=True, quality_prompts=1)
    with pytest.raises(UserError, match=r"found 60\.0 GiB free; leave it out"):  # before loading
        row.measure_row(args)


def test_too_little_is_one_line_before_anything_is_loaded(flux):
    with pytest.raises(UserError) as error:
        flux("--memory", "1GiB")
    (line,) = str(error.value).splitlines()
    assert line.startswith("--memory 1GiB: the least that this call needs is")
    assert "--gguf_file" in line and "--memory sequential" in line and "images" not in line
    with pytest.raises(UserError, match="use fewer images at once, a smaller --height and"):
        flux("--memory", "40GiB", "--num_images_per_prompt", "1000000")


def test_a_cpu_has_nowhere_to_send_weights():
    assert make_args("--device", "cpu").tier == "full"
    with pytest.raises(UserError, match="tier tiled"):
        make_args("--device", "cpu", "--memory", "100MiB")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("group", "--compile_export_mode", "compile"), "--compile_export_mode disabled"),
        (("sequential", "--compile_export_mode", "export_aoti"), "--compile_export_mode disabled"),
        (("tiled", "--compile_export_mode", "export_aoti"), "--compile_export_mode compile"),
        (("group", "--modulation_once"), "--modulation_once calls the modulation outside"),
        (
            ("encoders", "--compile_text_encoders", "--compile_export_mode", "compile"),
            "leave out --compile_text_encoders",
        ),
        (("group", "--ckpt", "tiny-dev", "--cache_dit_config", "cache_config.yaml"), "step cache"),
    ],
)
def test_what_moving_weights_do_not_go_with_is_refused(flags, says):
    with pytest.raises(UserError) as error:
        make_args("--device", "cpu", "--memory", *flags)
    assert any(f"--memory {flags[0]}: " in x and says in x for x in str(error.value).splitlines())


def test_unknown_tiers_are_one_line():
    done = script("gen_image.py", "--memory", "little")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "found 'little', expected auto, full, encoders" in done.stderr


@pytest.fixture(scope="module")
def full():
    """Give a function: flags -> latents and picture of a run with everything resident."""
    made = {}

    def run(*flags):
        if flags not in made:
            pipeline, args = optimized("--memory", "full", *flags)
            made[flags] = quality.run(pipeline, args)
        return made[flags]

    return run


@pytest.mark.parametrize("tier", TIERS[1:])
def test_every_tier_runs_and_changes_no_bit_of_one_tile(tier, full):
    pipeline, args = optimized("--memory", tier, *SMALL)
    assert args.plan["memory"].lossless
    for _ in range(2):  # the weights find their way back
        found = quality.run(pipeline, args)
        assert torch.equal(found.latents, full(*SMALL).latents)
        assert found.images[0].tobytes() == full(*SMALL).images[0].tobytes()


def test_tiles_are_nearly_the_same_picture(full):
    pipeline, args = optimized("--memory", "tiled", "--num_images_per_prompt", "2")
    assert not args.plan["memory"].lossless
    whole = full("--num_images_per_prompt", "2")
    found = quality.run(pipeline, args)
    assert torch.equal(found.latents, whole.latents)
    assert quality.compare(found, whole)["psnr_db_worst"] > 32  # each tile has its own GroupNorm


def test_docs_memory_has_what_tiles_cost_other_pictures():
    results = []
    for tier in ("full", "tiled"):
        pipeline, args = optimized("--memory", tier)
        results.append(quality.run(pipeline, args, quality_prompts(args)))
    scores = quality.compare(results[1], results[0])
    page = " ".join((ROOT / "docs" / "memory.md").read_text().split())
    told = re.search(r"eight keep ([\d.]+) dB on average, ([\d.]+) in the worst", page)
    found = scores["psnr_db_mean"], scores["psnr_db_worst"]
    assert found == pytest.approx([float(number) for number in told.groups()], abs=0.3)


def test_other_errors_pass_and_a_failed_allocation_is_one_line():
    args = make_args("--device", "cpu")
    with pytest.raises(RuntimeError, match="shape"), out_of_memory_explained(args):
        raise RuntimeError("shape")
    with pytest.raises(UserError) as error, out_of_memory_explained(args):
        torch.empty(2**50)
    (line,) = str(error.value).splitlines()
    assert line.startswith("out of memory in tier full (RuntimeError: ")
    args.tier = "tiled"
    with pytest.raises(UserError, match="no tier needs less"), out_of_memory_explained(args):
        torch.empty(2**50)


def test_running_out_of_memory_names_the_next_tiers_command(tmp_path):
    """100,000 images: 3.1 GiB for T5's states alone, where 4.5 GiB may be mapped in all."""
    target = tmp_path / "x.png"
    words = ["--memory", "full", "--num_images_per_prompt", "100000", "--output-file", str(target)]
    done = subprocess.run(
        [sys.executable, "gen_image.py", "--device", "cpu", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (9 * GIB // 2,) * 2),
    )
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory in tier full")
    assert last.endswith(f"next: python gen_image.py --device cpu {' '.join(words)} --memory tiled")
    assert not target.exists()

"""One row: the stored reference, what "lossless" has to keep, outliers, kernels, memory."""

import copy
from dataclasses import replace

import pytest
import report_pieces
import torch
from conftest import make_args
from PIL import Image

from utils import kernel_table, quality, reference, row
from utils.benchmark_utils import Spread
from utils.checkpoints import BUNDLED_DIR
from utils.errors import UserError
from utils.memory import add_graphs, weights_gib
from utils.pipeline_utils import generate, load_pipeline
from utils.prompts import QUALITY, quality_prompts
from utils.report_rows import problem


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Give args and an untouched pipeline with a cache folder of their own."""
    where = str(tmp_path_factory.mktemp("home") / "cache")
    args = make_args("--device", "cpu", "--cache-dir", where)
    return args, load_pipeline(args)


def test_a_reference_is_made_once_and_read_back_bit_by_bit(run, monkeypatch):
    args, pipeline = run
    prompts = quality_prompts(args)[:2]
    made, path = reference.load_or_make(pipeline, args, prompts, with_fp32=True)
    monkeypatch.setattr(quality, "run", lambda *_: pytest.fail("made again"))
    kept, again = reference.load_or_make(pipeline, args, prompts, with_fp32=True)
    assert again == path and list(path.parent.glob("reference-*")) == [path]
    for name in ("eager", "fp32"):
        assert torch.equal(kept[name].latents, made[name].latents)
        for a, b in zip(kept[name].images, made[name].images, strict=True):
            assert a.tobytes() == b.tobytes()
    assert kept["other_seed_psnr_db"] == made["other_seed_psnr_db"]
    assert 15 < made["other_seed_psnr_db"] < 40


def test_a_damaged_reference_is_made_again(run, capsys):
    args, pipeline = run
    prompts = quality_prompts(args)[:1]
    made, path = reference.load_or_make(pipeline, args, prompts, with_fp32=False)
    path.write_bytes(path.read_bytes()[:-100])
    again, _ = reference.load_or_make(pipeline, args, prompts, with_fp32=False)
    assert torch.equal(made["eager"].latents, again["eager"].latents)
    assert "cannot be read" in capsys.readouterr().err


def test_fp32_starts_from_the_noise_of_bf16(run, tmp_path, monkeypatch):
    """torch 2.11 draws other numbers in bf16 than in fp32 from the same seed."""
    from diffusers.pipelines.flux import pipeline_flux

    draw = pipeline_flux.randn_tensor

    def as_torch_2_11(*shape, dtype, **how):
        noise = draw(*shape, dtype=dtype, **how)
        return noise.flip(-1) if dtype == torch.bfloat16 else noise

    monkeypatch.setattr(pipeline_flux, "randn_tensor", as_torch_2_11)
    args, pipeline = copy.copy(run[0]), run[1]
    args.cache_dir = str(tmp_path / "cache")
    made, _ = reference.load_or_make(pipeline, args, quality_prompts(args)[:1], with_fp32=True)
    assert quality.relative_l2(made["eager"].latents, made["fp32"].latents) < 0.05
    assert pipeline_flux.randn_tensor is as_torch_2_11


@pytest.mark.parametrize(
    "change",
    [{"seed": 3}, {"width": 160}, {"num_inference_steps": 2}, {"max_sequence_length": 32}],
)
def test_another_call_has_another_reference(run, change):
    args, _ = run
    other = copy.copy(args)
    vars(other).update(change)
    prompts = quality_prompts(args)
    assert reference.identity_of(args, prompts, True) != reference.identity_of(other, prompts, True)
    assert reference.identity_of(args, prompts, True) != reference.identity_of(
        args, prompts[:3], True
    )


def test_another_number_of_threads_has_another_reference_on_a_cpu(run, monkeypatch):
    args, prompts = copy.copy(run[0]), quality_prompts(run[0])
    for device, differs in (("cpu", True), ("cuda", False)):
        args.machine, found = replace(args.machine, device=device), []
        for threads in (1, 2):
            monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
            found.append(reference.identity_of(args, prompts, True))
        assert (found[0] != found[1]) == differs


def test_scores_tell_a_damaged_picture_from_the_right_one(run):
    args, pipeline = run
    prompts = quality_prompts(args)[:2]
    kept, _ = reference.load_or_make(pipeline, args, prompts, with_fp32=True)
    same = reference.scores(kept["eager"], kept, args, prompts)
    assert same["psnr_db_worst"] is None and same["identical_images"] == 2
    assert same["ssim_worst"] == 1.0 and same["latents_cosine"] == pytest.approx(1.0)
    assert same["fp32_relative_l2"] == same["eager_fp32_relative_l2"] > 1e-4
    assert same["checker_right"] == 1.0
    swapped = quality.Result(kept["eager"].images[::-1], kept["eager"].latents.flip(0))
    wrong = reference.scores(swapped, kept, args, prompts)
    assert wrong["psnr_db_worst"] < same["other_seed_psnr_db"]
    assert wrong["ssim_worst"] < 0.9 and wrong["latents_cosine"] < 0.9
    assert wrong["checker_right"] == 0.0


def test_more_prompts_than_the_batch_go_through_in_calls_of_its_size(run):
    args, pipeline = run
    pair = copy.copy(args)
    pair.prompt = ["a red circle on a blue background"] * 2
    prompts = quality_prompts(args)[:3]
    seen = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda module, _, kwargs: seen.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    result = quality.run(pipeline, pair, prompts)
    handle.remove()
    assert len(result.images) == len(result.latents) == 3
    assert set(seen) == {2}
    single = copy.copy(args)
    single.prompt, single.seed = [prompts[2]], args.seed + 2
    assert quality.psnr_db(result.images[2], generate(pipeline, single)[0]) > 35


def test_a_lossy_run_that_calls_itself_lossless_fails(tmp_path, monkeypatch, float8_on_cpu):
    from utils.steps import Verdict, quant

    check = quant.check
    monkeypatch.setattr(
        quant, "check", lambda args: Verdict("on", lossless=True, settings=check(args).settings)
    )
    flags = ("--cache-dir", str(tmp_path / "cache"), "--num_inference_steps", "4")
    args = make_args("--device", "cpu", *flags)
    vars(args).update(num_runs=1, num_warmup=0, quality_prompts=2, fp32_reference=False)
    vars(args).update(measure_ceilings=False, pictures=None)
    with pytest.raises(RuntimeError, match="called lossless, but its latents are"):
        row.measure_row(args)


def test_outliers_are_told_and_even_runs_are_not():
    even = Spread((1.0, 1.01, 1.02, 1.0, 0.99, 1.01))
    assert row.outliers(even) == []
    (line,) = row.outliers(Spread((2.0, *even.samples)))
    assert "1 of 7 runs took far longer (up to 2 s)" in line and "--num_warmup" in line


def test_stages_are_the_runs_regions_and_nothing_is_counted_twice():
    run = {"prompt_encoding": [0.5], "denoising_step": [1.0, 2.0], "decoding": [0.75]}
    run |= {"postprocessing": [0.5], "pil_conversion": [0.125]}
    regions = [run, run | {"decoding": [1.0], "postprocessing": [0.25]}]
    found = {name: spread.samples for name, spread in row.stage_seconds(regions, 2).items()}
    assert found == {
        "prompt_encoding": (0.5, 0.5),
        "denoising_step": (1.0, 2.0, 1.0, 2.0),
        "decoding": (0.75, 1.0),
        "pil_conversion": (0.125, 0.125),
        "postprocessing": (0.375, 0.125),  # without the conversion
    }
    one_graph = {key: value for key, value in run.items() if key != "denoising_step"}
    one_graph |= {"denoising_loop": [3.0], "image_encoding": [0.25]}
    found = row.stage_seconds([one_graph], 4)
    assert found["denoising_step"].samples == (0.75,)
    assert found["image_encoding"].samples == (0.25,)


def test_clocks_are_the_lowest_and_highest_of_those_that_were_read():
    states = [{"clocks.sm": text} for text in ("1980", "1755", "[N/A]")]
    assert row._clocks(states) == {"clocks_mhz": {"min": 1755, "max": 1980}}
    assert row._clocks([{}, states[2]]) == {}


def test_a_row_is_written_with_what_it_has():
    stage = report_pieces.row()["stages_s"]["denoising_step"]
    quality_of = report_pieces.row()["quality"]
    lines = row.render(report_pieces.row(stages_s={"denoising_step": stage})).splitlines()
    assert any(line.endswith("another seed: 9.0), SSIM 0.9990") for line in lines)
    assert any(line.endswith("5.50e-03 against fp32 (eager itself 5.00e-03)") for line in lines)
    assert "roofline" in lines and any("75.2 % of the peak; 1.33 times" in line for line in lines)
    assert not any(line.startswith(("checker", "CLIP", "full size", "note")) for line in lines)
    same = {"psnr_db_worst": None, "fp32_relative_l2": None, "checker_right": 0.875}
    same |= {"clip_score": 30.0, "eager_clip_score": 31.0, "quality_source": "tiny-schnell"}
    lines = row.render(report_pieces.row(quality=quality_of | same, roofline={})).splitlines()
    assert "quality     8 prompts against bfloat16 eager (tiny-schnell): PSNR identical" in lines
    assert "latents     relative L2 error 6.00e-03 against eager" in lines
    assert "checker     88 % of the pictures right" in lines and "roofline" not in lines
    assert "CLIP score  30.00 (eager: 31.00)" in lines


def test_gaps_and_groups_of_a_timeline():
    spans = [("sm90_gemm", 0, 10), ("triton_poi_fused_mul", 10, 15), ("flash_fwd", 25, 45)]
    spans += [("sm90_gemm", 45, 50), ("Memcpy DtoD", 46, 48)]  # two at once
    kernels, idle, total = kernel_table.summarise(spans)
    assert kernels["sm90_gemm"] == (pytest.approx(15e-6), 2)
    assert idle == pytest.approx(10e-6) and total == pytest.approx(50e-6)
    expected = {
        "sm90_gemm": "linear",
        "triton_poi_fused_mul": "norm and elementwise",
        "flash_fwd": "attention",
        "Memcpy DtoD": "copies",
        "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc": "convolution",
        "triton_tem_fused_addmm_3": "linear",
        "triton_poi_fused_addmm_gelu_4": "norm and elementwise",  # a bias, not its product
        "triton_per_fused_convolution_native_group_norm_7": "norm and elementwise",
        "triton_red_fused__scaled_mm_abs_amax_clamp_5": "quantisation",
        "float8_product_kernel": "linear",
    }
    assert set(kernels) < set(expected)
    assert {name: kernel_table.group_of(name) for name in expected} == expected


def test_a_row_from_an_nvidia_machine_can_be_read(tmp_path, monkeypatch):
    from utils import card
    from utils.hardware import Machine

    def environment(power_limit: str) -> dict:
        smi = tmp_path / "nvidia-smi"
        smi.write_text(f"#!/bin/sh\necho '580.159.04, {power_limit}, 345, 1980, 31'\n")
        smi.chmod(0o755)
        return card.environment(args)

    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    args = make_args("--device", "cpu", checks=False)
    args.machine, args.device = Machine("cuda", "NVIDIA H100 80GB HBM3", (9, 0)), "cuda"
    for said, found in (("700.00", 700), ("[N/A]", None)):
        about = environment(said)
        assert about["power_limit_w"] == found and about["driver"] == "580.159.04"
        assert problem(report_pieces.row(environment=about)) == ""


def test_the_kernel_table_of_a_real_call(run):
    args, pipeline = run
    text = kernel_table.render(lambda: generate(pipeline, args), "cpu")
    assert "aten::addmm" in text and "linear" in text and "attention" in text


def test_weights_are_counted_once(run):
    _, pipeline = run
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    expected = sum(t.numel() * t.element_size() for t in tensors) / 2**30
    assert weights_gib(pipeline) == pytest.approx(expected, rel=0.01)


def test_what_graphs_work_in_is_part_of_the_peak(monkeypatch):
    """The allocator's own peak is that of what happens beside the replays."""

    def segment(pool, total, allocated):
        size = {"total_size": total * 2**20, "allocated_size": allocated * 2**20}
        return {"segment_pool_id": pool, **size}

    segments = [segment((0, 0), 2048, 512), segment((0, 1), 1024, 1), segment((7, 0), 512, 511)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    peaks = {"allocated_peak_gib": 30.0, "reserved_peak_gib": 33.5}
    add_graphs(peaks)
    assert peaks == {"allocated_peak_gib": 31.0, "reserved_peak_gib": 33.5}


def test_every_checkpoint_has_eight_prompts_in_its_own_words():
    from tiny_flux.edits import obey
    from tiny_flux.scenes import Scene, parse

    assert all(len(set(prompts)) == 8 for prompts in QUALITY.values())
    assert all(parse(prompt) is not None for prompt in QUALITY["tiny"])
    before = Scene("circle", "red", "blue")
    assert all(obey(prompt, before) not in (None, before) for prompt in QUALITY["tiny edits"])


@pytest.mark.parametrize("kind", ["schnell", "kontext"])
def test_random_weights_show_the_quality_of_the_trained_checkpoint(kind, tmp_path, capsys):
    source = tmp_path / "source.png"
    Image.new("RGB", (128, 128), "red").save(source)
    flags = ["--ckpt", f"tiny-{kind}", "--random_weights", "--num_inference_steps", "2"]
    flags += ["--image", str(source)] if kind == "kontext" else []
    args = make_args("--device", "cpu", "--cache-dir", str(tmp_path / "cache"), *flags)
    vars(args).update(num_runs=1, num_warmup=1, quality_prompts=1, fp32_reference=False)
    vars(args).update(measure_ceilings=False, pictures=None, quality_source="bundled")
    found, _, _ = row.measure_row(args)
    assert found["stages_s"]["decoding"]["n"] == 1  # the warm-up's is forgotten
    quality_of, own = found["quality"], found["full_size"]
    assert quality_of["quality_source"] == f"tiny-{kind} at 128x128 under the same flags"
    assert quality_of["fp32_relative_l2"] is not None and quality_of["checker_right"] is not None
    assert own["checker_right"] is None and own["latents_relative_l2"] < 0.1
    assert ("image_encoding" in found["stages_s"]) == (kind == "kontext")
    text = row.render(found)
    assert f"(tiny-{kind} at 128x128" in text and "full size   random weights" in text
    assert not problem(found)


def test_the_source_of_those_edits_is_a_scene_that_the_checkpoint_knows():
    from tiny_flux.scenes import Scene, render

    with Image.open(BUNDLED_DIR / "source.png") as source:
        assert source.convert("RGB").tobytes() == render(Scene("circle", "red", "blue")).tobytes()


@pytest.mark.parametrize("clip", ["nosuch", "utils"])
def test_a_clip_that_is_not_there_is_refused_before_loading(clip, monkeypatch):
    monkeypatch.setattr(row, "announce_and_load", None)
    args = make_args()
    args.clip_score = clip
    with pytest.raises(UserError, match=f"--clip_score {clip}: "):
        row.measure_row(args)


def test_clip_scores_come_from_the_clip_that_is_named(tmp_path, run):
    """An untrained CLIP in transformers' layout: scores mean nothing, their path is real."""
    import shutil

    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    args, pipeline = run
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    size["num_attention_heads"] = 2
    words = size | {"vocab_size": len(pipeline.tokenizer)}
    words["eos_token_id"] = pipeline.tokenizer.eos_token_id
    seen = size | {"image_size": 32, "patch_size": 16}
    config = CLIPConfig(text_config=words, vision_config=seen, projection_dim=16)
    CLIPModel(config).save_pretrained(tmp_path)
    shrink = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(shrink, pipeline.tokenizer).save_pretrained(tmp_path)
    prompts = quality_prompts(args)[:2]
    kept, _ = reference.load_or_make(pipeline, args, prompts, with_fp32=True)
    scored = copy.copy(args)
    scored.clip_score = str(tmp_path)
    found = reference.scores(kept["eager"], kept, scored, prompts)
    assert found["clip_score"] == found["eager_clip_score"] != 0
    assert "clip_score" not in reference.scores(kept["eager"], kept, args, prompts)
    swapped = quality.clip_score(kept["eager"].images[::-1], prompts, str(tmp_path))
    assert swapped != found["clip_score"]
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match=r"--clip_score .*: no CLIP that can be loaded"):
        quality.clip_score(kept["eager"].images, prompts, str(tmp_path))

"""Each step, every toggle and all steps together against plain diffusers, by pictures and latents.

Bounds stand between what was measured and what another seed gives: a picture of another seed is
at about 15 to 25 dB, so 35 dB means the same picture.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import TOGGLES, make_args, optimized

from utils import quality
from utils.pipeline_utils import generate

PROMPT = ("--prompt", "a red circle on a blue background")
ALONE = {
    "fused_projections": TOGGLES[1:3],
    "fa3": (TOGGLES[0], TOGGLES[2]),
    "channels_last": TOGGLES[0:2],
}


def distance(pipeline, args, reference) -> dict:
    """Run and compare; PSNR of identical pictures counts as 99 dB."""
    scores = quality.compare(quality.run(pipeline, args), reference)
    scores["psnr"] = 99.0 if scores["psnr_db_worst"] is None else scores["psnr_db_worst"]
    return scores


@pytest.mark.parametrize("name", ALONE)
def test_each_lossless_step_alone(name, reference):
    pipeline, args = optimized(*PROMPT, *ALONE[name])
    assert [step for step, verdict in args.plan.items() if verdict.is_on] == [name]
    scores = distance(pipeline, args, reference(*PROMPT))
    assert scores["psnr"] > 40, scores
    assert scores["latents_relative_l2"] < 0.02, scores


def test_reference_is_a_red_circle_on_blue(reference):
    image = np.asarray(reference(*PROMPT).images[0]).astype(int)
    assert image.shape == (128, 128, 3)
    red, green, blue = image[64, 64]
    assert red > 150 and green < 100 and blue < 100
    red, green, blue = image[8, 8]
    assert blue > 120 and red < 120


def test_float8_and_all_eager_steps(reference, float8_on_cpu):
    pipeline, args = optimized(*PROMPT)
    assert args.plan["quant"].is_on and not args.plan["quant"].lossless
    scores = distance(pipeline, args, reference(*PROMPT))
    assert scores["psnr"] > 30, scores
    assert scores["latents_relative_l2"] < 0.1, scores


@pytest.mark.parametrize("toggle", TOGGLES[:4])
def test_every_single_toggle(toggle, reference, float8_on_cpu):
    pipeline, args = optimized(*PROMPT, toggle)
    off = [name for name, verdict in args.plan.items() if verdict.reason == toggle]
    assert len(off) == 1
    assert distance(pipeline, args, reference(*PROMPT))["psnr"] > 30


def test_fp32_is_closer_to_nothing_but_itself(reference):
    """Lossless steps in fp32 leave rounding only."""
    pipeline, args = optimized(*PROMPT, "--disable_bf16", "--disable_quant")
    scores = distance(pipeline, args, reference(*PROMPT, "--disable_bf16"))
    assert scores["psnr"] > 60, scores
    assert scores["latents_relative_l2"] < 1e-4, scores


@pytest.fixture
def seen_by_inductor(monkeypatch):
    """Record the four switches as Inductor has them while it lowers a graph."""
    from torch._inductor import config, graph

    from utils.steps.inductor_tuning_flags import FLAGS

    seen = []
    run = graph.GraphLowering.run

    def recording(self, *args, **kwargs):
        seen.append({name: getattr(config, name) for name in FLAGS})
        return run(self, *args, **kwargs)

    monkeypatch.setattr(graph.GraphLowering, "run", recording)
    return seen


def fresh_compiler():
    """Forget compiled code, on disk too: what the compiler saw must be seen again."""
    torch._dynamo.reset()
    return torch._inductor.utils.fresh_inductor_cache()


@pytest.mark.parametrize(
    ("scope", "flags_on"),
    [
        ("full", True),
        pytest.param("blocks", True, marks=pytest.mark.slow),
        pytest.param("blocks", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_what_the_compiler_saw_and_no_recompilation_in_timed_runs(
    scope, flags_on, reference, seen_by_inductor
):
    from utils.benchmark_utils import measure
    from utils.steps.inductor_tuning_flags import FLAGS

    flags = [*PROMPT, "--compile_export_mode", "compile", "--compile_scope", scope]
    flags += [] if flags_on else ["--disable_inductor_tuning_flags"]
    with fresh_compiler():
        pipeline, args = optimized(*flags)
        compiled = len(seen_by_inductor)  # double block, single block, decoder
        assert compiled >= {"full": 2, "blocks": 3}[scope]
        assert measure(lambda: generate(pipeline, args), "cpu", 2, 0).samples
        scores = distance(pipeline, args, reference(*PROMPT))
        assert len(seen_by_inductor) == compiled  # the warm-up compiled all that the call needs
        wide = make_args("--device", "cpu", *PROMPT, "--width", "160")
        with pytest.raises(RuntimeError, match=r"(?i)recompil"):
            measure(lambda: generate(pipeline, wide), "cpu", 1, 0)
    expected = {name: value if flags_on else not value for name, value in FLAGS.items()}
    assert all(switches == expected for switches in seen_by_inductor)
    assert scores["psnr"] > 35, scores


def test_everything_together_with_float8_and_aoti(reference, float8_on_cpu, tmp_path):
    pipeline, args = optimized(
        *PROMPT, "--compile_export_mode", "export_aoti", "--cache-dir", str(tmp_path / "packages")
    )
    on = {name for name, verdict in args.plan.items() if verdict.is_on}
    default = {"fused_projections", "fa3", "channels_last", "quant", "inductor_tuning_flags"}
    assert on == default | {"export_aoti"}  # every other step waits to be asked for
    scores = distance(pipeline, args, reference(*PROMPT))
    assert scores["psnr"] > 30, scores
    assert scores["latents_relative_l2"] < 0.1, scores


BATCH = (
    "--prompt",
    "a red circle on a blue background",
    "--prompt",
    "a large green square on a yellow background",
    "--num_images_per_prompt",
    "2",
)


def test_a_batch_equals_its_single_images(reference):
    """Image k of a batch is the single image of seed + k, but for the order of sums in bf16."""
    pipeline, args = optimized(*BATCH, "--disable_bf16")
    batch = generate(pipeline, args)
    assert len(batch) == 4
    for k, image in enumerate(batch):
        single = reference("--prompt", args.prompt[k // 2], "--seed", str(k), "--disable_bf16")
        assert quality.psnr_db(image, single.images[0]) > 50


@pytest.mark.parametrize(("width", "height"), [(160, 96), (96, 160), (16, 16), (208, 128)])
def test_other_sizes(width, height, reference):
    size = ("--width", str(width), "--height", str(height))
    pipeline, args = optimized(*PROMPT, *size)
    image = generate(pipeline, args)[0]
    assert image.size == (width, height)
    assert quality.psnr_db(image, reference(*PROMPT, *size).images[0]) > 35


def test_sizes_and_batches_may_change_between_calls(reference):
    pipeline, _ = optimized(*PROMPT)
    for flags in (("--width", "160"), (), BATCH[2:4], ("--max_sequence_length", "64")):
        args = make_args("--device", "cpu", *PROMPT, *flags)
        images = generate(pipeline, args)
        for image, expected in zip(images, reference(*PROMPT, *flags).images, strict=True):
            assert quality.psnr_db(image, expected) > 35


def test_the_same_seed_gives_the_same_picture_and_another_seed_another(reference):
    pipeline, args = optimized(*PROMPT)
    first, again = generate(pipeline, args)[0], generate(pipeline, args)[0]
    assert first.tobytes() == again.tobytes()
    other = make_args("--device", "cpu", *PROMPT, "--seed", "1")
    assert quality.psnr_db(generate(pipeline, other)[0], first) < 35


def test_sane_results_only(reference):
    result = reference(*PROMPT)
    black = quality.Result([result.images[0].point(lambda _: 0)], result.latents)
    with pytest.raises(RuntimeError, match="constant"):
        quality.check_sane(black)
    with pytest.raises(RuntimeError, match="not finite"):
        quality.check_sane(quality.Result(result.images, result.latents * float("nan")))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "compile", "export_aoti"])
@pytest.mark.parametrize("chosen", list(itertools.product((False, True), repeat=len(TOGGLES))))
def test_every_combination_of_toggles(chosen, mode, reference, float8_on_cpu, tmp_path):
    flags = [flag for flag, wanted in zip(TOGGLES, chosen, strict=True) if wanted]
    where = ("--cache-dir", str(tmp_path / "packages")) if mode == "export_aoti" else ()
    torch._dynamo.reset()
    pipeline, args = optimized(*PROMPT, *flags, "--compile_export_mode", mode, *where)
    assert distance(pipeline, args, reference(*PROMPT))["psnr"] > 30

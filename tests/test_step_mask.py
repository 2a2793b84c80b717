"""The step mask: what is predicted, when the transformer is not called, and what stays behind."""

from collections import Counter

import pytest
import torch
from conftest import make_args
from test_cudagraph import RerunRecorder

from utils import card, quality, roofline
from utils.benchmark_utils import StageClock, annotate_pipeline
from utils.calls import only_known_calls
from utils.cudagraph import GraphPool, wrap_components
from utils.errors import UserError
from utils.masked_forward import MaskedForward, install, weights
from utils.pipeline_utils import generate, load_pipeline, optimize, reused_steps
from utils.steps import step_mask
from utils.steps.step_mask import PRESETS, mask_of

DEV = ("--ckpt", "tiny-dev", "--max_sequence_length", "64")
SHORT = (*DEV, "--num_inference_steps", "6")
SOME = ("--step_mask", "1,1,0,1,0,0")
COMPUTED = {"computed": [0, 1, 3], "reused": [2, 4, 5]}


def run_of(*flags):
    return make_args("--device", "cpu", *flags)


def pipeline_of(*flags):
    args = run_of(*flags)
    return optimize(load_pipeline(args), args), args


def counted(pipeline) -> list:
    """Note every call that reaches the transformer's blocks."""
    calls = []
    pipeline.transformer.norm_out.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.fixture(scope="module")
def masked():
    """Give a pipeline with a mask, the calls of its transformer, and its run."""
    pipeline, args = pipeline_of(*SHORT, *SOME)
    return pipeline, counted(pipeline), args


def test_weights_are_those_of_the_polynomial_through_the_points():
    assert weights((4,), 9) == [1.0]
    assert weights((2, 3), 5) == [-2.0, 3.0]
    assert weights((0, 1, 3), 4) == pytest.approx([1.0, -2.0, 2.0])  # by hand


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_polynomial_in_the_step_is_predicted_exactly(order):
    """A velocity of that degree comes back from the steps that were left out; a higher one not."""
    factors = torch.tensor([[3.0, -2.0], [0.5, 1.5], [-0.25, 0.125], [0.5, -1.0]])

    def velocity(step, degree):
        return sum(factors[k] * float(step) ** k for k in range(degree + 1)).view(1, 1, 2)

    mask = "1110100010"
    for degree in (order, order + 1):
        steps = iter([step for step, computed in enumerate(mask) if computed == "1"])
        forward = MaskedForward(
            lambda steps=steps, degree=degree: (velocity(next(steps), degree),),
            lambda n: tuple(computed == "1" for computed in mask),
            order,
        )
        with forward.call(len(mask)):
            found = torch.cat([forward()[0] for _ in mask])
        expected = torch.cat([velocity(step, degree) for step in range(len(mask))])
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5) == (degree == order)


@pytest.mark.parametrize(("gain", "expected"), [(1.0, 7.0), (0.5, 5.0), (0.0, 3.0)])
def test_half_a_gain_is_half_the_change(gain, expected):
    values = iter([torch.tensor([1.0]), torch.tensor([3.0])])
    forward = MaskedForward(lambda: (next(values),), lambda n: (True, True, False, False), 1, gain)
    with forward.call(4):
        assert [float(forward()[0]) for _ in range(4)][3] == expected


def test_fewer_points_than_the_order_needs_lower_it():
    values = iter([torch.tensor([1.0]), torch.tensor([3.0])])
    forward = MaskedForward(lambda: (next(values),), lambda n: (True, False, True, False), 2)
    with forward.call(4):
        assert [float(forward()[0]) for _ in range(4)] == [1.0, 1.0, 3.0, 4.0]


def test_a_mask_of_ones_is_no_mask_bit_for_bit(reference):
    pipeline, args = pipeline_of(*SHORT, "--step_mask", "111111")
    plain, plain_args = pipeline_of(*SHORT)
    ours, theirs = quality.run(pipeline, args), quality.run(plain, plain_args)
    assert torch.equal(ours.latents, theirs.latents)
    assert ours.images[0].tobytes() == theirs.images[0].tobytes()
    assert reused_steps(pipeline, args) == {"computed": list(range(6)), "reused": []}
    assert reused_steps(plain, plain_args) is None


def test_the_transformer_is_not_called_on_reused_steps_and_the_card_says_which(masked):
    pipeline, calls, args = masked
    calls.clear()
    generate(pipeline, args)
    assert len(calls) == 3
    assert reused_steps(pipeline, args) == COMPUTED
    line = "step cache  3 of 6 steps computed: 0-1 3; 3 reused: 2 4-5"
    assert card.step_cache(COMPUTED) == [line]
    text = card.render(args)
    assert "mask=110100 computed=3/6 order=1 gain=0.5 psnr_on_flux=not-measured  [lossy]" in text
    assert not card.is_lossless(args)


def test_only_computed_steps_are_timed_as_denoising_steps():
    pipeline, args = pipeline_of(*SHORT, *SOME)
    clock = StageClock("cpu")
    annotate_pipeline(pipeline, clock)
    generate(pipeline, args)
    assert len(clock.read()["denoising_step"]) == 3
    assert reused_steps(pipeline, args) == COMPUTED


def test_calls_of_any_kind_leave_nothing_to_each_other(masked):
    pipeline, _, args = masked
    first = generate(pipeline, args)[0]
    others = (
        ("--prompt", "a large green square", "--seed", "5"),
        ("--width", "160", "--height", "96", "--num_images_per_prompt", "2"),
    )
    for other in others:
        images = generate(pipeline, run_of(*SHORT, *SOME, *other))
        assert generate(pipeline, args)[0].tobytes() == first.tobytes(), other
        assert reused_steps(pipeline, args) == COMPUTED
    assert len(images) == 2 and images[0].size == (160, 96)
    assert not pipeline.masked.known and pipeline.masked.mask is None


def test_a_batch_equals_its_single_images():
    flags = (*SHORT, *SOME, "--disable_bf16")
    pipeline, args = pipeline_of(*flags, "--num_images_per_prompt", "2")
    batch = generate(pipeline, args)
    for k, image in enumerate(batch):
        single = generate(pipeline, run_of(*flags, "--seed", str(k)))[0]
        assert quality.psnr_db(image, single) > 50


@pytest.mark.parametrize("at", [2, 4])
def test_an_interrupted_call_leaves_nothing_behind(masked, at):
    pipeline, calls, args = masked
    first = generate(pipeline, args)[0]
    calls.clear()
    seen = []

    def interrupt(*_):
        seen.append(1)
        if len(seen) == at:
            raise KeyboardInterrupt

    handle = pipeline.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, args)
    handle.remove()
    assert not pipeline.masked.known
    assert generate(pipeline, args)[0].tobytes() == first.tobytes()
    assert reused_steps(pipeline, args) == COMPUTED


def test_a_mask_keeps_the_picture_and_other_pipelines(reference):
    flags = ("--ckpt", "tiny-dev")
    pipeline, args = pipeline_of(*flags, "--step_mask", "medium")
    scores = quality.compare(quality.run(pipeline, args), reference(*flags))
    assert scores["psnr_db_worst"] > 31 and scores["latents_relative_l2"] > 0, scores
    stock = load_pipeline(args)
    assert not hasattr(stock, "masked") and "forward" not in vars(stock.transformer)


def test_kontext_and_its_own_loop(tmp_path):
    """Image tokens of the picture are predicted with the others; both loops agree."""
    image = ("--image", "tiny_flux/source.png", "--num_inference_steps", "6", "--disable_bf16")
    flags = ("--ckpt", "tiny-kontext", *image, "--max_sequence_length", "64", *SOME)
    stock, args = pipeline_of(*flags)
    own, own_args = pipeline_of(*flags, "--modulation_once")
    calls = counted(own)
    found = generate(own, own_args)[0]
    assert quality.psnr_db(found, generate(stock, args)[0]) > 60
    assert len(calls) == 3 and reused_steps(own, own_args) == COMPUTED


def test_predicted_steps_are_no_work_of_the_roofline():
    args = run_of(*SHORT, *SOME)
    assert roofline.call_of(args).steps == len(COMPUTED["computed"]) < args.num_inference_steps


def test_one_cuda_graph_serves_all_computed_steps():
    args = run_of(*SHORT, *SOME)
    pipeline = load_pipeline(args)
    wrap_components(pipeline, GraphPool(recorder := RerunRecorder()))
    graph = pipeline.transformer.forward
    step_mask.apply(pipeline, args)
    first = generate(pipeline, args)[0]
    assert graph.num_graphs == 1 and recorder.recorded == 2  # the decoder's is the other
    with only_known_calls():
        assert generate(pipeline, args)[0].tobytes() == first.tobytes()
    plain = load_pipeline(args)
    step_mask.apply(plain, args)
    assert generate(plain, args)[0].tobytes() == first.tobytes()


@pytest.mark.slow
def test_compiled_whole_with_float8_and_no_recompilation(float8_on_cpu):
    flags = (*SHORT, *SOME, "--compile_export_mode", "compile")
    torch._dynamo.reset()
    pipeline, args = pipeline_of(*flags)
    assert args.compile_scope == "full" and args.plan["quant"].is_on
    with only_known_calls():
        first = generate(pipeline, args)[0]
        assert generate(pipeline, args)[0].tobytes() == first.tobytes()
    eager, _ = pipeline_of(*SHORT, *SOME, "--disable_quant")
    assert quality.psnr_db(first, generate(eager, args)[0]) > 35
    assert reused_steps(pipeline, args) == COMPUTED


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--modulation_once",)])
def test_packages_are_those_of_a_run_without_a_mask(flags, tmp_path):
    where = ("--compile_export_mode", "export_aoti", "--cache-dir", str(tmp_path / "packages"))
    pipeline_of(*SHORT, *where, *flags)
    pipeline, args = pipeline_of(*SHORT, *where, *flags, *SOME, "--use-cached-model")
    image = generate(pipeline, args)[0]
    assert reused_steps(pipeline, args) == COMPUTED
    eager, _ = pipeline_of(*SHORT, *SOME)
    assert quality.psnr_db(image, generate(eager, args)[0]) > 35
    wide = run_of(*SHORT, *SOME, "--width", "96")  # a package of its own, not to be built here
    with pytest.raises(UserError, match="--use-cached-model"):
        generate(pipeline, wide)


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("1,0,1,0", 4, "1010"),
        ("1010", 4, "1010"),
        ("0-2,5", 7, "1110010"),
        ("0-1", 3, "110"),
        ("medium", 28, PRESETS["medium"].mask),
        ("medium", 14, "11101001001001"),
        ("medium", 56, "".join(2 * entry for entry in PRESETS["medium"].mask)),
    ],
)
def test_masks_are_read(text, steps, expected):
    assert "".join(str(int(computed)) for computed in mask_of(text, steps)) == expected


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_masks_of_28_steps_and_fit_any_number(name):
    preset = PRESETS[name]
    assert len(preset.mask) == 28 and set(preset.mask) == {"0", "1"}
    share = Counter(preset.mask)["1"] / 28
    for steps in range(1, 101):
        mask = mask_of(name, steps)
        assert len(mask) == steps and mask[0]
        assert 0 <= sum(mask) - share * steps < 1


def test_flags_go_before_the_presets_prediction():
    mask = ("--ckpt", "tiny-dev", "--step_mask", "fast")
    preset = PRESETS["fast"]
    assert step_mask.prediction(make_args(*mask)) == (preset.order, preset.gain)
    order, gain = preset.order + 1, preset.gain / 4
    flags = ("--step_mask_order", str(order), "--step_mask_gain", str(gain))
    assert step_mask.prediction(make_args(*mask, *flags)) == (order, gain)


WRONG = {
    "length": (("--step_mask", "1,0,1"), "found 3 entries, expected one for each of 6 steps"),
    "step": (("--step_mask", "0-2,9"), "found step 9, expected 0 to 5 of 6 steps"),
    "first": (("--step_mask", "1-3"), "step 0 is left out"),
    "backwards": (("--step_mask", "3-1"), "found '3-1', expected slow, "),
    "word": (("--step_mask", "ultra"), "found 'ultra', expected slow, "),
    "nothing": (("--step_mask", ","), "found '', expected slow, "),
    "order alone": (("--step_mask_order", "2"), "expected with --step_mask"),
    "gain alone": (("--step_mask_gain", "0.5"), "expected with --step_mask"),
    "gain": ((*SOME, "--step_mask_gain", "1.5"), "expected 0 to 1"),
    "cache": ((*SOME, "--cache_dit_config", "cache_config.yaml"), "decides about the same steps"),
    "schnell": (("--ckpt", "tiny-schnell", *SOME), "tiny-schnell takes 6 distilled steps"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_masks_are_refused_in_one_line(name):
    flags, expected = WRONG[name]
    with pytest.raises(UserError, match="--step_mask") as refusal:
        run_of(*SHORT, *flags)
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_calls_that_the_mask_cannot_follow_are_refused_by_name(masked):
    pipeline, calls, args = masked
    calls.clear()
    with pytest.raises(UserError, match="found 6 entries, expected one for each of 4 steps"):
        generate(pipeline, args, num_inference_steps=4)
    with pytest.raises(UserError, match="negative_prompt: true CFG runs the transformer twice"):
        pipeline("a circle", negative_prompt="red", true_cfg_scale=2.0, num_inference_steps=6)
    with pytest.raises(UserError, match="callback_on_step_end: a callback may change"):
        pipeline("a circle", num_inference_steps=6, callback_on_step_end=lambda *_: {})
    with pytest.raises(UserError, match="found 6 entries, expected one for each of 2 steps"):
        pipeline("a circle", sigmas=[1.0, 0.5])
    assert not calls


def test_other_pipelines_and_schedulers_are_refused_by_name(masked):
    from diffusers import FlowMatchHeunDiscreteScheduler, FluxImg2ImgPipeline

    args = run_of(*SHORT, *SOME)
    pipeline = load_pipeline(args)
    other = FluxImg2ImgPipeline(**pipeline.components)
    with pytest.raises(UserError, match="found a FluxImg2ImgPipeline, expected FluxPipeline"):
        install(other, None, 1, 0.5)
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UserError, match="found FlowMatchHeunDiscreteScheduler, expected FlowMatch"):
        step_mask.apply(pipeline, args)
    with pytest.raises(RuntimeError, match="forward 2 of a call of 1 steps"):
        forward = MaskedForward(lambda: (torch.ones(1),), lambda n: (True,), 1)
        with forward.call(1):
            forward()
            forward()

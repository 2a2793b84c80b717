"""Pictures rounded on the device: the same bytes as diffusers' for every value, in one copy."""

import warnings

import numpy as np
import pytest
import torch
from conftest import make_args, optimized
from derived_pieces import draw
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from extras import inpaint, stages
from utils.benchmark_utils import StageClock, annotate_pipeline
from utils.hardware import Machine
from utils.kernels.device_images import DeviceImages, to_bytes
from utils.pipeline_utils import generate, load_pipeline
from utils.prepare import prepare
from utils.steps import device_images, on

SETTINGS = {"vae_scale_factor": 16}
STOCK, OURS = VaeImageProcessor(**SETTINGS), DeviceImages(**SETTINGS)
FLOATS = (torch.bfloat16, torch.float16)


def pictures_of(processor, pixels: torch.Tensor, **options) -> tuple[list, list]:
    """Give the pictures and what was warned of."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        made = processor.postprocess(pixels, **options)
    return made, [(one.category, str(one.message)[:32]) for one in seen]


def assert_same(pixels: torch.Tensor, ours=OURS, stock=STOCK, **options) -> list:
    (made, warned), (expected, expected_warned) = (
        pictures_of(processor, pixels, **options) for processor in (ours, stock)
    )
    assert [(p.mode, p.size) for p in made] == [(p.mode, p.size) for p in expected]
    assert [p.tobytes() for p in made] == [p.tobytes() for p in expected]
    assert warned == expected_warned
    return made


def every_value(dtype) -> torch.Tensor:
    """Give all 65536 values of a type of 16 bits, NaN and infinities too, as (1, 3, 256, 256)."""
    plane = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    return torch.stack([plane, plane.roll(1), plane.flip(0)]).view(1, 3, 256, 256)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_value_gives_the_same_byte(dtype):
    pixels = every_value(dtype)
    assert pixels.isnan().any()
    with pytest.warns(RuntimeWarning):
        made = np.asarray(OURS.postprocess(pixels)[0])
    assert len(np.unique(made)) > 200  # of a bf16 near 1, not every byte is reached
    assert_same(pixels)
    assert_same(pixels.contiguous(memory_format=torch.channels_last))
    assert not pictures_of(OURS, pixels.nan_to_num())[1]


def test_fp32_rounds_halves_to_even_as_numpy_does():
    """Around every half between two bytes, and at random."""
    halves = (torch.arange(255, dtype=torch.float64) + 0.5) / 255
    near = [halves.float()]
    for direction in (0.0, 1.0):
        step = near[0]
        for _ in range(8):
            step = step.nextafter(torch.tensor(direction))
            near.append(step)
    levels = torch.cat([*near, torch.arange(256) / 255])
    levels = levels[: len(levels) // 3 * 3].view(1, 3, 1, -1)
    expected = (np.asarray(levels.permute(0, 2, 3, 1)) * 255).round().astype(np.uint8)
    assert np.array_equal(to_bytes(levels).numpy(), expected)
    pixels = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    assert_same(pixels)
    special = pixels.clone()
    special[0, 0, 0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    assert_same(special)


def test_the_input_is_left_alone():
    for pixels in (torch.rand(1, 3, 16, 16), torch.rand(1, 3, 16, 16).bfloat16()):
        before = pixels.clone()
        OURS.postprocess(pixels)
        to_bytes(pixels)
        assert torch.equal(pixels, before)


def test_other_outputs_and_settings_go_diffusers_way():
    pixels = torch.randn(2, 3, 16, 32).bfloat16()
    for output_type in ("np", "pt", "latent"):
        made, expected = (p.postprocess(pixels, output_type) for p in (OURS, STOCK))
        assert type(made) is type(expected)
        assert np.array_equal(*(np.asarray(torch.as_tensor(x).float()) for x in (made, expected)))
    with pytest.raises(ValueError, match="only support pytorch tensor"):
        OURS.postprocess(np.zeros((1, 3, 8, 8)))
    assert_same(pixels, do_denormalize=[True, True])
    inside = pixels.sigmoid()
    assert_same(inside, do_denormalize=[True, False])
    raw = [kind(**SETTINGS, do_normalize=False) for kind in (DeviceImages, VaeImageProcessor)]
    assert_same(inside, *raw)
    assert_same(pixels, *raw, do_denormalize=[True, True])
    grey = assert_same(pixels[:, :1])
    assert grey[0].mode == "L"


def test_what_crosses_to_the_host_is_one_byte_a_value(monkeypatch):
    """Count the copies off another device, with meta tensors that say they are on a GPU."""
    copies = []

    class Host:
        def __init__(self, shape):
            self.shape = shape

        def copy_(self, source, non_blocking):
            copies.append((source.dtype, source.numel(), non_blocking))
            raise StopIteration  # the rest needs values

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: self.is_meta))
    monkeypatch.setattr(torch, "empty_like", lambda x, device, pin_memory: Host(x.shape))
    with pytest.raises(StopIteration):
        to_bytes(torch.empty(2, 3, 1024, 1024, dtype=torch.bfloat16, device="meta"))
    assert copies == [(torch.uint8, 2 * 3 * 2**20 + 1, True)]


def test_the_pipelines_picture_and_its_stages():
    pipeline, args = optimized("--num_images_per_prompt", "2", "--num_inference_steps", "1")
    expected = generate(pipeline, args)
    device_images.apply(pipeline, args)
    clock = StageClock("cpu")
    annotate_pipeline(pipeline, clock)
    assert [p.tobytes() for p in generate(pipeline, args)] == [p.tobytes() for p in expected]
    found = clock.read()
    assert len(found["postprocessing"]) == len(found["pil_conversion"]) == 1
    assert found["postprocessing"][0] > found["pil_conversion"][0]


def test_where_it_is_on(as_machine):
    assert make_args("--device", "cpu").plan["device_images"].state == "unavailable"
    as_machine(Machine("cuda", "NVIDIA A100", (8, 0), memory_gib=80.0))
    verdict = make_args("--random_weights").plan["device_images"]
    assert verdict.is_on and verdict.lossless
    verdict = make_args("--random_weights", "--disable_device_images").plan["device_images"]
    assert (verdict.state, verdict.reason) == ("off", "--disable_device_images")


def test_pasted_pixels_come_last(tmp_path):
    """extras/inpaint.py has its own end of numpy_to_pil, made before the step changes the class."""
    keep, source = Image.new("L", (128, 128), 0), draw(tmp_path / "in.png")
    keep.paste(255, (0, 0, 64, 128))
    keep.save(tmp_path / "mask.png")
    flags = ("--image", source, "--mask", str(tmp_path / "mask.png"), "--paste")
    args = inpaint.parse(["--device", "cpu", "--num_inference_steps", "1", *flags])
    pipeline, _ = inpaint.load(args)
    expected = generate(pipeline, args)[0]
    device_images.apply(pipeline, args)
    assert generate(pipeline, args)[0].tobytes() == expected.tobytes()


def test_later_stages_have_it_too(monkeypatch):
    monkeypatch.setattr(device_images, "check", lambda args: on())
    args = stages.parse(["--device", "cpu"])
    prepare(args)
    run = stages.Stages(load_pipeline(args), args)
    run.optimize()
    assert type(run.first.image_processor) is type(run.later.image_processor) is DeviceImages


def test_a_broken_picture_is_told_as_before():
    """gen_image.py writes it; the warning is what the doctor knows a black picture by."""
    from extras.doctor.advice import explain

    pixels = torch.full((1, 3, 16, 16), torch.nan)
    with pytest.warns(RuntimeWarning) as warned:
        picture = OURS.postprocess(pixels)[0]
    assert not np.asarray(picture).any()
    known = explain(f"RuntimeWarning: {warned[0].message}")
    assert [one.name for one in known] == ["black picture or NaN"]


gpu_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@gpu_only
def test_gpu_bytes_equal_diffusers_for_every_value():
    for dtype in FLOATS:
        for layout in (torch.contiguous_format, torch.channels_last):
            assert_same(every_value(dtype).cuda().contiguous(memory_format=layout))
    generator = torch.Generator("cuda").manual_seed(0)
    assert_same(torch.randn(2, 3, 512, 768, generator=generator, device="cuda"))


@pytest.mark.gpu
@gpu_only
def test_gpu_the_picture_waits_once():
    pixels = every_value(torch.bfloat16).nan_to_num().cuda()
    expected = STOCK.postprocess(pixels)[0].tobytes()
    OURS.postprocess(pixels)  # loads the kernels
    torch.cuda.set_sync_debug_mode("warn")
    try:
        made, warned = pictures_of(OURS, pixels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert made[0].tobytes() == expected
    assert len(warned) == 1  # torch's own, for the wait that is written down


@pytest.mark.gpu
@gpu_only
def test_gpu_pictures_of_calls_that_follow_one_another():
    """A pinned buffer that comes back is not the picture that was made from it."""
    flags = ("--ckpt", "tiny-schnell", "--device", "cuda", "--num_inference_steps", "1")
    args, other = make_args(*flags), make_args(*flags, "--seed", "5")
    pipeline = load_pipeline(args)
    calls = (args, other, args)
    expected = [generate(pipeline, call)[0] for call in calls]
    device_images.apply(pipeline, args)
    made = [generate(pipeline, call)[0] for call in calls]
    assert [p.tobytes() for p in made] == [p.tobytes() for p in expected]

"""Kontext's call: the image it is given, sizes, refusals; on random weights of the bundled size."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import make_args
from PIL import Image

from utils.errors import UserError
from utils.pipeline_utils import generate, load_pipeline, optimize


@pytest.fixture(scope="module")
def kontext(tmp_path_factory):
    """Make a folder with the bundled configs as FluxKontextPipeline with a guidance embedding."""
    from utils.checkpoints import BUNDLED_DIR

    folder = tmp_path_factory.mktemp("kontext")
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUNDLED_DIR / "tiny-schnell", folder, ignore=ignore, dirs_exist_ok=True)
    for file, change in {
        "transformer/config.json": {"guidance_embeds": True},
        "model_index.json": {"_class_name": "FluxKontextPipeline"},
    }.items():
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return str(folder)


@pytest.fixture
def picture(tmp_path):
    """Write a picture of 130x100 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def args_of(kontext, *flags):
    short = ("--random_weights", "--device", "cpu", "--num_inference_steps", "2")
    return make_args("--ckpt", kontext, *short, *flags)


def test_its_defaults_and_its_image(kontext, picture):
    args = make_args("--ckpt", kontext, "--random_weights", "--device", "cpu", "--image", picture)
    assert (args.num_inference_steps, args.guidance_scale, args.max_sequence_length) == (
        28,
        2.5,
        512,
    )
    assert args.pil_image.size == (128, 96)
    with Image.open(picture) as image:
        expected = image.convert("RGB").resize((128, 96), Image.Resampling.LANCZOS)
    assert args.pil_image.tobytes() == expected.tobytes()


def test_full_size_kontext_gets_one_of_its_own_resolutions(picture, roomy):
    args = make_args(
        *("--ckpt", "black-forest-labs/FLUX.1-Kontext-dev", "--random_weights"),
        *("--device", "cpu", "--image", picture),
    )
    width, height = args.pil_image.size
    assert 0.9 * 2**20 < width * height < 1.1 * 2**20
    assert abs(width / height - 1.3) < 0.1


@pytest.mark.parametrize(("width", "height"), [(128, 128), (96, 160)])
def test_the_call_equals_stock_kontext(width, height, kontext, picture):
    size = ("--width", str(width), "--height", str(height))
    args = args_of(kontext, "--image", picture, *size)
    image = generate(optimize(load_pipeline(args), args), args)[0]
    assert image.size == (width, height)
    with Image.open(picture) as opened, torch.no_grad():
        stock = load_pipeline(args)(
            image=opened.convert("RGB"),
            prompt=args.prompt,
            height=height,
            width=width,
            max_area=width * height,
            num_inference_steps=2,
            guidance_scale=2.5,
            max_sequence_length=512,
            generator=[torch.Generator("cpu").manual_seed(0)],
            _auto_resize=False,
        ).images[0]
    difference = np.asarray(image).astype(int) - np.asarray(stock)
    assert np.abs(difference).mean() < 2, np.abs(difference).mean()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "cannot be read"), (b"", "not an image (0 bytes found)"), (b"no", "not an image")],
    ids=["missing", "empty", "no image"],
)
def test_bad_images_are_refused_in_one_line(content, expected, kontext, tmp_path):
    file = tmp_path / "in.png"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        args_of(kontext, "--image", str(file))
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_an_image_is_needed(kontext):
    with pytest.raises(UserError, match="edits an image, none was given"):
        args_of(kontext)

"""Kontext's call: the image it is given, sizes, refusals."""

import io

import numpy as np
import pytest
import torch
from conftest import make_args
from PIL import Image

from utils.errors import UserError
from utils.pipeline_utils import generate, load_pipeline, optimize


@pytest.fixture
def picture(tmp_path):
    """Write a picture of 130x100 pixels."""
    pixels = np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


def args_of(*flags):
    return make_args(
        "--ckpt", "tiny-kontext", "--device", "cpu", "--num_inference_steps", "2", *flags
    )


def test_the_image_is_resized_before_the_run(picture):
    args = args_of("--image", picture)
    with Image.open(picture) as image:
        expected = image.convert("RGB").resize((128, 96), Image.Resampling.LANCZOS)
    assert args.pil_image.tobytes() == expected.tobytes()


def test_a_picture_that_a_phone_has_turned_is_turned_back(tmp_path):
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, :32, 0] = 255  # red on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown a quarter turn clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = args_of("--image", str(tmp_path / "turned.jpg")).pil_image
    assert image.size == (32, 64)
    assert image.getpixel((16, 8))[0] > 200 and image.getpixel((16, 56))[0] < 50


def test_full_size_kontext_gets_one_of_its_own_resolutions(picture, roomy):
    args = make_args(
        *("--ckpt", "black-forest-labs/FLUX.1-Kontext-dev", "--random_weights"),
        *("--device", "cpu", "--image", picture),
    )
    width, height = args.pil_image.size
    assert 0.9 * 2**20 < width * height < 1.1 * 2**20
    assert abs(width / height - 1.3) < 0.1


@pytest.mark.parametrize(("width", "height"), [(128, 128), (96, 160)])
def test_the_call_equals_stock_kontext(width, height, picture):
    size = ("--width", str(width), "--height", str(height))
    args = args_of("--image", picture, *size)
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
    [
        (None, "cannot be read (No such file or directory)"),
        (b"", "not an image (0 bytes found)"),
        (b"no", "not an image (2 bytes found)"),
        (b"P6\nb28 128\n255\n", "cannot be read (invalid literal for int()"),
        ("half", "cannot be read (image file is truncated"),
        ("huge", "cannot be read (Image size (400000000 pixels) exceeds limit"),
    ],
    ids=["missing", "empty", "no image", "broken header", "truncated", "too large"],
)
def test_bad_images_are_refused_in_one_line(content, expected, tmp_path):
    file = tmp_path / "in.png"
    if content == "half":
        whole = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(whole, "PNG")
        content = whole.getvalue()[:4000]
    elif content == "huge":
        whole = io.BytesIO()
        Image.new("1", (20000, 20000)).save(whole, "PNG")
        content = whole.getvalue()
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError) as refusal:
        args_of("--image", str(file))
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_grey_of_16_bits_keeps_its_levels(tmp_path):
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    read = np.asarray(args_of("--image", str(tmp_path / "depth.png")).pil_image)
    assert read.shape == (256, 256, 3)
    assert (read[..., 0] == levels >> 8).all()


def test_a_picture_that_stays_as_large_as_it_is_may_not_be_huge(tmp_path):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "photo.png")
    with pytest.raises(UserError) as refusal:
        args_of("--image", str(tmp_path / "photo.png"))
    text = str(refusal.value)
    assert "photo.png: found 4000x3000 pixels, expected at most 4 times the 128x128" in text
    assert "scale the picture down, to 144x112" in text and len(text.splitlines()) == 1
    Image.new("RGB", (512, 128)).save(tmp_path / "wide.png")  # 4 times: still taken
    assert args_of("--image", str(tmp_path / "wide.png")).pil_image.size == (512, 128)


def test_the_card_tells_which_edge_is_which_and_the_pictures_tokens(picture):
    from utils import card

    lines = card.render(args_of("--image", picture, "--width", "96")).splitlines()
    call = next(line for line in lines if line.startswith("call"))
    assert "96x128 (width x height), 1 image(s) of a picture of 128x96 (48 more tokens" in call


def test_a_large_picture_is_resized_where_the_checkpoint_does(tmp_path, roomy):
    Image.new("RGB", (4000, 3000)).save(tmp_path / "photo.png")
    args = make_args(
        *("--ckpt", "black-forest-labs/FLUX.1-Kontext-dev", "--random_weights"),
        *("--device", "cpu", "--image", str(tmp_path / "photo.png")),
    )
    assert args.pil_image.size == (1184, 880)


def test_an_image_is_needed():
    with pytest.raises(UserError, match="edits an image, none was given"):
        args_of()

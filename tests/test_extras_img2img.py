"""Image-to-image, inpainting and Fill: plain diffusers' pictures, masks, sizes, refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from derived_pieces import OFF, ON, PROMPT, by_diffusers, by_us, draw, plain, psnr_db
from PIL import Image

from extras import derived, img2img, inpaint
from tiny_flux.scenes import parse, render
from utils.errors import UserError

GREEN = "a green square on a yellow background"


@pytest.fixture
def picture(tmp_path):
    return draw(tmp_path / "in.png", GREEN)


@pytest.fixture
def mask(tmp_path):
    """Write a mask: the left half is redrawn."""
    image = Image.new("L", (128, 128))
    image.paste(255, (0, 0, 64, 128))
    image.save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


def refusal(command, *flags: str) -> str:
    with pytest.raises(UserError) as error:
        command.load(command.parse(["--device", "cpu", *flags]))
    return str(error.value)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_image_to_image_is_diffusers_own(picture, strength):
    ours = by_us(img2img, *OFF, "--image", picture, "--strength", str(strength), "--seed", "3")
    image = Image.open(picture)
    theirs = by_diffusers("FluxImg2ImgPipeline", image=image, strength=strength, seeds=(3,))
    assert ours[0].tobytes() == theirs[0].tobytes()


def test_with_the_steps_on_it_is_the_same_picture(picture):
    flags = ("--image", picture, "--strength", "0.8")
    assert psnr_db(by_us(img2img, *ON, *flags)[0], by_us(img2img, *OFF, *flags)[0]) > 40


def test_shortened_text_is_what_diffusers_makes_of_as_few_tokens(picture):
    flags = ("--image", picture, "--strength", "0.5", "--drop_text_padding")
    call = {"image": Image.open(picture), "strength": 0.5, "max_sequence_length": 64}
    theirs = by_diffusers("FluxImg2ImgPipeline", **call)[0]
    assert by_us(img2img, *OFF, *flags)[0].tobytes() == theirs.tobytes()


def test_a_lower_strength_stays_closer_to_the_picture(picture):
    source = Image.open(picture)
    distances = [
        psnr_db(source, by_us(img2img, *ON, "--image", picture, "--strength", strength)[0])
        for strength in ("0.25", "0.75", "1")
    ]
    assert distances == sorted(distances, reverse=True) and distances[0] > distances[2] + 6


def test_a_batch_equals_its_single_images(picture):
    flags = (*OFF, "--image", picture, "--strength", "0.75")
    batch = by_us(img2img, *flags, "--num_images_per_prompt", "2", "--seed", "5")
    for k, image in enumerate(batch):
        assert psnr_db(image, by_us(img2img, *flags, "--seed", str(5 + k))[0]) > 45


def test_steps_taken_is_what_diffusers_takes():
    from diffusers import FluxImg2ImgPipeline

    pipe = FluxImg2ImgPipeline.from_pipe(plain(), dtype=torch.bfloat16)
    for steps in (1, 4, 28):
        pipe.scheduler.set_timesteps(steps)
        for strength in (0.01, 0.3, 0.6, 0.99, 1.0):
            taken = pipe.get_timesteps(steps, strength, "cpu")[1]
            assert derived.steps_taken(steps, strength) == taken


@pytest.mark.parametrize(
    ("found", "flags", "expected"),
    [
        ((130, 100), (), (128, 96)),
        ((2048, 1024), (), (1440, 720)),  # 1448 x 724 has 2**20 pixels
        ((130, 100), ("--width", "64"), (64, 48)),
        ((130, 100), ("--width", "64", "--height", "64"), (64, 64)),
    ],
)
def test_the_picture_decides_the_size_that_is_left_open(tmp_path, found, flags, expected):
    Image.new("RGB", found).save(tmp_path / "in.png")
    args = img2img.parse(["--image", str(tmp_path / "in.png"), *flags])
    derived.read_image(args)
    assert (args.width, args.height) == expected


def test_the_file_says_how_it_was_made(picture, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "out.png")
    flags = (*ON, "--image", picture, "--strength", "0.5", "--output-file", out)
    monkeypatch.setattr("sys.argv", ["img2img", *flags])
    img2img.main()
    about = json.loads(Image.open(out).text["call"])
    assert about["image"] == picture and about["strength"] == 0.5 and about["steps_taken"] == 2
    assert f"also        image {picture}, strength 0.5, steps_taken 2" in capsys.readouterr().out


def test_inpainting_is_diffusers_own_and_keeps_what_is_not_masked(picture, mask):
    ours = by_us(inpaint, *OFF, "--image", picture, "--mask", mask)[0]
    source = Image.open(picture)
    theirs = by_diffusers(
        "FluxInpaintPipeline", image=source, mask_image=Image.open(mask), strength=1.0
    )[0]
    assert ours.tobytes() == theirs.tobytes()
    right = (72, 0, 128, 128)  # a latent's width beside the edge
    assert psnr_db(ours.crop(right), source.crop(right)) > 25  # the VAE's own loss
    assert psnr_db(ours.crop((0, 0, 64, 128)), source.crop((0, 0, 64, 128))) < 15


def test_paste_puts_every_kept_pixel_back(picture, mask):
    flags = (*ON, "--image", picture, "--mask", mask)
    pasted, source = by_us(inpaint, *flags, "--paste")[0], Image.open(picture)
    assert pasted.crop((64, 0, 128, 128)).tobytes() == source.crop((64, 0, 128, 128)).tobytes()
    assert (
        psnr_db(pasted.crop((0, 0, 64, 128)), by_us(inpaint, *flags)[0].crop((0, 0, 64, 128))) == 99
    )


@pytest.fixture(scope="module")
def fill(tmp_path_factory):
    """Save a Fill checkpoint: tiny-dev with 320 further input channels of random small weights."""
    from diffusers import FluxFillPipeline, FluxPipeline, FluxTransformer2DModel

    pipe = FluxPipeline.from_pretrained("tiny_flux/tiny-dev", dtype=torch.bfloat16)
    config = dict(pipe.transformer.config) | {"in_channels": 384, "out_channels": 64}
    wide = FluxTransformer2DModel.from_config(config).to(torch.bfloat16)
    weights = pipe.transformer.state_dict()
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(256, 320, generator=generator).mul(0.02).bfloat16()
    weights["x_embedder.weight"] = torch.cat([weights["x_embedder.weight"], more], dim=1)
    wide.load_state_dict(weights)
    parts = {name: getattr(pipe, name) for name in ("scheduler", "vae", "text_encoder")}
    parts |= {name: getattr(pipe, name) for name in ("text_encoder_2", "tokenizer", "tokenizer_2")}
    folder = tmp_path_factory.mktemp("fill")
    FluxFillPipeline(transformer=wide, **parts).save_pretrained(folder)
    return str(folder)


def test_fill_is_diffusers_own_and_sees_the_mask(fill, picture, mask, tmp_path):
    from diffusers import FluxFillPipeline

    flags = (*OFF[:2], *OFF[4:], "--ckpt", fill, "--num_inference_steps", "2")
    ours = by_us(inpaint, *flags, "--image", picture, "--mask", mask)[0]
    pipe = FluxFillPipeline.from_pretrained(fill, dtype=torch.bfloat16)
    call = {"image": Image.open(picture), "mask_image": Image.open(mask), "strength": 1.0}
    call |= {"height": 128, "width": 128, "num_inference_steps": 2, "guidance_scale": 30.0}
    generator = [torch.Generator("cpu").manual_seed(0)]
    theirs = pipe(PROMPT, max_sequence_length=512, generator=generator, **call).images[0]
    assert ours.tobytes() == theirs.tobytes()
    Image.new("L", (128, 128), 255).save(tmp_path / "all.png")
    other = by_us(inpaint, *flags, "--image", picture, "--mask", str(tmp_path / "all.png"))[0]
    assert psnr_db(ours, other) < 60


def test_fill_at_full_size_has_its_own_input_channels(roomy):
    from utils import checkpoints
    from utils.random_weights import modules

    found = checkpoints.resolve("black-forest-labs/FLUX.1-Fill-dev", random_weights=True)
    transformer = modules(found, torch.bfloat16, "meta")["transformer"]
    assert transformer.x_embedder.in_features == 384 and transformer.proj_out.out_features == 64
    assert (found.defaults.steps, found.defaults.guidance) == (50, 30.0)


def test_the_scripts_send_fill_to_its_command(fill, tmp_path):
    from conftest import make_args

    with pytest.raises(UserError, match=r"python -m extras\.inpaint --image PICTURE --mask MASK"):
        make_args("--ckpt", fill, "--device", "cpu")


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        (img2img, (), "--image: none was given"),
        (img2img, ("--image", "no.png"), "--image no.png: cannot be read"),
        (img2img, ("--strength", "0"), "--strength 0: expected more than 0 and at most 1"),
        (img2img, ("--strength", "1.5"), "--strength 1.5: expected more than 0 and at most 1"),
        (img2img, ("--ckpt", "tiny-kontext"), "expected schnell or dev; this one goes with"),
        (img2img, ("--modulation_once",), "--modulation_once: not for image-to-image"),
        (img2img, ("--scheduler", "dpm"), "use euler or heun"),
        (img2img, ("--ckpt", "tiny-dev", "--step_mask", "fast"), "--step_mask: not for"),
        (
            img2img,
            ("--ckpt", "tiny-dev", "--cache_dit_config", "cache_config.yaml"),
            "--cache_dit_config: not for image-to-image",
        ),
        (inpaint, ("--mask", "m.png", "--ckpt", "tiny-kontext"), "expected schnell or dev or fill"),
    ],
)
def test_refusals(command, flags, expected):
    assert expected in refusal(command, *flags)


def test_masks_that_do_not_fit(picture, tmp_path):
    for name, size, level in (("small.png", (64, 128), 255), ("black.png", (128, 128), 0)):
        Image.new("L", size, level).save(tmp_path / name)
    flags = ("--image", picture, "--mask")
    small = refusal(inpaint, *flags, str(tmp_path / "small.png"))
    assert "found 64x128, expected the size of --image, 128x128" in small
    assert "all black" in refusal(inpaint, *flags, str(tmp_path / "black.png"))


def test_help_needs_no_torch():
    names = ("img2img", "inpaint", "controlnet", "stages", "compare_stages")
    parsed = "".join(f"import extras.{n}; extras.{n}.create_parser().format_help();" for n in names)
    check = f"import sys; {parsed} sys.exit('torch' in sys.modules or 'cv2' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], timeout=600).returncode == 0


def test_a_grey_mask_is_made_black_and_white(tmp_path):
    levels = np.repeat(np.array([[0, 127, 128, 255]], np.uint8), 4, axis=0)
    Image.fromarray(levels).save(tmp_path / "grey.png")
    read = inpaint.read_mask(str(tmp_path / "grey.png"), (4, 4))
    assert np.asarray(read)[0].tolist() == [0, 0, 255, 255]


@pytest.mark.slow
@pytest.mark.parametrize("mode", [("compile", "--compile_scope", "blocks"), ("export_aoti",)])
def test_compiled_and_exported_image_to_image(picture, mode):
    flags = ("--image", picture, "--strength", "0.8")
    made = by_us(img2img, *ON, *flags, "--compile_export_mode", *mode)[0]
    assert psnr_db(made, by_us(img2img, *OFF, *flags)[0]) > 35


def test_the_scene_of_the_prompt_is_what_a_full_strength_draws(picture):
    from tiny_flux.checker import check_image

    made = by_us(img2img, *ON, "--image", picture, "--strength", "1")[0]
    assert all(check_image(made, parse(PROMPT)).values())
    assert psnr_db(made, render(parse(PROMPT))) > 12

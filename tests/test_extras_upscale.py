"""Upscaling: real model files, tiles against the whole picture, three formats with their words."""

import importlib.util
import json
import pickle
from pathlib import Path

import doctor_pieces
import numpy as np
import pytest
import torch
from doctor_pieces import ROOT
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from extras import tiles, upscale
from extras.pictures import open_picture, save_picture
from utils.errors import UserError

if importlib.util.find_spec("spandrel") is None:
    pytest.skip(upscale.INSTALL, allow_module_level=True)

CHANNELS, GROWTH = 8, 32  # growth as in every published file


def real_esrgan(blocks: int = 1) -> dict:
    """Make random weights under the names of Real-ESRGAN's x4 files, which hold `params_ema`."""
    generator = torch.Generator().manual_seed(0)
    weights = {}

    def conv(name: str, inputs: int, outputs: int) -> None:
        weight = torch.randn(outputs, inputs, 3, 3, generator=generator)
        weights[f"{name}.weight"] = weight / (9 * inputs) ** 0.5
        weights[f"{name}.bias"] = torch.randn(outputs, generator=generator) / 10

    conv("conv_first", 3, CHANNELS)
    for block in range(blocks):
        for dense in (1, 2, 3):
            for k in range(1, 6):
                outputs = CHANNELS if k == 5 else GROWTH
                conv(f"body.{block}.rdb{dense}.conv{k}", CHANNELS + (k - 1) * GROWTH, outputs)
    for name in ("conv_body", "conv_up1", "conv_up2", "conv_hr"):
        conv(name, CHANNELS, CHANNELS)
    conv("conv_last", CHANNELS, 3)
    return {"params_ema": weights}


def compact(scale: int = 2, last: float = 0.0) -> dict:
    """Make Real-ESRGAN's small video network; with `last` 0 it is nearest-neighbour scaling."""
    generator = torch.Generator().manual_seed(1)
    weights, widths = {}, (3, 16, 16, 3 * scale**2)
    for k in range(3):
        shape = (widths[k + 1], widths[k], 3, 3)
        factor = 0.1 if k < 2 else last
        weights[f"body.{2 * k}.weight"] = factor * torch.randn(shape, generator=generator)
        weights[f"body.{2 * k}.bias"] = torch.zeros(widths[k + 1])
        if k < 2:
            weights[f"body.{2 * k + 1}.weight"] = torch.full((16,), 0.2)
    return {"params": weights}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("models")
    found = {name: folder / f"{name}.pth" for name in ("esrgan", "compact", "nearest")}
    torch.save(real_esrgan(), found["esrgan"])
    torch.save(compact(last=0.1), found["compact"])
    torch.save(compact(), found["nearest"])
    found["tensors"] = folder / "esrgan.safetensors"
    save_file(real_esrgan()["params_ema"], found["tensors"])
    return found


@pytest.fixture(scope="module")
def picture():
    with Image.open(ROOT / "tiny_flux" / "source.png") as opened:
        return opened.convert("RGB").resize((92, 76))  # no multiple of a tile


# By hand, every 3x3 convolution one pixel: first, 3 dense blocks of 5, body, up1, up2, hr, last
RADII = {"esrgan": 1 + 3 * 5 + 1 + 2 + 2, "compact": 3}


@pytest.mark.parametrize("name", RADII)
def test_tiles_equal_the_whole_where_the_overlap_reaches_as_far_as_the_network(
    files, picture, name
):
    model = upscale.load_model(files[name], "cpu")
    assert upscale.overlap_of(model, None) == (-(-RADII[name] // 4) * 4, RADII[name])
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255
    whole = model(pixels)
    assert whole.shape[-2:] == (76 * model.scale, 92 * model.scale)

    def error(overlap: int) -> float:
        tiled = tiles.run_tiled(model, pixels, model.scale, 32, overlap)
        return float((tiled - whole).abs().max())

    assert error(-(-RADII[name] // 4) * 4) < 1e-5  # another order of sums in fp32
    assert error(0) > 1e-3  # the seams that the overlap is for


def test_the_radius_is_no_larger_than_what_a_gradient_finds(files):
    model = upscale.load_model(files["compact"], "cpu").model
    pixels = torch.rand(1, 3, 21, 21, requires_grad=True)
    model(pixels)[..., 21, 21].sum().backward()  # an output pixel of input pixel 10
    rows = pixels.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert int(max(10 - rows.min(), rows.max() - 10)) == tiles.receptive_radius(model)


def test_networks_that_look_everywhere_have_no_radius():
    assert tiles.receptive_radius(torch.nn.Conv2d(3, 3, 3, stride=2)) is None
    assert tiles.receptive_radius(torch.nn.Sequential(torch.nn.LayerNorm(4))) is None


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100])
def test_the_kept_parts_cover_an_edge_once(length):
    kept = [range(length)[read][keep] for read, keep in tiles.spans(length, tile=32, overlap=8)]
    assert [pixel for part in kept for pixel in part] == list(range(length))
    assert len(kept) == tiles.count(length, 1, 32)


def test_a_safetensors_file_gives_the_same_picture(files, picture):
    results = [
        upscale.upscale(upscale.load_model(files[name], "cpu"), picture, 0, 0)
        for name in ("esrgan", "tensors")
    ]
    assert results[0].tobytes() == results[1].tobytes()


class Malicious:
    """Would write a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    target, model = tmp_path / "harmed", tmp_path / "model.pth"
    torch.save({"params": Malicious(target)}, model)
    with pytest.raises(UserError, match="refused, no plain weights"):
        upscale.load_model(model, "cpu")
    plain = tmp_path / "old.pth"  # the format before zip files
    plain.write_bytes(pickle.dumps(Malicious(target)))
    with pytest.raises(UserError, match="MODEL"):
        upscale.load_model(plain, "cpu")
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "cannot be loaded"), (b"no model", "MODEL"), ({"a": torch.ones(1)}, "no architecture")],
)
def test_files_that_are_no_model_are_one_line(tmp_path, content, expected):
    file = tmp_path / "model.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(UserError) as refusal:
        upscale.load_model(file, "cpu")
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Make a picture with gen_image.py."""
    folder = tmp_path_factory.mktemp("small")
    flags = ("--device", "cpu", "--prompt", PROMPT, "--output-file", folder / "small.png")
    assert doctor_pieces.run("gen_image.py", *flags, folder=folder).code == 0
    return folder / "small.png"


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp"])
def test_a_picture_of_gen_image_keeps_its_words_in_every_format(files, small, tmp_path, ending):
    large = tmp_path / f"large{ending}"
    words = ("-m", "extras.upscale", files["nearest"], small, "--output-file", large)
    done = doctor_pieces.run(*words, "--tile", "64", "--device", "cpu", folder=tmp_path)
    assert done.code == 0, done.output
    assert "tiles       64 px, overlap 4 px (no seam at all from: 3 px)" in done.output
    before, about = open_picture(small)
    after, said = open_picture(large)
    assert (said["prompt"], said["seed"], said["checkpoint"]) == (PROMPT, "0", "tiny-schnell")
    assert json.loads(said.pop("upscaled"))["scale"] == 2
    assert said == about
    nearest = np.asarray(before.resize((256, 256), Image.Resampling.NEAREST), dtype=float)
    error = np.abs(np.asarray(after, dtype=float) - nearest)
    assert error.max() == 0 if ending == ".png" else error.mean() < 4  # lossy formats
    assert {path.name for path in tmp_path.iterdir()} == {large.name, "output.txt"}


def test_words_of_any_script_survive(tmp_path):
    about = {"prompt": "ein rotes Haus, 赤い家, {x}", "call": '{"a": 1}'}
    for name in ("x.png", "x.jpg", "x.webp"):
        save_picture(Image.new("RGB", (16, 16)), tmp_path / name, about, 100)
        assert open_picture(tmp_path / name)[1] == about


def test_grey_of_16_bits_keeps_its_upper_8(tmp_path):
    """Depth maps are such; PIL alone makes of them a white picture."""
    levels = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "depth.png")
    image, _ = open_picture(tmp_path / "depth.png")
    assert image.mode == "RGB" and np.array_equal(np.asarray(image)[..., 1], levels >> 8)


def test_words_too_long_for_a_png_are_one_line(tmp_path):
    about = PngInfo()
    about.add_text("prompt", "a" * 2**21, zip=True)
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", pnginfo=about)
    with pytest.raises(UserError, match=r"IMAGE .*: cannot be read"):
        open_picture(tmp_path / "x.png")


def test_faces_are_refused_unless_they_are_one_aligned_face(tmp_path):
    from types import SimpleNamespace

    model = SimpleNamespace(purpose="FaceSR", scale=1, architecture=SimpleNamespace(name="GFPGAN"))
    args = SimpleNamespace(image="x.png", output_file="y.png", format="PNG")
    with pytest.raises(UserError, match="found 640x480, expected one aligned face of 512x512"):
        upscale.check_fit(model, args, Image.new("RGB", (640, 480)))
    upscale.check_fit(model, args, Image.new("RGB", (512, 512)))


REFUSALS = {
    "no model": (["none.pth", "x.png"], "MODEL none.pth: expected a file"),
    "other ending": (["{nearest}", "x.png", "--output-file", "x.gif"], "found '.gif', expected"),
    "odd tile": (["{nearest}", "x.png", "--tile", "30"], "--tile 30: expected 0, or"),
    "quality": (["{nearest}", "x.png", "--quality", "0"], "--quality 0: expected 1 to 100"),
    "no picture": (["{nearest}", "x.png"], "IMAGE x.png: cannot be read"),
}


@pytest.mark.parametrize(("words", "expected"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_are_one_line(words, expected, files, monkeypatch):
    words = [word.replace("{nearest}", str(files["nearest"])) for word in words]
    monkeypatch.setattr("sys.argv", ["upscale", *words])
    monkeypatch.setattr(upscale, "load_model", None)
    with pytest.raises(UserError) as refusal:
        upscale.main()
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.slow  # 330 MB of weights, 512x512 on a CPU
def test_a_gfpgan_file_restores_a_face_of_its_size(tmp_path):
    with upscale._torchvision_or_none():
        from spandrel.architectures.GFPGAN import GFPGAN

    torch.manual_seed(0)
    network = GFPGAN(
        out_size=512, num_style_feat=512, channel_multiplier=2, decoder_load_path=None,
        fix_decoder=False, num_mlp=8, input_is_latent=True, different_w=True, narrow=1,
        sft_half=True,
    )  # fmt: skip
    torch.save({"params_ema": network.state_dict()}, tmp_path / "GFPGAN.pth")
    model = upscale.load_model(tmp_path / "GFPGAN.pth", "cpu")
    assert (model.purpose, model.scale, model.architecture.name) == ("FaceSR", 1, "GFPGAN")
    assert tiles.receptive_radius(model.model) is None
    assert upscale.upscale(model, Image.new("RGB", (512, 512), "grey"), 0, 0).size == (512, 512)

"""Control images: edges, lines and depth of a picture; what is missing for one is named."""

import numpy as np
import pytest
from derived_pieces import draw
from PIL import Image, ImageFilter

from extras import preprocess
from utils.errors import UserError


def test_canny_finds_the_outline_of_colours_of_one_lightness():
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[...] = (0, 150, 0)
    pixels[16:48, 16:48] = (255, 0, 84)  # both 150 * 0.587 = 88 grey, rounded
    drawn = np.asarray(preprocess.canny(Image.fromarray(pixels)))[..., 0] > 0
    ys, xs = np.nonzero(drawn)
    assert {xs.min(), ys.min()} <= {15, 16} and {xs.max(), ys.max()} <= {47, 48}
    assert not drawn[20:44, 20:44].any()


def test_lineart_is_white_on_edges_and_black_elsewhere(tmp_path):
    picture = Image.open(draw(tmp_path / "scene.png"))
    lines = np.asarray(preprocess.lineart(picture))[..., 0]
    outline = np.asarray(preprocess.canny(picture))[..., 0] > 0
    near = np.asarray(Image.fromarray(lines).filter(ImageFilter.MaxFilter(3)))  # zero on the edge
    assert near[outline].min() > 50 and np.median(lines) == 0


def test_depth_comes_from_a_transformers_model(tmp_path):
    """A random network of Depth Anything's own architecture, since no trained one is at hand."""
    from transformers import (
        DepthAnythingConfig,
        DepthAnythingForDepthEstimation,
        Dinov2Config,
        DPTImageProcessorPil,
    )

    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=56,
        out_features=[f"stage{k}" for k in range(1, 5)],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[16] * 4,
        fusion_hidden_size=16,
        head_hidden_size=8,
        patch_size=14,
    )
    DepthAnythingForDepthEstimation(config).save_pretrained(tmp_path)
    DPTImageProcessorPil(size={"height": 56, "width": 56}).save_pretrained(tmp_path)
    made = preprocess.depth(Image.new("RGB", (80, 48), (9, 99, 200)), str(tmp_path), "cpu")
    assert made.size == (80, 48) and made.mode == "RGB"
    red, green, blue = np.moveaxis(np.asarray(made), -1, 0)
    assert (red == green).all() and (green == blue).all()


def test_depth_without_weights_is_one_line():
    with pytest.raises(UserError) as error:
        preprocess.check({"depth"}, preprocess.DEPTH_MODEL)
    assert str(error.value).startswith(f"--depth_model {preprocess.DEPTH_MODEL}: not in the local")
    assert "\n" not in str(error.value)


def test_depth_of_a_folder_that_holds_no_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--depth_model .*: cannot be loaded"):
        preprocess.depth(Image.new("RGB", (16, 16)), str(tmp_path), "cpu")


def test_without_opencv_the_install_command_is_named(monkeypatch):
    monkeypatch.setattr(preprocess, "import_problem", lambda package: f"no module {package}")
    with pytest.raises(UserError, match=r"found no module cv2, .*extras/requirements\.txt"):
        preprocess.check({"canny"}, preprocess.DEPTH_MODEL)
    preprocess.check({"none"}, preprocess.DEPTH_MODEL)

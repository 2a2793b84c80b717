"""The VAE's encoder as one more component: Kontext's image takes the compiled way too."""

import pytest
import torch
from conftest import make_args
from test_cudagraph import RerunRecorder

from utils.cudagraph import GraphPool, wrap_components
from utils.errors import UserError
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.quality import psnr_db
from utils.steps import components, export_aoti, image_encoder

KONTEXT = ("--ckpt", "tiny-kontext", "--image", "tiny_flux/source.png", "--device", "cpu")
RUN = (*KONTEXT, "--num_inference_steps", "1")


def test_it_is_asked_for_and_needs_an_image_and_a_compiler():
    assert make_args(*KONTEXT).plan["image_encoder"].state == "off"
    flags = ("--compile_image_encoder", "--compile_export_mode", "compile")
    verdict = make_args(*KONTEXT, *flags).plan["image_encoder"]
    assert verdict.is_on and verdict.lossless
    with pytest.raises(UserError, match="found --compile_export_mode disabled, expected compile"):
        make_args(*KONTEXT, "--compile_image_encoder")
    with pytest.raises(UserError, match="found tiny-dev, which encodes no image"):
        make_args("--ckpt", "tiny-dev", "--device", "cpu", *flags)


def test_its_package_is_named_beside_the_others(tmp_path):
    flags = ("--compile_image_encoder", "--compile_export_mode", "export_aoti")
    args = make_args(*RUN, *flags, "--cache-dir", str(tmp_path / "cache"))
    assert export_aoti._names(args) == ("transformer", "decoder", "image_encoder")
    args.use_cached_model = True
    assert "image_encoder: found no package" in export_aoti.check(args).reason


def test_a_graph_of_the_encoder_gives_the_same_picture():
    args = make_args(*RUN)
    pipeline = load_pipeline(args)
    expected = generate(pipeline, args)[0].tobytes()
    image_encoder.apply(pipeline, args)
    assert components(pipeline)["image_encoder"] is pipeline.vae.encoder
    recorder = RerunRecorder()
    wrap_components(pipeline, GraphPool(recorder))
    for _ in range(2):
        assert generate(pipeline, args)[0].tobytes() == expected
    assert recorder.recorded == 3  # transformer, decoder and encoder, each once


@pytest.mark.parametrize(
    "device",
    [
        pytest.param("cpu", marks=pytest.mark.slow),
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("mode", ["compile", "export_aoti"])
def test_compiled_and_as_a_package(mode, device, tmp_path):
    torch._dynamo.reset()
    run = (*RUN, "--device", device, "--disable_quant")
    eager = make_args(*run, "--compile_export_mode", "disabled")
    expected = generate(load_pipeline(eager), eager)[0]
    flags = ("--compile_image_encoder", "--compile_export_mode", mode, "--compile_scope", "blocks")
    args = make_args(*run, *flags, "--cache-dir", str(tmp_path / "cache"))
    pipeline = optimize(load_pipeline(args), args)
    assert psnr_db(generate(pipeline, args)[0], expected) > 40
    stored = {path.name.split("-")[0] for path in (tmp_path / "cache").glob("*.pt2")}
    assert ("image_encoder" in stored) == (mode == "export_aoti")

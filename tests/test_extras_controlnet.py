"""ControlNets: plain diffusers' pictures, several at once, the steps of their blocks, refusals."""

import functools
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from derived_pieces import OFF, ON, PROMPT, by_diffusers, by_us, draw, plain, psnr_db
from PIL import Image
from safetensors.torch import load, save

from extras import controlnet, controls, preprocess
from utils import prepare
from utils.errors import UserError

CFG = ("--true_cfg_scale", "2", "--negative_prompt", "a blue ring")
NET = ("--controlnet", controls.EDGES)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Draw a scene that the prompt does not name, and its edges."""
    folder = tmp_path_factory.mktemp("scene")
    path = draw(folder / "scene.png", "a large red circle at the top left on a blue background")
    preprocess.canny(Image.open(path)).save(folder / "edges.png")
    return SimpleNamespace(picture=path, edges=str(folder / "edges.png"))


@pytest.fixture(scope="module")
def union(tmp_path_factory):
    """Save a random union net of three modes for tiny-schnell, with residuals that count."""
    from diffusers import FluxControlNetModel

    config = {key: value for key, value in edges().config.items() if key[0] != "_"}
    config |= {"num_mode": 3, "num_single_layers": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = FluxControlNetModel.from_config(config)
        for linear in (*net.controlnet_blocks, *net.controlnet_single_blocks):
            torch.nn.init.normal_(linear.weight, std=0.02)
    folder = tmp_path_factory.mktemp("union")
    net.to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


@functools.cache
def edges():
    from tiny_flux.controlnet import build

    return build()


def refusal(*flags: str) -> str:
    with pytest.raises(UserError) as error:
        controlnet.load(controlnet.parse(["--device", "cpu", "--ckpt", "tiny-schnell", *flags]))
    return str(error.value)


def test_one_net_is_diffusers_own(scene):
    ours = by_us(controlnet, *OFF, *NET, "--control_image", scene.edges, "--seed", "2")[0]
    call = {"control_image": Image.open(scene.edges), "seeds": (2,)}
    theirs = by_diffusers("FluxControlNetPipeline", {"controlnet": edges()}, **call)[0]
    assert ours.tobytes() == theirs.tobytes()


def test_canny_of_the_picture_is_the_edges(scene):
    flags = (*ON, *NET, "--control_image")
    made = by_us(controlnet, *flags, scene.picture, "--preprocess", "canny")[0]
    assert made.tobytes() == by_us(controlnet, *flags, scene.edges)[0].tobytes()


def test_with_the_steps_on_it_is_the_same_picture(scene, float8_on_cpu):
    flags = (*NET, "--control_image", scene.edges)
    expected = by_us(controlnet, *OFF, "--disable_quant", *flags)[0]
    assert psnr_db(by_us(controlnet, *ON, "--disable_quant", *flags)[0], expected) > 38
    assert psnr_db(by_us(controlnet, *ON, *flags)[0], expected) > 28  # float8, nets too


def test_the_steps_reach_the_blocks_of_the_net(scene, float8_on_cpu):
    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.steps.quant import is_float8

    args = controlnet.parse([*ON, *NET, "--control_image", scene.edges])
    pipeline, _ = controlnet.load(args)
    attention = pipeline.controlnet.transformer_blocks[0].attn
    assert attention.fused_projections and not hasattr(attention, "to_q")
    assert type(attention.processor) is FlashFusedFluxAttnProcessor3_0
    assert is_float8(attention.to_qkv) and is_float8(
        pipeline.controlnet.transformer_blocks[0].ff.net[2]
    )
    assert not is_float8(pipeline.controlnet.controlnet_blocks[0])
    assert list(pipeline.further.values()) == [pipeline.controlnet]


def test_a_scale_of_zero_is_no_net(scene):
    made = by_us(controlnet, *OFF, *NET, "--control_image", scene.edges, "--controlnet_scale", "0")[
        0
    ]
    generator = torch.Generator("cpu").manual_seed(0)
    # The control image is encoded first, and draws from the same generator
    torch.randn((1, 16, 16, 16), generator=generator, dtype=torch.bfloat16)
    call = {"height": 128, "width": 128, "num_inference_steps": 4, "max_sequence_length": 256}
    theirs = plain()(PROMPT, generator=[generator], guidance_scale=0.0, **call).images[0]
    assert made.tobytes() == theirs.tobytes()


def test_two_nets_at_once_are_diffusers_own(scene, tmp_path):
    from diffusers import FluxMultiControlNetModel

    other = draw(tmp_path / "other.png", "a small red star on a blue background")
    images = ("--control_image", scene.edges, "--control_image", other)
    scales = ("--controlnet_scale", "0.5", "--controlnet_scale", "0.25")
    end = ("--control_guidance_end", "0.5")
    ours = by_us(controlnet, *OFF, *NET, *images, *scales, *end)[0]
    both = FluxMultiControlNetModel([edges(), edges()])
    theirs = by_diffusers(
        "FluxControlNetPipeline",
        {"controlnet": both},
        control_image=[Image.open(scene.edges), Image.open(other)],
        controlnet_conditioning_scale=[0.5, 0.25],
        control_guidance_end=0.5,
    )[0]
    assert ours.tobytes() == theirs.tobytes()


def test_a_union_net_takes_its_mode(scene, union):
    flags = (*OFF, "--controlnet", union, "--control_image", scene.edges, "--control_mode")
    ours = [by_us(controlnet, *flags, mode)[0] for mode in ("0", "2")]
    from diffusers import FluxControlNetModel

    net = FluxControlNetModel.from_pretrained(union, dtype=torch.bfloat16)
    call = {"control_image": Image.open(scene.edges), "control_mode": 2}
    theirs = by_diffusers("FluxControlNetPipeline", {"controlnet": net}, **call)[0]
    assert ours[1].tobytes() == theirs.tobytes() != ours[0].tobytes()


@pytest.mark.parametrize("masked", [False, True])
def test_with_a_picture_to_begin_with(scene, tmp_path, masked):
    image = Image.open(draw(tmp_path / "in.png", "a green square on a yellow background"))
    Image.new("L", (128, 128), 255).save(tmp_path / "mask.png")
    flags = (*OFF, *NET, "--control_image", scene.edges, "--image", str(tmp_path / "in.png"))
    call = {"control_image": Image.open(scene.edges), "image": image, "strength": 0.8}
    name = "FluxControlNetImg2ImgPipeline"
    if masked:
        flags += ("--mask", str(tmp_path / "mask.png"))
        call["mask_image"] = Image.open(tmp_path / "mask.png")
        name = "FluxControlNetInpaintPipeline"
    ours = by_us(controlnet, *flags, "--strength", "0.8")[0]
    theirs = by_diffusers(name, {"controlnet": edges()}, guidance_scale=0.0, **call)[0]
    assert ours.tobytes() == theirs.tobytes()


def test_the_bundled_net_as_a_folder_is_the_same(scene, tmp_path):
    edges().save_pretrained(tmp_path / "net")
    flags = (*OFF, "--control_image", scene.edges, "--controlnet")
    folder = by_us(controlnet, *flags, str(tmp_path / "net"))[0]
    assert folder.tobytes() == by_us(controlnet, *flags, controls.EDGES)[0].tobytes()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ((), "--controlnet: none was given"),
        (NET, "--control_image: none was given"),
        ((*NET, "--control_image", "no.png"), "--control_image no.png: cannot be read"),
        (("--controlnet", "no", "--control_image", "EDGES"), "--controlnet no: unknown"),
        (
            ("--controlnet", "tiny_flux/tiny-dev/transformer", "--control_image", "EDGES"),
            "found FluxTransformer2DModel, expected FluxControlNetModel",
        ),
        (
            (*NET, "--control_image", "EDGES", "--control_mode", "1"),
            "--control_mode 1: tiny-edges is no union net",
        ),
        (("--controlnet", "UNION", "--control_image", "EDGES"), "found none, expected 0 to 2"),
        (
            ("--controlnet", "UNION", "--control_image", "EDGES", "--control_mode", "3"),
            "--control_mode: found 3, expected 0 to 2",
        ),
        (
            (*NET, "--controlnet", "UNION", "--control_image", "EDGES"),
            "expected them alike: diffusers would leave out",
        ),
        (
            (*NET * 3, "--control_image", "EDGES", "--control_image", "EDGES"),
            "--control_image: found 2 times, expected once or 3 times",
        ),
        (
            (*NET, "--control_image", "EDGES", "--controlnet_scale", "-1"),
            "--controlnet_scale -1: expected 0 or more",
        ),
        (
            (*NET, "--control_image", "EDGES", "--control_guidance_end", "0"),
            "expected shares of the steps",
        ),
        ((*NET, "--control_image", "EDGES", "--strength", "0.5"), "--strength 0.5: expected with"),
        (
            (*NET, "--control_image", "EDGES", "--compile_export_mode", "export_aoti"),
            "the ControlNet would stay eager",
        ),
        ((*NET, "--control_image", "EDGES", "--modulation_once"), "not for ControlNets"),
        (
            (*NET, "--control_image", "EDGES", "--scheduler", "unipc"),
            "--scheduler unipc: diffusers' FluxControlNetPipeline hands",
        ),
        (
            (*NET, "--control_image", "EDGES", "--image", "EDGES", *CFG),
            "FluxControlNetImg2ImgPipeline takes no negative prompt",
        ),
        (
            (*NET, "--control_image", "EDGES", "--ckpt", "tiny-dev"),
            "pooled_projection_dim found 64, expected 32 of tiny-dev",
        ),
    ],
)
def test_refusals(flags, expected, scene, union):
    places = {"EDGES": scene.edges, "UNION": union}
    assert expected in refusal(*(places.get(flag, flag) for flag in flags))


NET_CONFIG = '{"_class_name": "FluxControlNetModel"'


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("[]", "config.json: found list, expected keys and values"),
        ("[" * 100_000, "config.json cannot be read"),
        (NET_CONFIG + ', "num_mode": "x"}', "num_mode found 'x', expected a whole number"),
        (NET_CONFIG + "}", "found no weights (*.safetensors) in this folder"),
    ],
)
def test_a_damaged_net_is_refused_before_loading(config, expected, tmp_path):
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError) as error:
        controls.config_of(str(tmp_path))
    assert str(error.value).startswith(f"--controlnet {tmp_path}: {expected}")


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("", None, "Unable to load weights"),  # the file is cut off
        ("x_embedder.bias", None, "1 of its weights are missing (x_embedder.bias, ...)"),
        ("x_embedder.bias", torch.ones(2), "Cannot load because x_embedder.bias expected shape"),
        ("blocks.9.x", torch.ones(2), "1 of its weights have no place in its config (blocks.9.x"),
    ],
)
def test_damaged_weights_are_refused_before_the_checkpoint_is_loaded(
    name, tensor, expected, scene, union, tmp_path, monkeypatch
):
    net = shutil.copytree(union, tmp_path / "net")
    file = net / "diffusion_pytorch_model.safetensors"
    tensors = load(content := file.read_bytes()) | {name: tensor}
    tensors = {key: value for key, value in tensors.items() if value is not None}
    file.write_bytes(save(tensors) if name else content[:10_000])
    monkeypatch.setattr(prepare, "announce_and_load", None)
    flags = ("--control_mode", "1", "--control_image", scene.edges)
    said = refusal("--controlnet", str(net), *flags)
    assert said.startswith(f"--controlnet {net}: cannot be loaded: {expected}")
    assert len(said.splitlines()) == 1


def test_the_shape_follows_the_edges_and_without_the_net_it_does_not():
    """Held-out scenes; the bounds lie between the rows of tiny_flux/evaluation-controlnet.json."""
    from diffusers import FluxControlNetPipeline

    from tiny_flux import evaluate_controlnet

    pipe = FluxControlNetPipeline.from_pipe(plain(), dtype=torch.bfloat16, controlnet=edges())
    pipe.set_progress_bar_config(disable=True)
    scenes = evaluate_controlnet.held_out_scenes(10, seed=7)
    found = {}
    for scale in (0.0, 1.0):
        drawn = evaluate_controlnet.draw(pipe, scenes, scale, seed=7)
        found[scale] = evaluate_controlnet.score(drawn, scenes)
    assert found[1.0]["mean_overlap"] > 60 > 40 > found[0.0]["mean_overlap"], found
    assert found[1.0]["centre_off_px"] < 5 < 10 < found[0.0]["centre_off_px"], found
    assert found[1.0]["colours_right"] >= 80, found


def test_the_stored_net_is_small():
    from tiny_flux.controlnet import WEIGHTS

    assert WEIGHTS.stat().st_size <= 600_000


def test_on_a_gpu_the_mode_is_compile(as_machine):
    from utils.hardware import Machine

    as_machine(Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139.0))
    args = controlnet.parse([])
    controlnet._choose_mode(args)
    assert args.compile_export_mode == "compile"


def test_the_file_names_every_control(scene, tmp_path, monkeypatch):
    out = str(tmp_path / "out.png")
    flags = (*ON, *NET, "--control_image", scene.picture, "--preprocess", "canny")
    monkeypatch.setattr("sys.argv", ["controlnet", *flags, "--output-file", out])
    controlnet.main()
    about = json.loads(Image.open(out).text["call"])
    assert about["controls"] == f"tiny-edges 1 by canny of {scene.picture}"


def test_the_net_gets_a_graph_of_its_own(scene):
    """The wrapper's logic, with a recorder that runs the call again instead of replaying it."""
    from test_cudagraph import RerunRecorder

    from utils.cudagraph import GraphPool, usage, wrap_components
    from utils.pipeline_utils import generate, optimize

    args = controlnet.parse([*ON, *NET, "--control_image", scene.edges])
    pipeline, _ = controlnet.load(args)
    expected = generate(optimize(pipeline, args), args)[0]
    wrap_components(pipeline, GraphPool(RerunRecorder()))
    assert generate(pipeline, args)[0].tobytes() == expected.tobytes()
    assert usage(pipeline)["kept"] == 3  # transformer, net, decoder


@pytest.mark.gpu
def test_on_a_gpu_the_net_has_a_graph_of_its_own(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    from utils import cudagraph
    from utils.pipeline_utils import generate, optimize

    flags = (*NET, "--control_image", draw(tmp_path / "control.png"))
    mode = ("--compile_scope", "blocks", "--disable_quant")
    args = controlnet.parse(["--ckpt", "tiny-schnell", "--prompt", PROMPT, *flags, *mode])
    pipeline, _ = controlnet.load(args)
    made = generate(optimize(pipeline, args), args)[0]
    assert cudagraph.usage(pipeline)["kept"] == 3  # transformer, net, decoder
    assert psnr_db(made, by_us(controlnet, *OFF, "--disable_quant", *flags)[0]) > 35


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blocks", "full"])
def test_compiled_nets(scene, scope):
    flags = (*NET, "--control_image", scene.edges)
    mode = ("--compile_export_mode", "compile", "--compile_scope", scope)
    made = by_us(controlnet, *ON, *flags, *mode)[0]
    assert psnr_db(made, by_us(controlnet, *OFF, *flags)[0]) > 35

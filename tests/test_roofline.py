"""Work and floors: against known numbers, torch's own counter, real calls, and by hand."""

import inspect
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.conftest import make_args
from utils import architecture, peaks, random_weights, roofline, work
from utils.architecture import DEV, KONTEXT, SCHNELL
from utils.checkpoints import BUNDLED, resolve
from utils.hardware import Machine
from utils.layers import (
    WIDTH,
    Layer,
    Precision,
    attention,
    convolution,
    elementwise,
    linear,
    products,
    total,
)
from utils.peaks import CARDS, Peaks
from utils.steps import fused_projections, off, on, subpixel_upsampling
from utils.work import Call

BF16, PLAIN = torch.bfloat16, Precision()
PAIR = Peaks("pair", {"bf16": 1.0, "fp8": 2.0}, 0.01, "made up")  # ridges 100 and 200


def count(name: str, call: Call, precision: Precision = PLAIN) -> work.Work:
    return work.count(random_weights.configs_of(resolve(name, True)), call, precision)


def dev(text: int = 512, reference=None, name: str = DEV) -> work.Work:
    return count(name, Call(1024, 1024, text, 28, reference=reference))


def part(layers, name: str) -> list[Layer]:
    return [layer for layer in layers if layer.part == name]


def test_known_work_of_dev():
    # FLUX.1-dev at 1024x1024: exact counts, 2 FLOP per multiply-add
    layers = dev().layers
    step = layers["transformer"]
    assert total(step, "flop") == 74_384_653_418_496
    assert total(step, "flop", "linear", "modulation") == 59_512_255_414_272
    assert total(step, "flop", "attention") == 14_872_398_004_224
    assert total(part(step, "double blocks"), "flop") == 24_791_633_362_944
    assert total(part(step, "single blocks"), "flop") == 49_576_811_692_032
    assert total(dev(256).layers["transformer"], "flop") == 69_466_647_429_120
    assert total(layers["t5"], "flop") == 4_844_723_109_888
    assert total(dev(256).layers["t5"], "flop") == 2_396_591_751_168
    assert total(layers["clip"], "flop") == 13_298_503_680
    assert total(layers["vae_decoder"], "flop") == 10_472_204_009_472
    assert layers["vae_encoder"] == ()
    kontext = dev(reference=(1024, 1024), name=KONTEXT).layers
    assert total(kontext["transformer"], "flop") == 165_458_361_188_352
    assert total(kontext["vae_encoder"], "flop") == 4_882_572_509_184


def test_known_parameters():
    layers = dev(reference=(1024, 1024)).layers
    found = {name: total(each, "parameters") for name, each in layers.items()}
    assert found["transformer"] == 11_901_408_320
    assert total(dev(name=SCHNELL).layers["transformer"], "parameters") == 11_891_178_560
    assert found["t5"] == 4_762_310_656
    assert found["clip"] == 123_060_480
    assert found["vae_decoder"] == 49_545_475
    assert found["vae_decoder"] + found["vae_encoder"] == 83_819_683
    step = layers["transformer"]
    double, single = part(step, "double blocks"), part(step, "single blocks")
    assert total(double, "parameters") == 19 * 339_831_296
    assert total(single, "parameters") == 38 * 141_591_808
    assert total([*double, *single], "parameters", "modulation") == 3_228_567_552


def meta(*shape, dtype=BF16):
    return torch.empty(shape, dtype=dtype, device="meta")


def transformer_inputs(config: dict, call: Call, images: int) -> dict:
    return {
        "hidden_states": meta(call.images, images, config["in_channels"]),
        "encoder_hidden_states": meta(call.images, call.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": meta(call.images, config["pooled_projection_dim"]),
        "timestep": meta(call.images),
        "guidance": meta(call.images) if config["guidance_embeds"] else None,
        "img_ids": meta(images, 3),
        "txt_ids": meta(call.text_tokens, 3),
    }


def runs(call: Call, modules: dict) -> dict:
    """Give a function per component that runs it on the meta device."""
    vae, shrink = modules["vae"], 2 ** (len(modules["vae"].config.block_out_channels) - 1)
    images = (call.height // (2 * shrink)) * (call.width // (2 * shrink))
    if call.reference:
        images += (call.reference[0] // (2 * shrink)) * (call.reference[1] // (2 * shrink))
    inputs = transformer_inputs(modules["transformer"].config, call, images)
    latents = meta(call.images, 16, call.height // shrink, call.width // shrink)
    ids = {"device": "meta", "dtype": torch.long}
    return {
        "transformer": lambda: modules["transformer"](**inputs),
        "vae_decoder": lambda: vae.decode(latents),
        "vae_encoder": lambda: vae.encode(meta(1, 3, *call.reference)),
        "t5": lambda: modules["text_encoder_2"](torch.empty(call.prompts, call.text_tokens, **ids)),
        "clip": lambda: modules["text_encoder"](torch.empty(call.prompts, 77, **ids)),
    }


@pytest.mark.parametrize("name", [SCHNELL, DEV, *BUNDLED])
def test_against_torchs_counter_and_modules(name):
    # an odd call on purpose: nothing may be taken for granted but a batch of 1 for Kontext's image
    call = Call(160, 96, 77, 3, prompts=2, images=6, reference=(64, 208))
    modules = random_weights.modules(resolve(name, True), BF16, "meta")
    layers = count(name, call).layers
    with torch.no_grad():
        for component, run in runs(call, modules).items():
            with FlopCounterMode(display=False) as counter:
                run()
            assert total(layers[component], "flop") == counter.get_total_flops(), component
    built = [p.numel() for module in modules.values() for p in module.parameters()]
    assert sum(total(each, "parameters") for each in layers.values()) == sum(built)


class _Traffic(TorchFunctionMode):
    """Adds up what each product reads and writes. Units: bytes."""

    PRODUCTS = ("linear", "conv2d", "conv_transpose2d", "scaled_dot_product_attention")

    def __init__(self):
        super().__init__()
        self.moved = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in self.PRODUCTS:
            tensors = [x for x in (*args, *(kwargs or {}).values()) if torch.is_tensor(x)]
            self.moved += sum(x.numel() * x.element_size() for x in (*tensors, out))
        return out


def test_bytes_of_products_are_those_of_the_fused_modules():
    modules = random_weights.modules(resolve(DEV, True), BF16, "meta")
    fused_projections.apply(SimpleNamespace(**modules), None)
    call = Call(1024, 1024, 512, 28, images=2, reference=(1024, 1024))
    layers = count(DEV, call).layers
    # the encoder pads what its three strided convolutions read
    for component, off_by in (("transformer", 0), ("vae_decoder", 0), ("vae_encoder", 2e-3)):
        with torch.no_grad(), _Traffic() as traffic:
            runs(call, modules)[component]()
        moved = total(products(layers[component]), "bytes")
        assert moved == pytest.approx(traffic.moved, rel=off_by, abs=0), component


@pytest.mark.parametrize(("way", "off_by"), [("transposed", 0), ("phases", 1e-3)])
def test_upsampling_inside_of_a_convolution(way, off_by):
    modules = random_weights.modules(resolve(DEV, True), BF16, "meta")
    fused_projections.apply(SimpleNamespace(**modules), None)
    settings = SimpleNamespace(plan={"subpixel_upsampling": on(way=way)})
    subpixel_upsampling.apply(SimpleNamespace(vae=modules["vae"]), settings)
    call = Call(1024, 1024, 512, 28, subpixel_upsampling=True)
    layers = count(DEV, call).layers["vae_decoder"]
    with torch.no_grad(), FlopCounterMode(display=False) as counter, _Traffic() as traffic:
        runs(call, modules)["vae_decoder"]()
    # phases compute one row and column more than the picture has
    assert total(layers, "flop") == pytest.approx(counter.get_total_flops(), rel=off_by, abs=0)
    assert total(products(layers), "bytes") == pytest.approx(traffic.moved, rel=off_by, abs=0)
    saved = 512**2 * (256**2 + 512**2) + 256**2 * 1024**2  # five of nine taps, 2 FLOP each
    plain = total(dev().layers["vae_decoder"], "flop")
    assert plain - total(layers, "flop") == 2 * 5 * saved
    args = make_args("--device", "cpu", "--subpixel_upsampling", way)
    assert roofline.call_of(args).subpixel_upsampling
    assert not roofline.call_of(make_args("--device", "cpu")).subpixel_upsampling


def test_float8_moves_fewer_bytes_where_it_is_used():
    assert attention(1, 4, 2, 8, "bf16", "fp8").bytes == (3 * 1 + 2) * 4 * 2 * 8
    strided = 2 * (9 * 3 * 5 + 5 + 16 * (4 * 3 + 5))  # reads 8x8 to write 4x4
    assert convolution("x", 1, 3, 5, (4, 4), "bf16", stride=2).bytes == strided
    assert linear("x", 10, 32, 48, "bf16").bytes == 2 * (32 * 48 + 48 + 10 * 32 + 10 * 48)
    fast = linear("x", 10, 32, 48, "bf16", "fp8")
    assert fast.bytes == 32 * 48 + 10 * 32 + 2 * (48 + 10 * 48)

    def blocks(kind: str, precision: Precision) -> list[Layer]:
        layers = count(DEV, Call(1024, 1024, 512, 28), precision).layers["transformer"]
        return part(layers, f"{kind} blocks")

    float8 = Precision(linear="fp8", attention="fp8")
    # reads + writes of a token, in its 3072 channels. bf16: norm 1+1, QK norm 2+2 (in a double
    # block V is joined, too: 3+3), GELU 5+5 (4+4), gate 2+1; a double block has two norms and gates
    for kind, count_, bf16, fp8, norms in (("single", 38, 38, 33, 2), ("double", 19, 48, 42, 4)):
        plain, fast = (total(blocks(kind, p), "bytes", "elementwise") for p in (PLAIN, float8))
        weights = count_ * 2 * norms * 128
        assert plain == count_ * 4608 * 3072 * bf16 + weights
        assert fast == count_ * 4608 * 3072 * fp8 + weights  # half the writes, but V and out cast
    single = blocks("single", float8)
    assert {x.dtype for x in single if x.kind in ("linear", "attention")} == {"fp8"}
    assert {x.dtype for x in single if x.kind == "modulation"} == {"bf16"}
    everything = blocks("single", Precision(linear="fp8", other="fp8"))
    assert {x.dtype for x in everything if x.kind == "modulation"} == {"fp8"}
    fp32 = blocks("single", Precision(base="fp32"))
    assert total(fp32, "bytes") == 2 * total(blocks("single", PLAIN), "bytes")
    norm = part(dev().layers["vae_decoder"], "output")[0]  # GroupNorm reads twice
    assert norm.bytes == 2 * (3 * 128 * 1024**2 + 2 * 128)


def test_defaults_are_those_of_diffusers():
    from diffusers import FluxTransformer2DModel

    parameters = inspect.signature(FluxTransformer2DModel.__init__).parameters
    assert {name: parameters[name].default for name in work.TRANSFORMER} == work.TRANSFORMER


@pytest.mark.parametrize("ckpt", ["tiny-schnell", "tiny-kontext"])
def test_a_real_call_does_the_work_that_is_listed(ckpt, tmp_path):
    from utils.pipeline_utils import generate, load_pipeline

    flags = ["--ckpt", ckpt, "--num_inference_steps", "2", "--height", "64", "--width", "96"]
    flags += ["--prompt", "a red circle", "--prompt", "a white heart"]
    if ckpt == "tiny-kontext":
        Image.new("RGB", (80, 48)).save(tmp_path / "in.png")
        flags += ["--image", str(tmp_path / "in.png")]
    else:
        flags += ["--num_images_per_prompt", "2"]
    args = make_args("--device", "cpu", "--max_sequence_length", "40", *flags)
    listed = roofline.work_of(args)
    pipeline = load_pipeline(args)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        generate(pipeline, args)
    row = roofline.rows_of(listed, None, {})["call"]
    assert row["flop"] == counter.get_total_flops()
    assert listed.call.reference == ((48, 80) if ckpt == "tiny-kontext" else None)


def test_the_plan_decides_the_precision():
    args = make_args("--device", "cpu", "--ckpt", "tiny-dev")
    assert roofline.precision_of(args) == Precision()
    args.plan |= {"quant": on(filter="blocks"), "fa3": on(dtype="fp8")}
    assert roofline.precision_of(args) == Precision(linear="fp8", attention="fp8")
    args.plan |= {"quant": on(filter="all"), "fa3": on(dtype="bf16")}
    assert roofline.precision_of(args) == Precision(linear="fp8", other="fp8")
    args.plan |= {"quant": off(""), "fa3": off("")}
    args.dtype = torch.float32
    assert roofline.precision_of(args) == Precision(base="fp32")


def test_floor_by_hand():
    wide = Layer("wide", "linear", "", flop=4 * 10**12, bytes=10**10, dtype="bf16", count=3)
    thin = Layer("thin", "modulation", "", flop=10**10, bytes=10**10, dtype="bf16")
    fast = replace(wide, dtype="fp8", count=1)
    passing = elementwise("pass", 10**9, 1, 1, "bf16")  # 4e9 bytes
    found = [roofline.bound(x, PAIR) for x in (wide, thin, fast)]
    assert found == ["arithmetic", "memory", "arithmetic"]
    layers = [wide, thin, fast, passing]
    assert roofline.floor_s(layers, PAIR) == pytest.approx(3 * 4 + 1 + 2)
    assert roofline.arithmetic_s(layers, PAIR) == pytest.approx(3 * 4 + 0.01 + 2)
    assert roofline.elementwise_s(layers, PAIR) == pytest.approx(0.4)
    assert roofline.main_bound(layers, PAIR) == "arithmetic"
    assert roofline.main_bound([thin, passing], PAIR) == "memory"
    no_fp8 = replace(PAIR, tflop_per_s={"bf16": 1.0})
    assert roofline.floor_s(layers, no_fp8) is None  # never guessed
    assert roofline.floor_s([wide], no_fp8) == pytest.approx(12)
    assert roofline.bound(fast, no_fp8) == "" and roofline.floor_s(layers, None) is None
    assert PAIR.ridge("fp8") == 200 and no_fp8.ridge("fp8") is None


def test_rows_compare_times_with_the_floor():
    h200, step = CARDS["H200"].peaks, 74_384_653_418_496
    times = {"denoising_step": {"median": 0.1}, "decoding": {"median": 0.02}}
    rows = roofline.rows_of(dev(), h200, times, {"median": 3.0})
    row = rows["denoising_step"]
    assert row["flop"] == step and row["seconds"] == 0.1 and row["bound"] == "arithmetic"
    assert row["tflop_per_s"] == pytest.approx(743.847, rel=1e-5)
    assert row["mfu"] == pytest.approx(743.847 / 989.5, rel=1e-5)
    assert row["time_over_floor"] == pytest.approx(0.1 / row["floor_s"], rel=1e-5)
    # one row an image, so the memory's time on top of the arithmetic's: 6.56 GB at 4.8 TB/s
    assert row["floor_s"] == pytest.approx(step / 989.5e12 + 6.56e9 / 4.8e12, rel=1e-4)
    assert rows["prompt_encoding"]["seconds"] is None and rows["prompt_encoding"]["mfu"] is None
    call, text = rows["call"], rows["prompt_encoding"]
    assert call["flop"] == 28 * step + text["flop"] + rows["decoding"]["flop"]
    assert call["seconds"] == 3.0 and "image_encoding" not in rows
    both = roofline.rows_of(dev(reference=(1024, 1024)), h200, times)
    assert both["image_encoding"]["flop"] == 4_882_572_509_184 and both["call"]["mfu"] is None

    float8 = count(DEV, Call(1024, 1024, 512, 28), Precision(linear="fp8", attention="fp8"))
    fast = roofline.rows_of(float8, h200, times)["denoising_step"]
    assert fast["mfu"] == pytest.approx(row["mfu"] / 2, rel=1e-3)  # nearly all of it is float8
    unknown = roofline.rows_of(dev(), None, times)["denoising_step"]
    assert unknown["tflop_per_s"] == row["tflop_per_s"] and unknown["flop"] == step
    assert [unknown[key] for key in ("floor_s", "mfu", "time_over_floor", "bound")] == [None] * 4


def test_data_sheets_belong_to_exact_names():
    for card in CARDS.values():
        assert peaks.datasheet(card.machine) is card.peaks and card.peaks.source
        rates = card.peaks.tflop_per_s
        assert {"bf16", "int8"} <= set(rates) <= set(WIDTH) - {"fp32"}
        assert ("fp8" in rates) == (card.machine.capability >= (8, 9))
    for other in ("H100 PCIe", "H200 NVL", "GeForce RTX 4090 D", "L40", "A100-SXM4-40GB"):
        assert peaks.datasheet(Machine("cuda", f"NVIDIA {other}", (9, 0))) is None
    assert peaks.datasheet(Machine("cpu", "NVIDIA H200")) is None


def test_ceilings_are_measured_within_the_memory_that_is_free(monkeypatch):
    monkeypatch.setattr(peaks, "free_bytes", lambda device: 64 * 2**20)
    found = peaks.measure_ceilings("cpu", torch.float32)
    assert set(found.tflop_per_s) == {"fp32"} and found.tflop_per_s["fp32"] > 0
    assert "8 MiB" in found.source and found.tb_per_s > 0
    monkeypatch.setattr(peaks, "_seconds", lambda run, device: run() is None or 1e-3)
    found = peaks.measure_ceilings("cpu", BF16)
    assert found.tflop_per_s["bf16"] == pytest.approx(2 * 1024**3 / 1e-3 / 1e12)
    assert found.tb_per_s == pytest.approx(2 * 8 * 2**20 / 1e-3 / 1e12)
    assert peaks._float8("cpu", 64)().dtype == BF16  # what a GPU is asked to do, emulated here


def test_architecture_page_is_up_to_date():
    page = architecture.PAGE.read_text()
    assert architecture.render(page) == page, "run: python -m utils.architecture"
    with pytest.raises(ValueError, match="no markers for step"):
        architecture.render(page.replace("<!-- step -->", ""))


@pytest.mark.parametrize("kind, tokens", [("schnell", 4096), ("dev", 4096), ("dev", 1024)])
def test_schedule_is_diffusers(kind, tokens):
    import numpy as np
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = random_weights.SCHEDULER[kind]
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 7, 7), mu=calculate_shift(tokens))
    expected = architecture.timesteps(7, tokens, config)
    assert scheduler.timesteps.tolist() == pytest.approx(expected, rel=1e-5)

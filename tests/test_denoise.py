"""Our loop against the stock call: bit for bit, without a word to the host, refusals by name."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_args, optimized
from flux_pieces import inputs, relative_error
from flux_pieces import transformer as make_transformer
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from utils import denoise, quality
from utils.errors import UserError
from utils.kernels.modulation import Constants, HoistedFluxTransformer, hoist
from utils.pipeline_utils import generate, load_pipeline, optimize

MODELS = ("tiny-schnell", "tiny-dev", "tiny-kontext")
PLAIN = ("--disable_fused_projections", "--disable_fa3", "--disable_channels_last")
CALLS = (  # in this order on one pipeline: steps, sizes and batches go up and down
    ("--num_inference_steps", "4"),
    ("--num_inference_steps", "1", "--num_images_per_prompt", "3"),
    ("--num_inference_steps", "6", "--width", "96", "--height", "160"),
    ("--num_inference_steps", "2", "--prompt", "a red circle", "--prompt", "a white ring"),
    ("--num_inference_steps", "3", "--max_sequence_length", "64", "--seed", "7"),
    ("--num_inference_steps", "4"),
)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """Write the picture that Kontext edits; its size is no multiple of 16."""
    path = tmp_path_factory.mktemp("picture") / "in.png"
    pixels = np.random.default_rng(0).integers(0, 256, (100, 130, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def both(picture):
    """Give a function: model -> the stock pipeline, ours in fp32, and the flags of both."""
    known = {}

    def of(model: str) -> tuple:
        if model not in known:
            image = ("--image", picture) if model == "tiny-kontext" else ()
            flags = ("--ckpt", model, *image, "--disable_bf16", *PLAIN)
            ours, args = optimized(*flags, "--modulation_once")
            known[model] = load_pipeline(args), ours, flags
        return known[model]

    return of


@pytest.fixture
def step_by_step(monkeypatch):
    """Compute the constants of each step by themselves: the stock loop's products, row for row."""
    at_once = HoistedFluxTransformer.constants

    def one_by_one(self, timesteps, *conditions):
        steps = [at_once(self, t[None], *conditions) for t in timesteps]
        table = torch.cat([step.modulation for step in steps])
        return Constants(table, steps[0].context, steps[0].rotary_cos, steps[0].rotary_sin)

    monkeypatch.setattr(HoistedFluxTransformer, "constants", one_by_one)


def latents(pipeline, flags) -> torch.Tensor:
    return generate(pipeline, make_args("--device", "cpu", *flags), output_type="latent")


@pytest.fixture(scope="module")
def expected(both):
    """Give a function: model, call -> the stock pipeline's latents, cached."""
    known = {}

    def of(model: str, call: tuple) -> torch.Tensor:
        if (model, call) not in known:
            stock, _, flags = both(model)
            known[model, call] = latents(stock, (*flags, *call))
        return known[model, call]

    return of


@pytest.mark.parametrize("model", MODELS)
def test_the_loop_is_the_stock_loop_bit_for_bit(model, both, expected, step_by_step):
    _, ours, flags = both(model)
    for call in CALLS:
        assert torch.equal(latents(ours, (*flags, *call)), expected(model, call)), call


@pytest.mark.parametrize("model", MODELS)
def test_all_steps_at_once_only_change_the_order_of_sums(model, both, expected):
    _, ours, flags = both(model)
    for call in CALLS[:-1]:
        # Measured: 0 to 7e-7, with two prompts 5.0e-6
        assert relative_error(latents(ours, (*flags, *call)), expected(model, call)) < 2e-5, call


def test_pictures_are_decoded_like_stock_pictures(both, step_by_step):
    for model in MODELS:
        stock, ours, flags = both(model)
        args = make_args("--device", "cpu", *flags, *CALLS[2])
        expected, found = generate(stock, args)[0], generate(ours, args)[0]
        assert found.size == (96, 160)
        assert found.tobytes() == expected.tobytes()


def direct_calls(model: str, picture: str) -> list[dict]:
    """List calls that generate() does not make: every other argument of the stock call."""
    embeds = {
        "prompt_embeds": torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(1)),
        "pooled_prompt_embeds": torch.ones(2, 64 if model == "tiny-schnell" else 32),
    }
    text = {"prompt": "a red circle", "prompt_2": "a white ring", "height": 64, "width": 96}
    calls = [
        text | {"sigmas": [1.0, 0.7, 0.2], "num_inference_steps": 3},
        embeds | {"height": 64, "width": 64, "output_type": "np", "return_dict": False},
        text | {"latents": torch.ones(1, 24, 64), "guidance_scale": 2},
        {"prompt": "no size", "num_inference_steps": 1, "true_cfg_scale": 2.0},
    ]
    if model != "tiny-kontext":
        return calls
    opened, half = Image.open(picture).convert("RGB"), 64 * 96
    calls = [call | {"max_area": half} for call in calls]  # the ratio stays, the size changes
    shown = {"prompt": "make it green", "max_area": half, "num_inference_steps": 2}
    return [
        *calls,
        shown | {"image": opened, "_auto_resize": False, "height": 64, "width": 96},
        shown | {"image": [opened], "_auto_resize": False, "num_images_per_prompt": 2},
        shown | {"image": torch.ones(1, 16, 8, 12), "joint_attention_kwargs": {}},
    ]


@pytest.mark.parametrize("model", MODELS)
def test_other_arguments_do_what_they_do_in_the_stock_call(
    model, both, step_by_step, picture, monkeypatch
):
    stock, ours, _ = both(model)
    for call in direct_calls(model, picture):
        call = {"num_inference_steps": 2, "output_type": "latent"} | call
        made = []
        for pipeline in (stock, ours):
            result = pipeline(**call, generator=torch.Generator().manual_seed(3))
            made.append(torch.as_tensor(result[0]))
        assert torch.equal(*made), call


def test_kontext_says_when_it_changes_the_size(both, monkeypatch):
    _, ours, _ = both("tiny-kontext")
    said = []
    monkeypatch.setattr(denoise.logger, "warning", said.append)
    monkeypatch.setattr(ours, "encode_prompt", lambda **_: 1 / 0)
    for size in ({"height": 64, "width": 96}, {"height": 32, "width": 48}):
        with pytest.raises(ZeroDivisionError):
            ours(prompt="a red circle", max_area=64 * 96, **size)
    assert said == ["Kontext: 48x32 was asked for, 96x64 has max_area's 6144 pixels"]


def test_kontext_chooses_its_own_resolution_as_the_stock_call_does(both, picture, monkeypatch):
    """Compare what is encoded: the encoder itself takes long at a million pixels."""
    stock, ours, _ = both("tiny-kontext")
    seen = []

    def stop(image, *rest):
        seen.append(image)
        raise InterruptedError

    for pipeline in (stock, ours):
        monkeypatch.setattr(pipeline, "prepare_latents", stop)
        with pytest.raises(InterruptedError):
            pipeline(Image.open(picture).convert("RGB"), "make it green", height=64, width=64)
    assert torch.equal(*seen)
    assert 0.9 * 2**20 < seen[0][0, 0].numel() < 1.1 * 2**20


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("negative_prompt", "a blue square", "true CFG runs the transformer twice"),
        ("negative_prompt_embeds", torch.ones(1, 8, 64), "true CFG runs the transformer twice"),
        ("ip_adapter_image", Image.new("RGB", (8, 8)), "an IP-adapter adds to the blocks"),
        ("joint_attention_kwargs", {"scale": 0.5}, "read in every forward"),
        ("callback_on_step_end", lambda *_: {}, "a callback stops the loop on the host"),
    ],
)
def test_what_needs_the_stock_loop_is_refused_by_name(name, value, reason, both):
    _, ours, _ = both("tiny-dev")
    with pytest.raises(UserError, match=rf"{name}: .*{reason}.*leave out --modulation_once"):
        ours("a red circle", true_cfg_scale=4.0, **{name: value})


def test_the_stock_calls_own_checks_stay(both):
    _, ours, _ = both("tiny-dev")
    with pytest.raises(TypeError, match="contrast"):
        ours("a red circle", contrast=2)
    with pytest.raises(ValueError, match="max_sequence_length"):
        ours("a red circle", max_sequence_length=1000)
    with pytest.raises(ValueError, match="list of generators of length 1"):
        ours(["a", "b"], generator=[torch.Generator()], height=64, width=64)


def test_other_pipelines_and_schedulers_are_refused_by_name():
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetPipeline

    args = make_args("--device", "cpu")
    pipeline = load_pipeline(args)
    stock = type(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with pytest.raises(UserError, match="Scheduler with stochastic_sampling, expected FlowMatch"):
        denoise.install(pipeline)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    pipeline.transformer.encoder_hid_proj = torch.nn.Identity()
    with pytest.raises(UserError, match="found an IP-adapter"):
        denoise.install(pipeline)
    pipeline.__class__ = FluxControlNetPipeline
    with pytest.raises(UserError, match=r"found a FluxControlNetPipeline, .*ControlNet adds"):
        denoise.install(pipeline)
    pipeline.__class__ = stock
    del pipeline.transformer.encoder_hid_proj
    denoise.install(pipeline)
    assert type(pipeline).__name__ == stock.__name__ and isinstance(pipeline, stock)
    assert type(load_pipeline(args)) is stock  # other pipelines stay as they are


class NoHost(TorchDispatchMode):
    """Count operations, and fail on any that has a part of its inputs or results on the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs, result))
        places = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if places - {"meta"}:
            raise AssertionError(f"{func} works on {places}")
        return result


def loop_on_a_device_without_values(steps: int, reference: bool, transformer=None) -> int:
    """Run the loop on meta tensors: not on the host, and nothing can be read from them.

    Returns: how many operations it took
    """
    model = make_transformer(guidance=True).to("meta")
    hoist(model)
    call = {k: v.to("meta") for k, v in inputs(2).items() if isinstance(v, torch.Tensor)}
    latents = call["hidden_states"]
    constants = model.constants(
        torch.empty(steps, device="meta"),
        torch.empty(2, device="meta"),
        call["pooled_projections"],
        call["encoder_hidden_states"],
        call["txt_ids"],
        torch.cat([call["img_ids"]] * (1 + reference)),
    )
    lengths = torch.empty(steps, device="meta")
    other = latents if reference else None
    with NoHost() as spy:
        found = denoise.denoise(transformer or model, latents, other, constants, lengths)
    assert found.device.type == "meta" and found.shape == latents.shape
    return spy.count


@pytest.mark.parametrize("reference", [False, True], ids=["dev", "kontext"])
def test_nothing_in_the_loop_reaches_the_host(reference):
    one, five = (loop_on_a_device_without_values(steps, reference) for steps in (1, 5))
    assert five == 5 * one  # nor does anything hide in the first or last step


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        (lambda x: x * x.sum().item(), RuntimeError),
        (lambda x: x[(x > 0).nonzero()[:, 0]], NotImplementedError),
        (lambda x: x.cpu(), NotImplementedError),
        (lambda x: x * torch.ones(1).to(x), AssertionError),
    ],
    ids=["item", "nonzero", "to the host", "from the host"],
)
def test_a_loop_that_waits_would_be_noticed(wait, error):
    with pytest.raises(error):
        loop_on_a_device_without_values(
            2, False, lambda hidden_states, **rest: (wait(hidden_states),)
        )


def test_the_bar_counts_every_step(both, monkeypatch):
    _, ours, flags = both("tiny-schnell")
    bars = []

    class Bar(SimpleNamespace):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def update(self):
            self.done += 1

    def progress_bar(total):
        bars.append(Bar(total=total, done=0))
        return bars[-1]

    monkeypatch.setattr(ours, "progress_bar", progress_bar)
    generate(ours, make_args("--device", "cpu", *flags, *CALLS[2]), output_type="latent")
    assert [(bar.total, bar.done) for bar in bars] == [(6, 6)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("model", MODELS)
def test_gpu_the_whole_loop_waits_for_nothing(model, picture, untuned, monkeypatch):
    image = ("--image", picture) if model == "tiny-kontext" else ()
    flags = ("--ckpt", model, *image, "--device", "cuda", "--disable_quant", *CALLS[0])
    plain = make_args(*flags, "--disable_fa3", "--compile_export_mode", "disabled")
    expected = generate(load_pipeline(plain), plain)[0]
    mode = ("--compile_export_mode", "compile", "--compile_scope", "blocks")
    args = make_args(*flags, *mode, "--modulation_once")
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    loop = denoise.denoise

    def strict(*positional):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return loop(*positional)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(denoise, "denoise", strict)
    assert quality.psnr_db(generate(pipeline, args)[0], expected) > 35

"""Modulation computed once: the same vectors, one product each a call, in every mode."""

import pytest
import torch
from conftest import MODES, make_args, optimized
from diffusers import FluxTransformer2DModel
from flux_pieces import inputs, relative_error
from flux_pieces import transformer as make_transformer
from test_cudagraph import RerunRecorder
from test_denoise import NoHost
from torch._dynamo.testing import CompileCounter

from utils import quality
from utils.calls import only_known_calls
from utils.cudagraph import GraphPool, wrap_components
from utils.errors import UserError
from utils.kernels.modulation import Constants, hoist
from utils.layers import total
from utils.pipeline_utils import generate
from utils.roofline import work_of

FLAG = "--modulation_once"
TIMESTEPS = torch.tensor([1000.0, 752.3, 500.0, 250.1, 3.7])


def hoisted(**kind):
    model = make_transformer(**kind)
    hoist(model)
    return model


def call_of(batch: int, dtype, guided: bool) -> tuple[dict, torch.Tensor | None]:
    """Make the plain forward's inputs, and the guidance of the batch."""
    guidance = torch.linspace(1, 4, batch) if guided else None
    return inputs(batch, dtype=dtype) | {"guidance": guidance}, guidance


def constants_of(model, call: dict, timesteps: torch.Tensor) -> Constants:
    names = ("guidance", "pooled_projections", "encoder_hidden_states", "txt_ids", "img_ids")
    return model.constants(timesteps, *(call[name] for name in names))


def one_by_one(model, call: dict, timesteps: torch.Tensor) -> Constants:
    """Plain twin of constants(): each step by itself, as the plain forward does."""
    steps = [constants_of(model, call, t[None]) for t in timesteps]
    first = steps[0]
    table = torch.cat([step.modulation for step in steps])
    return Constants(table, first.context, first.rotary_cos, first.rotary_sin)


def plain_step(model, call: dict, t: torch.Tensor) -> torch.Tensor:
    """Run the plain forward at a timestep, given as FluxPipeline gives it."""
    batch, dtype = len(call["hidden_states"]), call["hidden_states"].dtype
    return model(**call | {"timestep": t.expand(batch).to(dtype) / 1000})[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("guided", [False, True], ids=["schnell", "dev"])
@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_step_equals_the_plain_forward(batch, guided, dtype):
    """Bit for bit where the products have the same rows, else but for the order of sums."""
    plain, model = (f(dtype=dtype, guidance=guided) for f in (make_transformer, hoisted))
    call, _ = call_of(batch, dtype, guided)
    twin, table = (f(model, call, TIMESTEPS) for f in (one_by_one, constants_of))
    assert table.modulation.shape == twin.modulation.shape
    for i, t in enumerate(TIMESTEPS):
        expected = plain_step(plain, call, t)
        img = call["hidden_states"]
        assert torch.equal(model(hidden_states=img, **twin.of_step(i))[0], expected)
        # Measured: 0 to 3e-7 in fp32; in bf16 a sum may fall on the other side of a rounding
        bound = 2e-6 if dtype == torch.float32 else 5e-3
        assert relative_error(model(hidden_states=img, **table.of_step(i))[0], expected) < bound


def test_weights_move_and_nothing_is_copied():
    plain, model = make_transformer(), make_transformer()
    before = {p.data_ptr() for p in model.parameters()}
    hoist(model)
    assert {p.data_ptr() for p in model.parameters()} == before
    assert len(model.modulation) == 2 * 1 + 2 + 1
    assert sum(model.modulation_widths) == sum(linear.out_features for linear in model.modulation)
    inside = [name for name, _ in model.named_parameters() if ".norm" in name and "linear" in name]
    assert not inside
    assert any("norm1.linear" in name for name, _ in plain.named_parameters())


def test_a_row_is_a_view_of_the_table():
    model, (call, _) = hoisted(), call_of(2, torch.bfloat16, False)
    table = constants_of(model, call, TIMESTEPS)
    row = table.of_step(3)["modulation"]
    assert row.is_contiguous() and row.data_ptr() == table.modulation[3].data_ptr()
    assert row.data_ptr() % 16 == 0  # what compiled code expects of its inputs


def test_what_a_call_reads_less_at_full_size(roomy):
    """Show where the docstrings' numbers come from, and what the roofline makes of the step."""
    where = ("--random_weights", "--ckpt", "black-forest-labs/FLUX.1-dev")
    plain, ours = (work_of(make_args("--device", "cpu", *where, *f)) for f in ((), (FLAG,)))
    adaln = [layer for layer in plain.stage("denoising_step") if "AdaLN" in layer.name]
    width = sum(layer.count * layer.parameters for layer in adaln) // (3072 + 1)
    assert width == 344 * 3072
    assert 56 < 28 * width * 2 / 2**20 < 57  # MiB: the table of Dev's 28 steps
    read = total(plain.stage("denoising_step"), "bytes", "modulation")
    assert 6.4e9 < read < 6.6e9
    assert read / 4.8e12 == pytest.approx(1.36e-3, rel=0.01)  # s, at an H200's 4.8 TB/s
    once = ours.stage("before_the_loop")
    assert total(ours.stage("denoising_step"), "bytes", "modulation") == 0
    assert total(once, "bytes", "modulation") < 1.02 * read  # for all steps
    assert total(once, "flop", "modulation") == 28 * total(adaln_and_mlps(plain), "flop")
    assert total(once, "parameters") + total(ours.stage("denoising_step"), "parameters") == total(
        plain.stage("denoising_step"), "parameters"
    )


def test_full_size_shapes_and_their_operations():
    """FLUX.1-dev itself, on a device without values: 57 blocks, 28 steps."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
        pooled, prompt = torch.empty(1, 768), torch.empty(1, 512, 4096)
        txt_ids, img_ids, img = torch.empty(512, 3), torch.empty(4096, 3), torch.empty(1, 4096, 64)
        timesteps, guidance = torch.empty(28), torch.empty(1)
    with NoHost() as plain:
        model(img, prompt, pooled, timesteps[:1], img_ids, txt_ids, guidance)
    hoist(model)
    table = model.constants(timesteps, guidance, pooled, prompt, txt_ids, img_ids)
    assert table.modulation.shape == (28, 1, 344 * 3072)
    with NoHost() as ours:
        assert model(hidden_states=img, **table.of_step(27))[0].shape == img.shape
    assert ours.count < plain.count - 200  # 77 linear layers with their SiLU, embedders, RoPE


def adaln_and_mlps(work) -> list:
    return [layer for layer in work.stage("denoising_step") if layer.kind == "modulation"]


def test_blocks_share_one_compilation():
    """Every block of a kind is the same code: what differs is an input, not a constant of it."""
    counts = []
    for model in (make_transformer(), hoisted()):
        torch._dynamo.reset()
        counter = CompileCounter()
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        call, _ = call_of(2, torch.bfloat16, False)
        if model.__class__.__name__ == "HoistedFluxTransformer":
            table = constants_of(model, call, TIMESTEPS)
            for i in range(len(TIMESTEPS)):
                model(hidden_states=call["hidden_states"], **table.of_step(i))
        else:
            for t in TIMESTEPS:
                plain_step(model, call, t)
        counts.append(counter.frame_count)
    assert counts[0] == counts[1] <= 3


def parts_computed_once(transformer) -> dict:
    """Name the modules that the loop has nothing to do with."""
    once = ("context_embedder", "pos_embed", "time_text_embed")
    return {name: getattr(transformer, name) for name in once} | {
        f"modulation.{k}": linear for k, linear in enumerate(transformer.modulation)
    }


@pytest.mark.parametrize("steps", ["1", "5"])
def test_each_product_is_computed_once_a_call(steps):
    pipeline, args = optimized("--num_inference_steps", steps, "--num_images_per_prompt", "2", FLAG)
    calls, forwards = [], []
    for name, module in parts_computed_once(pipeline.transformer).items():
        module.register_forward_hook(
            lambda module, args, result, name=name: calls.append((name, result))
        )
    pipeline.transformer.register_forward_hook(lambda *_: forwards.append(1))
    generate(pipeline, args, output_type="latent")
    names = [name for name, _ in calls]
    assert sorted(names) == sorted(parts_computed_once(pipeline.transformer))
    rows = {len(result) for name, result in calls if name.startswith("modulation")}
    assert rows == {2 * int(steps)}
    assert len(forwards) == int(steps)


TRIED = (*MODES[:2], *(pytest.param(mode, marks=pytest.mark.slow) for mode in MODES[2:]))
SHORT = ("--ckpt", "tiny-dev", "--num_inference_steps", "6")
CHANGES = (
    ("--num_inference_steps", "3"),
    ("--guidance_scale", "1.5"),
    ("--prompt", "a large green square on a white background", "--seed", "4"),
)


def worst_db(images, expected) -> float:
    return min(quality.psnr_db(a, b) for a, b in zip(images, expected, strict=True))


@pytest.mark.parametrize("mode", TRIED, ids=lambda mode: "-".join(mode[::2]))
def test_every_mode_and_no_other_code_for_other_steps(mode, reference, tmp_path):
    """One package, one compilation: the number of steps is none of the transformer's inputs."""
    torch._dynamo.reset()
    where = ("--compile_export_mode", *mode, "--cache-dir", str(tmp_path / "packages"))
    pipeline, args = optimized(*SHORT, *where, FLAG)
    assert args.plan["modulation"].is_on and args.plan["modulation"].lossless
    assert worst_db(generate(pipeline, args), reference(*SHORT).images) > 35
    with only_known_calls():
        for change in CHANGES:
            other = make_args("--device", "cpu", *SHORT, *change)
            assert worst_db(generate(pipeline, other), reference(*SHORT, *change).images) > 35


def test_graphs_copy_the_row_in():
    """What a CUDA graph does with its inputs, with a stand-in that reruns instead of replaying."""
    pipeline, args = optimized(*SHORT, FLAG)
    calls = [args, *(make_args("--device", "cpu", *SHORT, *change) for change in CHANGES)]
    expected = [generate(pipeline, call, output_type="latent") for call in calls]
    recorder = RerunRecorder()
    wrap_components(pipeline, GraphPool(recorder))
    for call, latents in zip(calls, expected, strict=True):
        assert torch.equal(generate(pipeline, call, output_type="latent"), latents)
    assert recorder.recorded == 1  # the decoder is not reached


def test_lossless_against_fp32(reference):
    """Rounding the same sums in another order adds nothing to what bf16 costs anyway."""
    truth = reference(*SHORT, "--disable_bf16").latents
    eager = quality.relative_l2(reference(*SHORT).latents, truth)
    pipeline, args = optimized(*SHORT, FLAG)
    ours = quality.relative_l2(quality.run(pipeline, args).latents, truth)
    assert ours < quality.LOSSLESS_FACTOR * eager


@pytest.mark.parametrize("which", ["blocks", "all"])
def test_with_float8_the_moved_layers_follow_the_filter(which, reference, float8_on_cpu):
    from utils.steps.quant import is_float8

    pipeline, args = optimized(*SHORT, FLAG, "--quant_filter", which)
    assert {is_float8(linear) for linear in pipeline.transformer.modulation} == {which == "all"}
    assert worst_db(generate(pipeline, args), reference(*SHORT).images) > 28


@pytest.mark.parametrize("images", ["1", "2"])
def test_with_fused_kernels_the_blocks_take_the_same_row(images, reference, monkeypatch):
    """Their blocks ask the norms for the vectors as diffusers' do."""
    from utils.steps import fused_kernels

    monkeypatch.setattr(fused_kernels, "lacking", lambda machine: "")
    flags = (*SHORT, "--num_images_per_prompt", images, "--disable_bf16")
    pipeline, args = optimized(*flags, FLAG, "--fused_kernels", "--disable_quant")
    assert args.plan["fused_kernels"].is_on and args.plan["modulation"].is_on
    found = quality.run(pipeline, args).latents
    assert quality.relative_l2(found, reference(*flags).latents) < 2e-5  # measured 6.5e-7


def test_a_step_cache_is_refused_before_any_weight():
    cache = ("--cache_dit_config", "cache_config.yaml")
    with pytest.raises(UserError, match="--modulation_once: a step cache calls the blocks itself"):
        make_args("--device", "cpu", "--ckpt", "tiny-dev", FLAG, *cache)


def test_off_without_its_flag():
    verdict = make_args("--device", "cpu").plan["modulation"]
    assert (verdict.state, verdict.reason) == ("off", "no --modulation_once")

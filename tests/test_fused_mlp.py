"""The step fused_mlp: one product where a single block has two, in every block and mode."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_args, optimized
from torch._dynamo.testing import CompileCounter

from tests.flux_pieces import inputs, pipeline, relative_error, stepped, transformer
from tests.peak_tensors import PeakTensors
from utils import quality
from utils.errors import UserError
from utils.kernels import fused_blocks
from utils.kernels.joint_projection import JointFluxSingleTransformerBlock
from utils.steps import fa3, fused_kernels, fused_mlp, fused_projections, quant

FLAG = "--fused_mlp"
SHORT = ("--prompt", "a red circle on a blue background", "--num_inference_steps", "2")


def joined(dtype=torch.bfloat16, step=True, processor=True, kernels=False, float8=False):
    """Give a transformer with fused projections, with or without the step and what comes after."""
    steps = [fused_projections] + [fused_mlp] * step + [fa3] * processor
    return stepped(steps + [fused_kernels] * kernels + [quant] * float8, dtype, float8)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [{"processor": False}, {}, {"kernels": True}], ids=str)
def test_a_joint_product_rounds_as_two(how, dtype, batch):
    """Every output is the same sum; a library may order it otherwise in a wider product."""
    call = inputs(batch, dtype=dtype)
    truth = transformer(torch.float32)(**inputs(batch, dtype=torch.float32))[0]
    eager = relative_error(transformer(dtype)(**call)[0], truth)
    found = relative_error(joined(dtype, **how)(**call)[0], truth)
    assert found < max(1.25 * eager, 1e-6)  # measured equal to the bit but for the kernels' twins


def test_nothing_is_left_twice_and_the_random_state_stays():
    pipe, before = pipeline(), transformer()
    fused_projections.apply(pipe, None)
    state = torch.get_rng_state()
    with PeakTensors() as peak:
        fused_mlp.apply(pipe, None)
    assert torch.equal(torch.get_rng_state(), state)
    blocks = pipe.transformer.single_transformer_blocks
    matrices = blocks[0].to_qkv_mlp.weight, blocks[0].to_qkv_mlp.bias
    # Beside the finished ones no more than the block at hand holds twice
    assert peak.peak <= len(blocks) * sum(x.nbytes for x in matrices)
    count = sum(p.numel() for p in before.parameters())
    assert sum(p.numel() for p in pipe.transformer.parameters()) == count
    names = {name for name, _ in blocks[0].named_parameters() if "norm" not in name}
    assert names == {f"{m}.{p}" for m in ("to_qkv_mlp", "proj_out") for p in ("weight", "bias")}
    assert not any(p.requires_grad for p in pipe.transformer.parameters())


@pytest.mark.parametrize("kernels", [False, True])
def test_float8_quantises_the_joint_matrix_once(kernels, float8_on_cpu):
    """One scale per row and per channel: joined, the same numbers."""
    call = inputs(2, text=3, height=1, width=5)
    model, apart = (joined(step=step, kernels=kernels, float8=True) for step in (True, False))
    block = model.single_transformer_blocks[0]
    assert quant.is_float8(block.to_qkv_mlp) and (not kernels or block.float8)
    assert relative_error(model(**call)[0], apart(**call)[0]) < 1e-6  # measured 0


def test_the_work_is_the_same():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in (transformer(), joined(processor=False)):
        with FlopCounterMode(display=False) as counter:
            model(**inputs())
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("kernels", [False, True])
def test_regional_compilation_finds_the_blocks(kernels):
    model, call = joined(kernels=kernels), inputs(text=3, height=1, width=5)
    kind = fused_blocks.FusedJointFluxSingleTransformerBlock
    kind = kind if kernels else JointFluxSingleTransformerBlock
    assert {type(block) for block in model.single_transformer_blocks} == {kind}
    expected = model(**call)[0]
    torch._dynamo.reset()
    counter = CompileCounter()
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    with torch.no_grad():
        assert relative_error(model(**call)[0], expected) < 1e-6
    assert counter.frame_count == 3  # the second single block gets slices of the first's output


def test_a_foreign_block_is_refused():
    pipe = pipeline()
    fused_projections.apply(pipe, None)

    class Other(type(pipe.transformer.single_transformer_blocks[0])):
        pass

    pipe.transformer.single_transformer_blocks[1].__class__ = Other
    with pytest.raises(UserError, match=r"found Other at single_transformer_blocks\.1"):
        fused_mlp.apply(pipe, None)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (("--disable_fused_projections",), "found --disable_fused_projections; leave"),
        (("--swap_loras",), "found --swap_loras: fused matrices would"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, found):
    night = "tiny_flux/loras/tiny-schnell-night.safetensors"
    loras = ("--lora", night, "--lora", f"{night}:0.5") if "--swap_loras" in flags else ()
    with pytest.raises(UserError) as error:
        make_args("--device", "cpu", FLAG, *flags, *loras)
    (line,) = str(error.value).splitlines()
    assert line.startswith("--fused_mlp: joins") and found in line


def test_off_without_its_flag_and_refused_for_compressed_weights():
    verdict = make_args("--device", "cpu").plan["fused_mlp"]
    assert (verdict.state, verdict.reason) == ("off", "no --fused_mlp")
    given = {"fused_mlp": True, "disable_fused_projections": False, "swap_loras": False}
    for mode, state in (("compressed", "refused"), ("dequantize", "on")):
        args = SimpleNamespace(gguf_file="x.gguf", gguf_mode=mode, **given)
        verdict = fused_mlp.check(args)
        assert verdict.state == state and (verdict.is_on or "--gguf_mode" in verdict.reason)


def scores_of(reference, *flags: str, plain: tuple = SHORT) -> dict:
    made, args = optimized(*flags, FLAG)
    assert args.plan["fused_mlp"].is_on and args.plan["fused_mlp"].lossless
    assert hasattr(made.transformer.single_transformer_blocks[0], "to_qkv_mlp")
    return quality.compare(quality.run(made, args), reference(*plain))


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--disable_fa3",),
        ("--modulation_once",),
        pytest.param(("--memory", "group"), marks=pytest.mark.slow),
        ("--memory", "sequential"),
    ],
    ids=lambda flags: " ".join(flags) or "default",
)
def test_the_picture_is_that_of_plain_diffusers(flags, reference):
    plain = (*SHORT, "--disable_bf16")
    assert scores_of(reference, *plain, *flags, plain=plain)["latents_relative_l2"] < 1e-5


@pytest.mark.slow
def test_with_a_step_cache(reference, tmp_path):
    settings = tmp_path / "cache.yaml"
    settings.write_text("{Fn_compute_blocks: 1, residual_diff_threshold: 0.2, max_warmup_steps: 3}")
    plain = ("--ckpt", "tiny-dev", "--num_inference_steps", "8", *SHORT[:2])
    cached = ("--cache_dit_config", str(settings), "--compile_export_mode", "disabled")
    scores = scores_of(reference, *plain, *cached, plain=plain)
    assert scores["psnr_db_worst"] > 20, scores


@pytest.mark.slow
def test_a_lora_is_fused_before(reference):
    lora = ("--lora", "tiny_flux/loras/tiny-schnell-night.safetensors")
    found, apart = (quality.run(*optimized(*SHORT, *lora, *flags)) for flags in ((FLAG,), ()))
    assert quality.relative_l2(found.latents, apart.latents) < 1e-2
    assert quality.relative_l2(found.latents, reference(*SHORT).latents) > 0.05  # and it shows


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [
        ("compile", "--compile_scope", "blocks"),
        ("export_aoti", "--compile_scope", "blocks"),
        ("export_aoti", "--compile_scope", "full"),
    ],
    ids="-".join,
)
@pytest.mark.parametrize("float8", [False, True], ids=["bf16", "float8"])
def test_compiled(mode, float8, reference, tmp_path, request):
    if float8:
        request.getfixturevalue("float8_on_cpu")
    torch._dynamo.reset()
    where = ("--compile_export_mode", *mode, "--cache-dir", str(tmp_path / "packages"))
    scores = scores_of(reference, *SHORT, *where)
    assert scores["psnr_db_worst"] is None or scores["psnr_db_worst"] > (28 if float8 else 35)

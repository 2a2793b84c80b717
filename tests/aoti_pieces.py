"""A tiny random FluxPipeline and its modules, exported and run: what the AOTI tests share."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch

from utils import aoti, artifacts
from utils.hardware import Machine
from utils.steps import off, on

PIXELS, TEXT = 16, 32  # edge of the picture, text tokens


TOKENS = (PIXELS // 4) ** 2  # this VAE halves once, FLUX packs 2x2


@dataclass(frozen=True)
class FakeCheckpoint:
    name: str = "tiny"
    weights: str = "sha256:1"

    def identity(self):
        return self.weights


def make_transformer(dtype, seed=0, guidance=False):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        guidance_embeds=guidance,
        axes_dims_rope=(16, 56, 56),
    )
    for name, parameter in model.named_parameters():
        if ".norm" in name and name.endswith("linear.bias"):
            torch.nn.init.normal_(parameter, std=0.5)  # gates near 0 would hide the blocks
    return model.requires_grad_(False).eval().to(dtype)


def make_pipeline(dtype=torch.float32, seed=0, guidance=False):
    """Build a FluxPipeline without text encoders: fused, custom attention op, channels-last VAE."""
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline

    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.steps import channels_last, fused_projections

    transformer = make_transformer(dtype, seed, guidance)
    vae = AutoencoderKL(
        latent_channels=16,
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=8,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.36,
        shift_factor=0.12,
    )
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.requires_grad_(False).eval().to(dtype),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    fused_projections.apply(pipeline, None)
    transformer.set_attn_processor(FlashFusedFluxAttnProcessor3_0("sdpa"))
    channels_last.apply(pipeline, None)
    return pipeline


def generate(pipeline, args, num_inference_steps=None, output_type="pt"):
    """Stand in for pipeline_utils.generate where there are no text encoders."""
    generator = torch.Generator().manual_seed(5)
    like = pipeline.transformer.x_embedder.bias
    with torch.no_grad():
        return pipeline(
            prompt_embeds=torch.randn(1, TEXT, 64, generator=generator).to(like),
            pooled_prompt_embeds=torch.randn(1, 64, generator=generator).to(like),
            height=args.height,
            width=args.width,
            num_inference_steps=num_inference_steps or 2,
            generator=torch.Generator().manual_seed(0),
            output_type=output_type,
        ).images


def make_args(cache_dir, **changes):
    args = SimpleNamespace(
        checkpoint=FakeCheckpoint(),
        machine=Machine("cpu", "test processor"),
        dtype=torch.float32,
        plan={"fused_projections": on(), "channels_last": on(), "quant": off("cpu")},
        cache_dir=str(cache_dir),
        use_cached_model=False,
        compile_export_mode="export_aoti",
        compile_scope="full",
        disable_inductor_tuning_flags=False,
        height=PIXELS,
        width=PIXELS,
    )
    vars(args).update(changes)
    return args


def transformer_call(**changes):
    """A call that the transformer's package covers, with changes."""
    call = {
        "hidden_states": torch.randn(1, TOKENS, 64),
        "encoder_hidden_states": torch.randn(1, TEXT, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.rand(TOKENS, 3),
        "txt_ids": torch.zeros(TEXT, 3),
        "guidance": None,
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
    return call | changes


def packaged(name, module, call, tmp_path):
    """Export, compile, store and load one module; give the component and its new forward."""
    component = aoti.Component(name, module)
    aoti.record_inputs([component], lambda: module(**call))
    files, constants = aoti.compile_package(aoti.export(component), component, {})
    package = artifacts.save(
        artifacts.open_cache(tmp_path / "c"), {"component": name}, files, constants
    )
    return aoti.PackageForward(component, aoti.attach(component, package.files, constants)), package


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def quantise(model, granularity, monkeypatch):
    """Quantise the blocks' Linears on a CPU, which torchao would refuse."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda g: None)
    config = Float8DynamicActivationFloat8WeightConfig(granularity=granularity)
    quantize_(
        model,
        config,
        filter_fn=lambda m, n: isinstance(m, torch.nn.Linear) and "blocks" in n and "norm" not in n,
    )

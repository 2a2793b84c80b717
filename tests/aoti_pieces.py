"""A tiny random FluxPipeline and its modules, exported and run: what the AOTI tests share."""

from dataclasses import dataclass
from types import SimpleNamespace

import flux_pieces
import torch

from tests import emulation
from utils import aoti, artifacts
from utils.benchmark_utils import create_parser
from utils.hardware import Machine
from utils.steps import off, on

PIXELS, TEXT = 16, 32  # edge of the picture, text tokens


TOKENS = (PIXELS // 4) ** 2  # this VAE halves once, FLUX packs 2x2


@dataclass(frozen=True)
class FakeCheckpoint:
    name: str = "tiny"
    weights: str = "sha256:1"

    def identity(self, cache_dir):
        return self.weights


def make_transformer(dtype, seed=0, guidance=False):
    return flux_pieces.transformer(dtype, channels=64, seed=seed, guidance=guidance)


def make_pipeline(dtype=torch.float32, seed=0, guidance=False):
    """Build a FluxPipeline without text encoders: fused, custom attention op, channels-last VAE."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
    from utils.steps import channels_last, fused_projections

    transformer = make_transformer(dtype, seed, guidance)
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=flux_pieces.vae(dtype),
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
    defaults = vars(create_parser().parse_args([]))  # a new step's flags included
    settings = dict(
        checkpoint=FakeCheckpoint(),
        machine=Machine("cpu", "test processor"),
        dtype=torch.float32,
        plan={"fused_projections": on(), "channels_last": on(), "quant": off("cpu")},
        cache_dir=str(cache_dir),
        compile_export_mode="export_aoti",
        compile_scope="full",
        quant_granularity="row",
        gguf_file=None,
        disable_inductor_tuning_flags=False,
        height=PIXELS,
        width=PIXELS,
    )
    settings |= changes
    settings.setdefault("device", settings["machine"].device)
    return SimpleNamespace(**(defaults | settings))


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
    """Export, compile, store and load one module; give its new forward for one kind of call."""
    component = aoti.Component(name, module)
    aoti.record_inputs([component], lambda: module(**call))
    files, constants = aoti.compile_package(aoti.export(component), component, {})
    package = artifacts.save(
        artifacts.open_cache(tmp_path / "c"), {"component": name}, files, constants
    )
    runs = [aoti.attach(component, package.files, constants)]
    return aoti.PackageForward(component, lambda _: runs.pop()), package


def quantise(model, granularity):
    """Quantise the blocks' Linears on a CPU, which torchao would refuse."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, quantize_

    def chosen(m, n):
        return isinstance(m, torch.nn.Linear) and "blocks" in n and "norm" not in n

    config = Float8DynamicActivationFloat8WeightConfig(granularity=granularity)
    with emulation.float8():
        quantize_(model, config, filter_fn=chosen)

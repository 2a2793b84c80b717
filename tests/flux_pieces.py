"""Small random FLUX parts for tests that need no picture."""

from types import SimpleNamespace

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch._dynamo.backends.common import aot_autograd

from utils import aoti
from utils.steps import on


def transformer(
    dtype=torch.bfloat16, heads: int = 2, channels: int = 16, seed: int = 0, guidance: bool = False
):
    """Build 1 double and 2 single blocks with heads of 128, whose blocks really matter.

    A fresh model's gates are nearly zero, so that its blocks hardly reach the output and any error
    in them would pass. Here the modulation has biases of order 1.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=channels,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=128,
            num_attention_heads=heads,
            joint_attention_dim=64,
            pooled_projection_dim=64,
            guidance_embeds=guidance,
            axes_dims_rope=(16, 56, 56),
        )
        for name, parameter in model.named_parameters():
            if ".norm" in name and name.endswith("linear.bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model.requires_grad_(False).eval().to(dtype)


def inputs(batch: int = 1, text: int = 7, height: int = 3, width: int = 5, dtype=torch.bfloat16):
    """Make the transformer's arguments; every count is odd on purpose."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    ids = torch.zeros(height * width, 3)
    ids[:, 1] = torch.arange(height * width) // width
    ids[:, 2] = torch.arange(height * width) % width
    return {
        "hidden_states": random(batch, height * width, 16),
        "encoder_hidden_states": random(batch, text, 64),
        "pooled_projections": random(batch, 64),
        "timestep": torch.rand(batch, generator=generator).to(dtype),
        "img_ids": ids,
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


def vae(dtype=torch.bfloat16):
    """Build a two-level AutoencoderKL with the attention of FLUX's middle block."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoencoderKL(
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
    return model.requires_grad_(False).eval().to(dtype)


def pipeline(dtype=torch.bfloat16):
    """Give what steps see of a pipeline."""
    return SimpleNamespace(transformer=transformer(dtype), vae=vae(dtype))


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def stepped(steps, dtype=torch.bfloat16, float8=False, attention="bf16", device="cpu"):
    """Give a transformer after these steps, attention by torch's kernel."""
    pipe = pipeline(dtype)
    pipe.transformer.to(device)
    plan = {"fa3": on(backend="sdpa", dtype=attention), "fused_kernels": on(float8=float8)}
    args = SimpleNamespace(plan=plan | {"quant": on(granularity="row", filter="blocks")})
    for step in steps:
        step.apply(pipe, args)
    return pipe.transformer


def traced_products(block) -> list[tuple]:
    """Compile both layers of a single block's MLP: of each float8 product the graph's arguments.

    Returns: how many scales each operand has, the bias, the output's dtype.
    """
    found = []

    def look(graph, _):
        for node in graph.graph.nodes:
            if node.target is torch.ops.aten._scaled_mm.default:
                scales = [x.meta["val"].numel() for x in node.args[2:4]]
                bias = node.args[4] if len(node.args) > 4 else node.kwargs.get("bias")
                found.append((scales, bias, node.meta["val"].dtype))
        return graph.forward

    with torch.no_grad():
        layers = torch.compile(
            lambda x: block.proj_out(torch.cat([x, block.proj_mlp(x)], dim=-1)),
            backend=aot_autograd(fw_compiler=look),
            fullgraph=True,
        )
        layers(torch.zeros(1, 3, block.proj_mlp.in_features, dtype=torch.bfloat16))
    return found


def traced_and_exported(model, call: dict, tolerance: float) -> list[str]:
    """Compare a transformer with itself, compiled whole and exported; name the exported nodes."""
    expected = model(**call)[0]
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert relative_error(compiled(**call)[0], expected) < tolerance
    component = aoti.Component("transformer", model)
    component.inputs = component.bind((), call)[0]
    program = aoti.export(component)
    assert relative_error(program.module()(**component.inputs)[0], expected) < tolerance
    return [str(node.target) for node in program.graph.nodes]

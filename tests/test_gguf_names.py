"""Files with the original code's names, as most converters write them."""

import json
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file

from extras.write_gguf import write
from utils import quality, readme
from utils.gguf_file import Contents, problem, read_header
from utils.steps.gguf import load_transformer

CONFIG = {
    "num_layers": 1,
    "num_single_layers": 1,
    "guidance_embeds": False,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 64,
}
STREAMS = {  # of a double block: its own names, norm, MLP, output, Q K V and their norms
    "img": ("norm1", "ff", "to_out.0", ("to_q", "to_k", "to_v"), ("norm_q", "norm_k")),
    "txt": (
        "norm1_context",
        "ff_context",
        "to_add_out",
        ("add_q_proj", "add_k_proj", "add_v_proj"),
        ("norm_added_q", "norm_added_k"),
    ),
}
LINEARS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "single_transformer_blocks.0.norm.linear": "single_blocks.0.modulation.lin",
    "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
}


def as_original(state: dict) -> dict:
    """Name and join the tensors of CONFIG as the original code does."""
    linears, joined, scales = dict(LINEARS), {}, {}
    double, new = "transformer_blocks.0.", "double_blocks.0."
    for side, (norm, mlp, out, qkv, norms) in STREAMS.items():
        linears |= {
            f"{double}{norm}.linear": f"{new}{side}_mod.lin",
            f"{double}{mlp}.net.0.proj": f"{new}{side}_mlp.0",
            f"{double}{mlp}.net.2": f"{new}{side}_mlp.2",
            f"{double}attn.{out}": f"{new}{side}_attn.proj",
        }
        joined[f"{new}{side}_attn.qkv"] = [f"{double}attn.{name}" for name in qkv]
        for name, kind in zip(norms, ("query_norm", "key_norm"), strict=True):
            scales[f"{double}attn.{name}"] = f"{new}{side}_attn.norm.{kind}"
    single, new = "single_transformer_blocks.0.", "single_blocks.0."
    parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    joined[new + "linear1"] = [single + part for part in parts]
    for name, kind in (("norm_q", "query_norm"), ("norm_k", "key_norm")):
        scales[f"{single}attn.{name}"] = f"{new}norm.{kind}"

    made = {f"{to}.scale": state[f"{name}.weight"] for name, to in scales.items()}
    for end in ("weight", "bias"):
        made |= {f"{to}.{end}": state[f"{name}.{end}"] for name, to in linears.items()}
        for to, names in joined.items():
            made[f"{to}.{end}"] = torch.cat([state[f"{name}.{end}"] for name in names])
        scale, shift = state[f"norm_out.linear.{end}"].chunk(2)  # the original has them swapped
        made[f"final_layer.adaLN_modulation.1.{end}"] = torch.cat([shift, scale])
    return made


def test_every_name_and_shape_is_known_at_full_size():
    with torch.device("meta"):
        model = FluxTransformer2DModel(**CONFIG)
    tensors = {
        name: ("F32" if tensor.ndim < 2 else "Q4_K", tuple(tensor.shape))
        for name, tensor in as_original(model.state_dict()).items()
    }
    assert problem(Contents(tensors, 0), CONFIG) == ""
    without = {name: t for name, t in tensors.items() if name != "txt_in.weight"}
    assert "txt_in.weight: found nothing, expected (3072, 64)" in problem(
        Contents(without, 0), CONFIG
    )
    more = Contents(tensors | {"double_blocks.1.img_mod.lin.bias": ("F32", (18432,))}, 0)
    assert "img_mod.lin.bias: found (18432,), expected nothing" in problem(more, CONFIG)
    narrow = CONFIG | {"num_attention_heads": 2}
    assert "width 3072 only" in problem(Contents(tensors, 0), narrow)


def test_the_table_of_the_page_is_that_of_the_rows():
    page = readme.MEMORY.read_text()
    assert readme.render(page, readme.FILES, readme.MEMORY.name) == page
    assert sum("| compressed |" in line for line in page.splitlines()) >= 2


@pytest.mark.slow
def test_a_file_of_flux_width_is_read(tmp_path):
    """One double and one single block of FLUX.1's width, 0.5 GB as Q8_0."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(**CONFIG).bfloat16()
    weights = tmp_path / "weights"
    weights.mkdir()
    save_file(as_original(model.state_dict()), weights / "x.safetensors")
    write(weights, tmp_path / "original.gguf", "Q8_0")
    assert problem(read_header(tmp_path / "original.gguf"), CONFIG) == ""
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "scheduler"):
        (tmp_path / part).mkdir()
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        content = dict(model.config) if part == "transformer" else {}
        (tmp_path / part / name).write_text(json.dumps(content))
    args = SimpleNamespace(
        checkpoint=SimpleNamespace(path=tmp_path),
        gguf_file=str(tmp_path / "original.gguf"),
        gguf_mode="dequantize",
        dtype=torch.bfloat16,
    )
    read = load_transformer(args).state_dict()
    for name, weight in model.state_dict().items():
        assert quality.relative_l2(read[name], weight) < 0.01, name  # Q8_0: 0.005 on normal ones

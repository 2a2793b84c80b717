"""FLUX's two kinds of block over the fused kernels: same weights, same result, fewer passes.

Each is diffusers' block with another forward: `fused_kernels` changes the class of the blocks that
are there, so that weights, their names and every other method stay. Between two products there is
one kernel; the residual at a block's end, which has to be whole for whatever stands between the
blocks (ControlNet, a step cache), takes one more, unless step triton_float8 puts it into the
product. `float8` says that torchao made all of a block's Linears float8 with one scale per row:
their inputs are then quantised where they are computed, once for all that read them. What the
attention gives to its own output Linears torchao quantises. An MLP's last Linear with `input_scale`
(step static_scales) gets its input from the first product itself.
"""

import torch
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from utils.kernels.flash_attention import flash_attn_func
from utils.kernels.float8_gelu import float8_gelu
from utils.kernels.float8_linear import linear_float8
from utils.kernels.joint_projection import split
from utils.kernels.modulate import gelu_quantize, norm_modulate
from utils.kernels.norm_rope import norm_rope


def _linear(linear: torch.nn.Linear, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Apply a Linear to [x], or to [x e4m3, row scale]."""
    return linear(*inputs) if len(inputs) == 1 else linear_float8(*inputs, linear)


def _heads(attn, inputs: list[torch.Tensor], fused: str, separate: tuple) -> list[torch.Tensor]:
    """Project to Q, K and V of one stream, three of (B, S, H, D)."""
    if attn.fused_projections:
        tensors = _linear(getattr(attn, fused), inputs).chunk(3, dim=-1)
    else:
        tensors = [_linear(getattr(attn, name), inputs) for name in separate]
    return [x.unflatten(-1, (-1, attn.head_dim)) for x in tensors]


def attend(attn, img: list, txt: list | None, rope: tuple[torch.Tensor, torch.Tensor]):
    """Do what FlashFusedFluxAttnProcessor3_0 does up to the heads' outputs.

    Shapes: img [x (B, S, C)] or [x e4m3, row scale (B, S, 1)], txt likewise with T tokens or None;
        rope two of (T + S, D) fp32 -> (B, T + S, C)
    Raises: ValueError after set_attention_backend() or context parallelism, as the processor does.
    """
    processor = attn.processor
    if processor._attention_backend is not None or processor._parallel_config is not None:
        raise ValueError(
            "set_attention_backend() and context parallelism do not reach the fused blocks; "
            "use --attention_backend, or leave out --fused_kernels"
        )
    norms = [attn.norm_q.weight, attn.norm_k.weight]
    img = _heads(attn, img, "to_qkv", ("to_q", "to_k", "to_v"))
    if txt is not None:
        norms += [attn.norm_added_q.weight, attn.norm_added_k.weight]
        txt = _heads(attn, txt, "to_added_qkv", ("add_q_proj", "add_k_proj", "add_v_proj"))
    how = (attn.norm_q.eps, processor.fp8, processor.rotate)
    inputs = norm_rope(img, txt or [], norms, *rope, *how)
    if len(inputs) == 2:
        inputs = [*inputs, img[2]]  # one stream in bf16: its V is where it should be
    out = flash_attn_func(*inputs, backend=processor.backend)
    return out.flatten(2, 3).to(img[2].dtype)


def _static_hidden(inputs: list, up, down, attention=None) -> list[torch.Tensor]:
    """Give what an MLP's last Linear reads, in float8 with its static scale.

    Shapes: inputs [x e4m3 (B, S, C), row scale (B, S, 1)], attention (B, S, C) or None
        -> [[attention, gelu(MLP)] e4m3, scale (2,)]
    """
    weights = up.weight.qdata, up.weight.scale, up.bias
    return [float8_gelu(*inputs, *weights, down.input_scale, attention), down.input_scale]


def _refuse(joint_attention_kwargs: dict | None) -> None:
    if joint_attention_kwargs:
        names = ", ".join(joint_attention_kwargs)
        raise ValueError(f"fused blocks take no {names}; leave out --fused_kernels")


class FusedFluxTransformerBlock(FluxTransformerBlock):
    """Double block: text and image with weights of their own, attention over both."""

    float8 = False

    def _feed_forward(self, x, y, gates, norm, linears):
        """Apply gate + residual, norm, modulation, MLP, gate + residual of one stream.

        Shapes: x, y (B, S, C), gates and norm (B, C) each -> (B, S, C)
        """
        x, *inputs = norm_modulate(x, *norm, y, gates[0], float8=self.float8)
        up, down = linears.net[0], linears.net[2]
        if self.float8:
            if hasattr(down, "input_scale"):
                hidden = _static_hidden(inputs, up.proj, down)
            else:
                hidden = gelu_quantize(linear_float8(*inputs, up.proj))
            return linear_float8(*hidden, down, x, gates[1])
        return x + gates[1][:, None] * down(up(*inputs))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what diffusers' block does.

        Shapes: hidden_states (B, S, C), encoder_hidden_states (B, T, C), temb (B, C)
            -> the same two, text first
        """
        _refuse(joint_attention_kwargs)
        streams = []
        for x, norm in ((encoder_hidden_states, self.norm1_context), (hidden_states, self.norm1)):
            shift, scale, gate, *others = norm.linear(norm.silu(temb)).chunk(6, dim=1)
            streams.append((x, norm_modulate(x, shift, scale, float8=self.float8), gate, *others))
        txt, img = streams
        out = attend(self.attn, img[1], txt[1], image_rotary_emb)
        # Dense as in diffusers: on a strided slice Linear takes another path, and rounds otherwise
        counts = [encoder_hidden_states.shape[1], hidden_states.shape[1]]
        txt_out, img_out = (x.contiguous() for x in out.split_with_sizes(counts, dim=1))
        results = []
        for (x, _, gate, shift, scale, last), y, linears in (
            (txt, self.attn.to_add_out(txt_out), self.ff_context),
            (img, self.attn.to_out[0](img_out), self.ff),
        ):
            results.append(self._feed_forward(x, y, (gate, last), (shift, scale), linears))
        return tuple(results)


class FusedFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """Single block: one stream, attention and MLP side by side."""

    float8 = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Do what diffusers' block does.

        Shapes: hidden_states (B, S, C), encoder_hidden_states (B, T, C), temb (B, C)
            -> the same two, text first
        """
        _refuse(joint_attention_kwargs)
        txt, img = encoder_hidden_states, hidden_states
        shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
        inputs = norm_modulate(img, shift, scale, float8=self.float8, front=txt)
        if hasattr(self.proj_out, "input_scale"):
            out = attend(self.attn, inputs, None, image_rotary_emb)
            hidden = _static_hidden(inputs, self.proj_mlp, self.proj_out, out)
        else:
            heads, mlp = self._project(inputs)
            out = attend(self.attn, heads, None, image_rotary_emb)
            if self.float8:
                hidden = gelu_quantize(mlp, out)
            else:
                hidden = torch.cat([out, self.act_mlp(mlp)], dim=2)
        if self.float8:
            x = linear_float8(*hidden, self.proj_out, img, gate, txt)
        else:
            x = torch.cat([txt, img], dim=1) + gate[:, None] * self.proj_out(hidden)
        return x[:, : txt.shape[1]], x[:, txt.shape[1] :]

    def _project(self, inputs):
        """Give what the attention projects, and the MLP's input (B, S, M)."""
        return inputs, _linear(self.proj_mlp, inputs)


class FusedJointFluxSingleTransformerBlock(FusedFluxSingleTransformerBlock):
    """Single block after step fused_mlp: one product for attention and MLP."""

    def _project(self, inputs):
        qkv, mlp = split(self, _linear(self.to_qkv_mlp, inputs))
        return [qkv], mlp

"""FLUX's attention processor over `flash::flash_attn_func`, with fused or separate projections."""

import torch
from diffusers.models.embeddings import apply_rotary_emb

from utils.kernels.flash_attention import BACKENDS, flash_attn_func, quantize_heads


def _project(attn, hidden_states, encoder_hidden_states):
    """Project to queries, keys and values, text tokens first in double blocks.

    Shapes: hidden_states (B, S, C), encoder_hidden_states (B, T, C) or None
        -> three of (B, T + S, H, D), queries and keys normalised, RoPE not yet applied
    """
    if attn.fused_projections:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in (q, k, v))  # [B, S, H, D]
    q, k = attn.norm_q(q), attn.norm_k(k)
    if encoder_hidden_states is None:
        return q, k, v

    if attn.fused_projections:
        txt_q, txt_k, txt_v = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
    else:
        txt_q = attn.add_q_proj(encoder_hidden_states)
        txt_k = attn.add_k_proj(encoder_hidden_states)
        txt_v = attn.add_v_proj(encoder_hidden_states)
    txt_q, txt_k, txt_v = (x.unflatten(-1, (-1, attn.head_dim)) for x in (txt_q, txt_k, txt_v))
    txt_q, txt_k = attn.norm_added_q(txt_q), attn.norm_added_k(txt_k)
    return (
        torch.cat([txt_q, q], dim=1),
        torch.cat([txt_k, k], dim=1),
        torch.cat([txt_v, v], dim=1),
    )


class FlashFusedFluxAttnProcessor3_0:
    """Replace FluxAttnProcessor: one attention op, optionally with queries, keys, values in fp8.

    With fp8, each (batch, head) has its own scale (quantize_heads), written in plain torch, which
    Inductor fuses as far as it can (`--fused_kernels` goes further). `rotate` turns queries and
    keys before (utils/kernels/rotation.py), by the kernel that step fused_kernels has for all this.
    """

    # diffusers looks for both on every processor; without them its setters skip this one silently
    _attention_backend = None
    _parallel_config = None

    def __init__(self, backend: str, fp8: bool = False, rotate: bool = False):
        """Choose the kernel.

        Raises: ValueError for an unknown backend, and for a rotation that nothing would need.
        """
        if backend not in BACKENDS:
            raise ValueError(f"attention backend: got {backend!r}, expected one of {BACKENDS}")
        if rotate and not fp8:
            raise ValueError("rotate: only in front of a float8 cast")
        self.backend = backend
        self.fp8 = fp8
        self.rotate = rotate
        if rotate:  # in plain torch it would move 7 times the bytes (docs/performance.md)
            from utils.kernels.fused_blocks import attend

            self._attend = attend

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attend over text and image tokens of one FluxAttention.

        Shapes: hidden_states (B, S, C); encoder_hidden_states (B, T, C) in double blocks, None in
            single ones (text is inside already); image_rotary_emb two of (T + S, D) fp32
            -> (B, S, C), in double blocks with (B, T, C)
        Raises: ValueError for a mask, and after set_attention_backend() or context parallelism,
            which this processor would otherwise ignore.
        """
        if attention_mask is not None:
            raise ValueError("attention_mask: flash attention takes none; use --disable_fa3")
        if self._attention_backend is not None or self._parallel_config is not None:
            raise ValueError(
                "set_attention_backend() and context parallelism do not reach this processor; "
                "use --attention_backend, or --disable_fa3"
            )
        if self.rotate:
            context = None if encoder_hidden_states is None else [encoder_hidden_states]
            out = self._attend(attn, [hidden_states], context, image_rotary_emb)
        else:
            out = self._plain(attn, hidden_states, encoder_hidden_states, image_rotary_emb)
        if encoder_hidden_states is None:
            return out
        txt, img = out.split_with_sizes(
            [encoder_hidden_states.shape[1], hidden_states.shape[1]], dim=1
        )
        # Dense as in diffusers: on a strided slice Linear takes another path, and rounds otherwise
        img, txt = img.contiguous(), txt.contiguous()
        return attn.to_out[1](attn.to_out[0](img)), attn.to_add_out(txt)

    def _plain(self, attn, hidden_states, encoder_hidden_states, image_rotary_emb):
        """Project, turn and attend in plain torch around the op. Shapes: -> (B, T + S, C)"""
        q, k, v = _project(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            q = apply_rotary_emb(q, image_rotary_emb, sequence_dim=1)
            k = apply_rotary_emb(k, image_rotary_emb, sequence_dim=1)
        if self.fp8:
            q, q_descale = quantize_heads(q)
            k, k_descale = quantize_heads(k)
            v, v_descale = quantize_heads(v)
            out = flash_attn_func(q, k, v, q_descale, k_descale, v_descale, self.backend)
        else:
            out = flash_attn_func(q, k, v, backend=self.backend)
        return out.flatten(2, 3).to(hidden_states.dtype)

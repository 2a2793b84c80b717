"""A single block whose Q, K, V and MLP come out of one product, as in FLUX's own `linear1`.

diffusers' block keeps two matrices that read the same input, and an MLP reads it first, the
attention second. Here the block computes both at once and hands the attention its Q, K and V: the
place of `to_qkv` is taken by an identity, so that every processor goes on as it is.
"""

import torch
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock


def join(block: FluxSingleTransformerBlock) -> None:
    """Put one matrix in the place of a block's `attn.to_qkv` and `proj_mlp`; both are freed.

    The block's class stays: its forward has to be one that calls `to_qkv_mlp`.
    """
    qkv, joint = block.attn.to_qkv, block.proj_mlp
    joint.out_features += qkv.out_features
    for name in ("weight", "bias"):
        parts = [getattr(qkv, name).data, getattr(joint, name).data]
        setattr(joint, name, torch.nn.Parameter(torch.cat(parts), joint.weight.requires_grad))
    del block.proj_mlp
    block.to_qkv_mlp, block.attn.to_qkv = joint, torch.nn.Identity()


def split(block: FluxSingleTransformerBlock, joint: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Part the product. Shapes: (B, S, 3 C + M) -> Q, K and V (B, S, 3 C), MLP (B, S, M), views"""
    return joint.split([3 * block.attn.inner_dim, block.mlp_hidden_dim], dim=-1)


class JointFluxSingleTransformerBlock(FluxSingleTransformerBlock):
    """diffusers' single block after join()."""

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
        txt_tokens = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        normed, gate = self.norm(x, emb=temb)
        qkv, mlp = split(self, self.to_qkv_mlp(normed))
        out = self.attn(
            hidden_states=qkv, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {})
        )
        out = self.proj_out(torch.cat([out, self.act_mlp(mlp)], dim=2))
        x = x + gate[:, None] * out
        return x[:, :txt_tokens], x[:, txt_tokens:]

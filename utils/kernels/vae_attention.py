"""The attention of the VAE's middle block as two products with a softmax in between.

One head as wide as the block: 512 in FLUX.1, over 16384 tokens at 1024x1024. No flash kernel takes
more than 256, so torch falls back to its memory-efficient one, made of sm80 instructions with
tiles of 32 queries and an accumulator in memory. The same two products by cuBLAS run at the rate
of any other; what they cost is the score matrix, which is made for some queries at a time.

As inside of a flash kernel, scores and sums are fp32 (in bf16 a score of 50 would be off by 0.1),
the largest weight is exactly 1, and what they sum to divides the result, not the weights. Only a
product that writes fp32 from bf16 is no plain torch: AOTInductor has no entry for
`torch.bmm(out_dtype=)`, so it is an op of our own (utils/kernels/flash_attention.py's is another).

Twin: torch.nn.functional.scaled_dot_product_attention.
"""

import torch

ROWS = 4096  # queries at a time: 128 CTAs of 128x128 outputs, and less memory than the last block


@torch.library.custom_op("flux::product", mutates_args=(), device_types="cpu")
def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Multiply matrices without rounding the result to their dtype; this body is the CPU kernel.

    Shapes: a (B, M, K), b (B, K, N) of one dtype -> (B, M, N) fp32
    """
    return torch.bmm(a.float(), b.float())


@product.register_fake
def _fake(a, b):
    return a.new_empty((a.shape[0], a.shape[1], b.shape[2]), dtype=torch.float32)


@product.register_kernel("cuda")
def _cuda(a, b):
    if a.dtype == torch.float32:
        return torch.bmm(a, b)
    return torch.bmm(a, b, out_dtype=torch.float32)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend with one head of any width.

    Shapes: q (B, M, D), k, v (B, N, D) of one dtype -> (B, M, D)
    """
    scale, parts = q.shape[-1] ** -0.5, []
    for some in q.split(ROWS, dim=1):
        scores = product(some, k.mT) * scale  # [B, ROWS, N] fp32
        weights = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        out = product(weights.to(v.dtype), v) / weights.sum(dim=-1, keepdim=True)
        parts.append(out.to(v.dtype))
    return torch.cat(parts, dim=1)


class ExplicitAttnProcessor:
    """Replace the VAE's processor of diffusers' Attention, projections fused or separate."""

    def __call__(
        self,
        attn: torch.nn.Module,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend over all pixels, and add what came in.

        Shapes: hidden_states (B, C, H, W) -> the same
        Raises: ValueError for any other argument, of which the VAE has none.
        """
        if not (encoder_hidden_states is attention_mask is temb is None):
            raise ValueError("vae_attention: got more than the picture; leave out --vae_attention")
        x = attn.group_norm(hidden_states.flatten(2)).mT  # [B, S, C]
        if attn.fused_projections:
            q, k, v = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(x), attn.to_k(x), attn.to_v(x)
        out = attn.to_out[1](attn.to_out[0](attend(q, k, v)))
        out = out.mT.unflatten(2, hidden_states.shape[2:]) + hidden_states
        return out / attn.rescale_output_factor

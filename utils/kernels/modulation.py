"""FLUX's transformer without what is constant over the loop, and the call that computes that once.

An adaptive norm multiplies one row an image by a large matrix: over a quarter of FLUX.1's weights
(3.2 of 11.9 billion) for products that take as long as reading them takes. The row depends on
timestep, guidance and pooled text alone, so all steps' rows are known before the loop: one product
of N * B rows reads each matrix once a call instead of once a step. Rotary embeddings and the
embedded text do not depend on the step at all.

What a step needs is handed over as plain inputs, its own row of the table (a view by a host
integer) among them, instead of the whole table and a counter on the device: a graph or a package
then serves any number of steps, and what a CUDA graph copies in is one row, 2 MiB an image at full
size, not 28 of them.
"""

from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel


@dataclass(frozen=True)
class Constants:
    """What the loop of one call needs of timesteps, guidance and text.

    Shapes, for N steps, B images, T text and S image tokens, width d, heads of D and W outputs of
    all modulations together (344 d in FLUX.1: 56 MiB in bf16 for 28 steps of one image):
        modulation (N, B, W); context (B, T, d); rotary_cos, rotary_sin (T + S, D), fp32
    """

    modulation: torch.Tensor
    context: torch.Tensor
    rotary_cos: torch.Tensor
    rotary_sin: torch.Tensor

    def of_step(self, i: int) -> dict[str, torch.Tensor]:
        """Give the inputs of step i; a host integer makes a view, without asking the device."""
        return {
            "encoder_hidden_states": self.context,
            "modulation": self.modulation[i],
            "rotary_cos": self.rotary_cos,
            "rotary_sin": self.rotary_sin,
        }


class Part(torch.nn.Module):
    """Stand where an adaptive norm had its linear layer: pick the norm's part of a block's row."""

    def __init__(self, part: int, parts: int) -> None:
        super().__init__()
        self.part, self.parts = part, parts

    def forward(self, row: torch.Tensor) -> torch.Tensor:
        """Pick. Shapes: (B, parts * w) -> (B, w)"""
        return row.chunk(self.parts, dim=1)[self.part]


class HoistedFluxTransformer(FluxTransformer2DModel):
    """Denoise one step from constants that were computed before; made by hoist()."""

    def constants(
        self,
        timesteps: torch.Tensor,
        guidance: torch.Tensor | None,
        pooled: torch.Tensor,
        prompt_embeds: torch.Tensor,
        txt_ids: torch.Tensor,
        img_ids: torch.Tensor,
    ) -> Constants:
        """Compute what FluxTransformer2DModel computes in every step, for all steps at once.

        Rounds where the plain forward and FluxPipeline round: in bf16 a timestep of 752.3 is 752.
        With a float8 scale per tensor (--quant_granularity tensor --quant_filter all) the rows of
        all steps share one scale.

        Shapes: timesteps (N,) fp32, 1000 to 0; guidance (B,) fp32 or None; pooled (B, P);
            prompt_embeds (B, T, C); txt_ids (T, 3); img_ids (S, 3)
        """
        steps, images, dtype = len(timesteps), len(pooled), pooled.dtype
        t = (timesteps.to(dtype) / 1000 * 1000).repeat_interleave(images)  # [N * B]
        conditions = [t]
        if guidance is not None:
            conditions.append((guidance.to(dtype) * 1000).repeat(steps))
        vec = self.time_text_embed(*conditions, pooled.repeat(steps, 1))
        vec = torch.nn.functional.silu(vec)  # [N * B, d]
        rows = torch.cat([linear(vec) for linear in self.modulation], dim=1)
        return Constants(
            rows.unflatten(0, (steps, images)),
            self.context_embedder(prompt_embeds),
            *self.pos_embed(torch.cat([txt_ids, img_ids])),
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        rotary_cos: torch.Tensor,
        rotary_sin: torch.Tensor,
    ) -> tuple[torch.Tensor]:
        """Predict the velocity of one step.

        Shapes: hidden_states (B, S, C); the others from Constants.of_step -> ((B, S, C),)
        """
        img, txt = self.x_embedder(hidden_states), encoder_hidden_states
        *rows, last = modulation.split(self.modulation_widths, dim=1)
        blocks = (*self.transformer_blocks, *self.single_transformer_blocks)
        for block, row in zip(blocks, rows, strict=True):
            txt, img = block(
                hidden_states=img,
                encoder_hidden_states=txt,
                temb=row,
                image_rotary_emb=(rotary_cos, rotary_sin),
            )
        return (self.proj_out(self.norm_out(img, last)),)


def hoist(transformer: FluxTransformer2DModel) -> None:
    """Move the modulation's linear layers out of the blocks, in place; nothing is copied.

    The norms keep their own code, but are given finished vectors. The layers keep their order
    under new names (`modulation.0` ...), so a LoRA has to be fused before.
    """
    groups = [(block.norm1, block.norm1_context) for block in transformer.transformer_blocks]
    groups += [(block.norm,) for block in transformer.single_transformer_blocks]
    groups.append((transformer.norm_out,))
    linears, widths = [], []
    for norms in groups:
        widths.append(sum(norm.linear.out_features for norm in norms))
        for k, norm in enumerate(norms):
            linears.append(norm.linear)
            norm.silu, norm.linear = torch.nn.Identity(), Part(k, len(norms))
    transformer.modulation = torch.nn.ModuleList(linears)
    transformer.modulation_widths = tuple(widths)
    transformer.__class__ = HoistedFluxTransformer

"""T5 and CLIP, whole, with random weights: one prompt, eager, in a CUDA graph, and compiled.

Each one's truth is itself in fp32.
"""

import copy
from functools import cache, partial

import torch

from utils.kernel_bench.trial import Case, Setting, Trial, compilation, relative_l2
from utils.layers import Precision, total
from utils.random_weights import configs_of, filled
from utils.steps.text_encoders import as_eager, blocks
from utils.work import clip, t5

BOUND = 0.05
PARTS = {"t5": ("text_encoder_2", t5), "clip": ("text_encoder", clip)}
CLOCKS = {"eager": "events"}
VARIANTS = ("eager", "graph", "inductor-blocks")


@cache
def encoder(setting: Setting, name: str) -> torch.nn.Module:
    """Build an encoder once, in bf16."""
    part = PARTS[name][0]
    return filled(setting.checkpoint, torch.bfloat16, setting.device, 0, (part,))[part]


def draw(setting: Setting, name: str, tokens: int, seed: int) -> tuple[torch.Tensor]:
    """Draw a prompt's token ids."""
    count = configs_of(setting.checkpoint)[PARTS[name][0]]["vocab_size"]
    own = torch.Generator().manual_seed(seed)
    return (torch.randint(count, (1, tokens), generator=own).to(setting.device),)


def embed(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Give what FluxPipeline reads of an encoder: T5's tokens, CLIP's one vector."""
    found = as_eager(module, ids)
    return found.pooler_output if "pooler_output" in found else found[0]


@cache
def truth(setting: Setting, name: str, tokens: int) -> torch.Tensor:
    """Encode the first prompt in fp32."""
    module = copy.deepcopy(encoder(setting, name)).float()
    return embed(module, *draw(setting, name, tokens, 0))


def make(setting: Setting, name: str, tokens: int, variant: str) -> Trial:
    """Prepare one encoder at one length; compiled by its blocks, as step text_encoders does."""
    part, layers = PARTS[name]
    module = encoder(setting, name)
    if variant == "inductor-blocks":
        module = copy.deepcopy(module)
        for block in blocks(module):
            block.compile(**compilation(setting))
    config = configs_of(setting.checkpoint)[part]
    work = layers(config, 1, "bf16") if name == "clip" else layers(config, 1, tokens, Precision())
    return Trial(
        run=partial(embed, module),
        draw=partial(draw, setting, name, tokens),
        check=lambda out, inputs: {"error": relative_l2(out, truth(setting, name, tokens))},
        bound=BOUND,
        flop=total(work, "flop"),
        weights_bytes=2 * total(work, "parameters", "linear"),
        clock=CLOCKS.get(variant, "graph"),
    )


def cases(setting: Setting) -> list[Case]:
    """List both encoders at the lengths that FLUX.1 uses."""
    lengths = {"t5": (256, 512) if setting.is_full else (16,), "clip": (77,)}
    return [
        Case(
            f"text/{name}-{tokens}/{variant}",
            partial(make, setting, name, tokens, variant),
            compiles=variant == "inductor-blocks",
        )
        for name, all_lengths in lengths.items()
        for tokens in all_lengths
        for variant in VARIANTS
    ]

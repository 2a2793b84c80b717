"""The VAE decoder with random weights at 1024x1024: whole, its one attention, its GroupNorms.

Each one's truth is itself in fp32. Compiled, the whole decoder has the pipeline's options, so it
searches as long; attention and GroupNorms say in seconds what the parts are worth.
"""

import copy
from functools import cache, partial

import torch
import torch.nn.functional as F

from utils.kernel_bench import attention
from utils.kernel_bench.trial import Case, Setting, Trial, compiled, relative_l2
from utils.kernels.group_norm import ChannelGroupNorm
from utils.layers import total
from utils.random_weights import configs_of, filled
from utils.work import vae_decoder

WHOLE_BOUND, NORM_BOUND = 0.03, 4e-3
LATENT_CHANNELS, EPS = 16, 1e-6
ATTENTION = ("sdpa", "sdpa_math", "sdpa_efficient", "sdpa_cudnn", "sdpa_flash")
CLOCKS = {"eager": "events", "channels-last": "events"}  # others in a graph: without launches
WHOLE = ("eager", "channels-last", "graph", "inductor", "inductor-group-norm")
NORMS = ("eager", "inductor", "inductor-channels")


def edge(setting: Setting) -> int:
    """Give the height and width of the latents."""
    return 128 if setting.is_full else 16


@cache
def decoder(setting: Setting) -> torch.nn.Module:
    """Build the decoder once, in bf16."""
    parts = filled(setting.checkpoint, torch.bfloat16, setting.device, 0, ("vae",))
    return parts["vae"].decoder


def draw(setting: Setting, seed: int) -> tuple[torch.Tensor]:
    """Draw a picture's latents."""
    return (setting.randn(1, LATENT_CHANNELS, edge(setting), edge(setting), seed=seed),)


@cache
def truth(setting: Setting) -> torch.Tensor:
    """Decode the first set of latents in fp32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return copy.deepcopy(decoder(setting)).float()(draw(setting, 0)[0].float())


def make_whole(setting: Setting, variant: str) -> Trial:
    """Prepare the whole decoder; all but `eager` in channels-last."""
    module = copy.deepcopy(decoder(setting))
    if variant != "eager":
        module.to(memory_format=torch.channels_last)
    if variant == "inductor-group-norm":
        for part in module.modules():
            if type(part) is torch.nn.GroupNorm:
                part.__class__ = ChannelGroupNorm
    run = compiled(setting, module) if variant.startswith("inductor") else module
    size = (edge(setting), edge(setting))
    return Trial(
        run=run,
        draw=partial(draw, setting),
        check=lambda out, inputs: {"error": relative_l2(out, truth(setting))},
        bound=WHOLE_BOUND,
        flop=total(vae_decoder(configs_of(setting.checkpoint)["vae"], 1, size, "bf16"), "flop"),
        counts_bytes=False,
        clock=CLOCKS.get(variant, "graph"),
    )


def make_norm(setting: Setting, channels: int, size: int, variant: str) -> Trial:
    """Prepare GroupNorm and SiLU of a channels-last tensor."""
    kind = ChannelGroupNorm if variant == "inductor-channels" else torch.nn.GroupNorm
    groups = configs_of(setting.checkpoint)["vae"]["norm_num_groups"]
    norm = kind(groups, channels, eps=EPS, device=setting.device, dtype=torch.bfloat16)

    def call(x: torch.Tensor) -> torch.Tensor:
        return F.silu(norm(x))

    def inputs(seed: int) -> tuple[torch.Tensor]:
        x = setting.randn(1, channels, size, size, seed=seed)
        return (x.to(memory_format=torch.channels_last),)

    def check(out: torch.Tensor, inputs: tuple) -> dict:
        true = F.silu(F.group_norm(inputs[0].float(), groups, eps=EPS))  # weights are 1, biases 0
        return {"error": relative_l2(out, true)}

    run = call if variant == "eager" else compiled(setting, call)
    return Trial(run=run, draw=inputs, check=check, bound=NORM_BOUND)


def cases(setting: Setting) -> list[Case]:
    """List the decoder and its parts."""
    full = setting.is_full
    shape = (1, edge(setting) ** 2, 1, 512 if full else 40)
    norms = ((128, 1024), (256, 512), (512, 256)) if full else ((16, 32),)
    found = [
        Case(
            f"decoder/attention-{shape[1]}x{shape[3]}/{variant}",
            partial(attention.make, setting, shape, variant),
        )
        for variant in ATTENTION
    ]
    found += [
        Case(
            f"decoder/group-norm-{channels}x{size}x{size}/{variant}",
            partial(make_norm, setting, channels, size, variant),
            compiles=variant != "eager",
        )
        for channels, size in norms
        for variant in NORMS
    ]
    return found + [
        Case(
            f"decoder/whole/{variant}",
            partial(make_whole, setting, variant),
            compiles=variant.startswith("inductor"),
        )
        for variant in WHOLE
    ]

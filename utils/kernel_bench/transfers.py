"""What surrounds the kernels: a CUDA graph's inputs and outputs, a picture's way to the host."""

from functools import partial

import numpy as np
import torch

from utils.cudagraph import CUDAGraphWrapper
from utils.kernel_bench.trial import Case, Setting, Trial, Unavailable, relative_l2

ROUNDING_BOUND = 0.01  # half of one of 255 levels


def step_inputs(setting: Setting, seed: int) -> tuple[torch.Tensor, ...]:
    """Draw what Dev's transformer is called with in every step."""
    image, text, wide, pooled = (4096, 512, 4096, 768) if setting.is_full else (16, 8, 32, 16)
    tensors = [setting.randn(1, image, 64, seed=seed), setting.randn(1, text, wide, seed=seed + 1)]
    tensors += [setting.randn(1, pooled, seed=seed + 2), setting.randn(1, seed=seed + 3)]
    ids = [setting.randn(tokens, 3, seed=seed + 4) for tokens in (text, image)]
    return *tensors, *ids, setting.randn(1, seed=seed + 5)


def make_replay(setting: Setting, clock: str) -> Trial:
    """Prepare a graph that only negates the image tokens: copies in, replay, clone out."""
    if not setting.device.startswith("cuda"):
        raise Unavailable("CUDA graphs need a GPU")
    return Trial(
        run=CUDAGraphWrapper(lambda image, *others: -image, "negation"),
        draw=partial(step_inputs, setting),
        check=lambda out, inputs: {"error": relative_l2(out, -inputs[0])},
        bound=0.0,
        clock=clock,
    )


def pageable(picture: torch.Tensor) -> np.ndarray:
    """Do as diffusers' VaeImageProcessor: fp32 to the host, rounded there.

    Shapes: (1, 3, H, W) bf16, -1 to 1 -> (1, H, W, 3) uint8
    """
    pixels = (picture * 0.5 + 0.5).clamp(0, 1).cpu().permute(0, 2, 3, 1).float().numpy()
    return (pixels * 255).round().astype("uint8")


def pinned(picture: torch.Tensor, buffer: torch.Tensor) -> np.ndarray:
    """Round on the device, and copy a quarter of the bytes into pinned memory. Shapes: as above"""
    pixels = (picture.float() * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    buffer.copy_((pixels * 255).round().to(torch.uint8), non_blocking=True)
    if picture.is_cuda:
        torch.cuda.current_stream().synchronize()
    return buffer.numpy()


def make_picture(setting: Setting, variant: str) -> Trial:
    """Prepare the copy of one picture."""
    size = 1024 if setting.is_full else 32

    def draw(seed: int) -> tuple[torch.Tensor]:
        return (setting.randn(1, 3, size, size, seed=seed).tanh(),)

    def check(out: np.ndarray, inputs: tuple) -> dict:
        true = (inputs[0].double() + 1).permute(0, 2, 3, 1) * 127.5
        return {"error": relative_l2(torch.from_numpy(out).to(true.device), true)}

    run = pageable
    if variant == "pinned-uint8":
        on_gpu = setting.device.startswith("cuda")
        buffer = torch.empty((1, size, size, 3), dtype=torch.uint8, pin_memory=on_gpu)
        run = partial(pinned, buffer=buffer)
    return Trial(
        run=run, draw=draw, check=check, bound=ROUNDING_BOUND, counts_bytes=False, clock="host"
    )


def cases(setting: Setting) -> list[Case]:
    """List both kinds of transfer."""
    return [
        *(
            Case(f"transfer/graph-replay/{clock}", partial(make_replay, setting, clock))
            for clock in ("host", "events")
        ),
        *(
            Case(f"transfer/picture/{variant}", partial(make_picture, setting, variant))
            for variant in ("pageable-fp32", "pinned-uint8")
        ),
    ]

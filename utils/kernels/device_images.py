"""The last arithmetic of a picture on its device, so that bytes and not floats come to the host.

diffusers denormalises on the device, copies floats, and rounds them to bytes in NumPy: 6 MB in bf16
across the bus and three passes on the host for a picture of 3 MB. The same operations give the same
bytes anywhere: product with 255 in fp32, rounded half to even. diffusers' own code stays as the
twin, and makes every output but PIL's.
"""

import warnings

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image


def to_bytes(pixels: torch.Tensor) -> torch.Tensor:
    """Round pixels to bytes on their device and bring them over in one copy and one wait.

    NaN becomes 0, and is warned of in NumPy's words, as where NumPy casts.

    Shapes: (B, C, H, W), 0 to 1 -> (B, H, W, C) uint8, on the host
    """
    values = pixels.to(torch.float32, copy=True).mul_(255).round_()
    pictures = values.permute(0, 2, 3, 1)
    found = torch.empty(values.numel() + 1, dtype=torch.uint8, device=values.device)
    found[:-1].view(pictures.shape).copy_(pictures)
    found[-1] = values.sum().isnan()  # travels with the picture: asking for it would wait once more
    if found.is_cuda:
        device, found = found, torch.empty_like(found, device="cpu", pin_memory=True)
        found.copy_(device, non_blocking=True)
        torch.cuda.current_stream(device.device).synchronize()
    if found[-1]:
        warnings.warn("invalid value encountered in cast (NaN)", RuntimeWarning, stacklevel=2)
    return found[:-1].view(pictures.shape)


class DeviceImages(VaeImageProcessor):
    """Make PIL images by to_bytes(); everything else as diffusers does."""

    def postprocess(self, image, output_type="pil", do_denormalize=None):
        """Turn the decoder's pixels into what `output_type` names.

        Pixels that are not denormalised may be outside of 0 to 1, where NumPy's cast wraps around:
        they take diffusers' way.

        Shapes: (B, 3, H, W), -1 to 1
        """
        every = [self.config.do_normalize] if do_denormalize is None else do_denormalize
        if output_type != "pil" or not isinstance(image, torch.Tensor) or not all(every):
            return super().postprocess(image, output_type, do_denormalize)
        pixels = self._denormalize_conditionally(image, do_denormalize)
        return self.numpy_to_pil(to_bytes(pixels).numpy())

    @staticmethod
    def numpy_to_pil(images: np.ndarray) -> list[Image.Image]:
        """Turn bytes, or floats from 0 to 1, into pictures. Shapes: (B, H, W, C)"""
        if images.dtype != np.uint8:
            return VaeImageProcessor.numpy_to_pil(images)
        return [Image.fromarray(image.squeeze()) for image in images]  # one channel: mode L

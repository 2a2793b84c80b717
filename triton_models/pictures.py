"""Pixels of the decoder as a client gets them: PNG bytes, base64 text, or the array itself."""

import base64
import io

import numpy as np
import torch


def encoded(processor, pixels: torch.Tensor, form: str) -> dict:
    """Turn decoded pixels into response tensors, through FluxPipeline's own postprocessing.

    Shapes: pixels (B, 3, H, W), -1 to 1 -> `images` B byte strings, or `pixels` (B, H, W, 3) uint8
    """
    pictures = processor.postprocess(pixels, output_type="pil")
    if form == "raw":
        return {"pixels": torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))}
    files = []
    for picture in pictures:
        stream = io.BytesIO()
        picture.save(stream, format="PNG")
        files.append(stream.getvalue())
    if form == "base64":  # JSON carries text only
        files = [base64.b64encode(file) for file in files]
    return {"images": np.array(files, dtype=np.object_)}

"""Control images from pictures: edges, lines, depth, as the ControlNets of that kind expect them.

Edges and lines are OpenCV's and need no weights. Depth is a transformers model, named by
--depth_model: a folder, or a hub id. A pose's skeleton is drawn elsewhere (controlnet_aux has the
usual detector) and given as it is, as is any other control image: --preprocess none.
"""

from pathlib import Path

from utils.checkpoints import hub_file
from utils.errors import UserError
from utils.steps import import_problem

CANNY_THRESHOLDS = (100, 200)  # of the gradient, levels of 0..255
DEPTH_MODEL = "depth-anything/Depth-Anything-V2-Small-hf"
LINE_WIDTH_PX, LINE_GAIN = 1.0, 12.0
KINDS = ("none", "canny", "lineart", "depth")


def check(kinds: set[str], depth_model: str) -> None:
    """Refuse kinds whose package or weights are not here.

    Raises: UserError naming what is needed.
    """
    if kinds & {"canny", "lineart"} and (problem := import_problem("cv2")):
        raise UserError(
            f"--preprocess: found {problem}, expected OpenCV: pip install -r "
            "extras/requirements.txt, or --preprocess none with a ready control image"
        )
    if "depth" in kinds and not Path(depth_model).is_dir():
        hub_file(depth_model, "config.json", "--depth_model", "name a folder that holds one")


def canny(image, low: int = CANNY_THRESHOLDS[0], high: int = CANNY_THRESHOLDS[1]):
    """Draw the picture's edges, white on black.

    The gradient is the largest of the three channels, so colours of equal lightness have edges too.

    Source: Canny 1986, doi:10.1109/TPAMI.1986.4767851
    """
    import cv2
    import numpy as np
    from PIL import Image

    edges = cv2.Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")


def lineart(image):
    """Draw the picture's lines, white on black, soft where they are faint.

    A difference of two Gaussians in each channel, of which the largest counts.

    Source: Winnemoeller et al. 2012, doi:10.1016/j.cag.2012.03.004
    """
    import cv2
    import numpy as np
    from PIL import Image

    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    fine, coarse = (cv2.GaussianBlur(pixels, (0, 0), LINE_WIDTH_PX * k) for k in (1.0, 1.6))
    lines = np.tanh(LINE_GAIN * np.abs(fine - coarse).max(axis=-1))
    return Image.fromarray((255 * lines).astype(np.uint8)).convert("RGB")


def depth(image, model: str, device: str):
    """Estimate depth, near white and far black.

    Raises: UserError if the model cannot be loaded.
    """
    from transformers import pipeline

    try:
        estimate = pipeline("depth-estimation", model=model, device=device)
    except (OSError, ValueError) as error:
        what = " ".join(str(error).split())[:200]
        raise UserError(f"--depth_model {model}: cannot be loaded: {what}") from None
    return estimate(image)["depth"].resize(image.size).convert("RGB")


def preprocess(kind: str, image, depth_model: str, device: str):
    """Make the control image of one kind.

    Returns: a PIL image (RGB) of the picture's size
    """
    if kind == "none":
        return image
    if kind == "depth":
        return depth(image, depth_model, device)
    return {"canny": canny, "lineart": lineart}[kind](image)

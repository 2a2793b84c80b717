"""Control images from pictures: OpenCV's edges."""

import numpy as np
from PIL import Image

CANNY_THRESHOLDS = (100, 200)  # of the gradient, levels of 0..255


def canny(image: Image.Image, low: int = CANNY_THRESHOLDS[0], high: int = CANNY_THRESHOLDS[1]):
    """Draw the picture's edges, white on black.

    The gradient is the largest of the three channels, so colours of equal lightness have edges too.

    Source: Canny 1986, doi:10.1109/TPAMI.1986.4767851
    """
    import cv2

    edges = cv2.Canny(np.asarray(image.convert("RGB")), low, high)
    return Image.fromarray(edges).convert("RGB")

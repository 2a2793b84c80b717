"""Pictures in three formats, with the same words about how they were made in each.

PNG keeps each entry as a text chunk, as gen_image.py writes them. JPEG and WebP keep all of them as
one JSON object in EXIF's UserComment, the prompt also as its ImageDescription.
"""

import json
from pathlib import Path

from utils.artifacts import replacing
from utils.errors import UserError
from utils.prepare import BROKEN, to_rgb

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
MOST_PIXELS = {"JPEG": 65_535, "WEBP": 16_383}  # along an edge, by the formats themselves
IMAGE_DESCRIPTION, EXIF_IFD, USER_COMMENT = 0x010E, 0x8769, 0x9286
UNICODE = b"UNICODE\0"  # EXIF 2.32: the comment's first 8 bytes name its encoding


def format_of(path: str | Path, flag: str) -> str:
    """Name the format by the file's ending.

    Raises: UserError for an ending that is none of the three.
    """
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise UserError(f"{flag} {path}: found {ending!r}, expected one of {', '.join(FORMATS)}")
    return FORMATS[ending]


def open_picture(path: str | Path) -> tuple:
    """Open a picture: RGB, upright, and what it says of itself.

    Raises: UserError if it is none, or cut off.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            about = _about(opened)
            return to_rgb(ImageOps.exif_transpose(opened)), about
    except UnidentifiedImageError:
        raise UserError(f"IMAGE {path}: not an image") from None
    except (*BROKEN, Image.DecompressionBombError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(f"IMAGE {path}: cannot be read ({why})") from None


def _about(opened) -> dict[str, str]:
    """Read what a picture says of how it was made; empty if it says nothing of ours."""
    if opened.format == "PNG":
        opened.load()  # text chunks may stand behind the pixels
        return {key: str(value) for key, value in opened.text.items()}
    comment = opened.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT, b"")
    if not isinstance(comment, bytes) or not comment.startswith(UNICODE):
        return {}
    try:
        found = json.loads(comment.removeprefix(UNICODE).decode("utf-16-be"))
    except ValueError:  # someone else's comment
        return {}
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}


def save_picture(image, path: Path, about: dict[str, str], quality: int) -> None:
    """Write a picture with its words, whole or not at all.

    Units: quality from 1 to 100; PNG has none, for WebP 100 is lossless.
    """
    kind = FORMATS[path.suffix.lower()]
    with replacing(path) as new:
        image.save(new, format=kind, **_options(kind, about, quality))


def _options(kind: str, about: dict[str, str], quality: int) -> dict:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    if kind == "PNG":
        info = PngInfo()
        for key, value in about.items():
            info.add_itxt(key, value)
        return {"pnginfo": info}
    exif = Image.Exif()
    if prompt := about.get("prompt", "").encode("ascii", "replace").decode():
        exif[IMAGE_DESCRIPTION] = prompt
    text = json.dumps(about, ensure_ascii=False).encode("utf-16-be")
    exif.get_ifd(EXIF_IFD)[USER_COMMENT] = UNICODE + text
    if kind == "WEBP":
        return {"exif": exif, "quality": quality, "lossless": quality == 100}
    return {"exif": exif, "quality": quality, "subsampling": 0 if quality >= 90 else 2}

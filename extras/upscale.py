"""Upscale a picture with a Real-ESRGAN file (or another that spandrel knows), tile by tile.

python -m extras.upscale RealESRGAN_x4plus.pth output.png --output-file large.webp

The words in the picture (prompt, seed, checkpoint, settings) go along, with a line about the model.
GFPGAN files restore one face: spandrel runs the network but finds no faces, so the picture has to
be the aligned face itself, 512x512; another size is refused.
"""

import contextlib
import hashlib
import json
import sys
import types
from pathlib import Path

from extras.pictures import MOST_PIXELS, format_of, open_picture, save_picture
from extras.tiles import ALIGN, count, receptive_radius, run_tiled
from utils.benchmark_utils import Parser
from utils.checks import file_problem
from utils.errors import UserError, run_script

ENDINGS = (".pth", ".ckpt", ".safetensors")
USUAL_OVERLAP = 32  # where the receptive field is larger, or unknown
FACE = 512  # pixels: the edge of GFPGAN's network
INSTALL = "pip install --no-deps -r extras/requirements-upscale.txt"


@contextlib.contextmanager
def _torchvision_or_none():
    """Let spandrel be imported without torchvision, which LaMa and RestoreFormer alone call.

    Its published wheel raises RuntimeError beside another build of torch.
    """
    try:
        import torchvision.transforms.functional  # noqa: F401

        yield
        return
    except (ImportError, RuntimeError):
        pass

    def absent(*args, **kwargs):
        raise UserError("MODEL: this architecture needs torchvision (pip install torchvision)")

    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
    for function in ("normalize", "rotate", "InterpolationMode"):
        setattr(sys.modules[names[-1]], function, absent)
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]  # transformers asks whether there is a torchvision


def load_model(path: Path, device: str):
    """Load a model file; pickles that hold more than tensors are refused, not run.

    Returns: spandrel.ImageModelDescriptor, in evaluation mode
    Raises: UserError for a file that is no model, or none for pictures.
    """
    import pickle

    from safetensors import SafetensorError

    try:
        with _torchvision_or_none():
            from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
    except ModuleNotFoundError as error:
        raise UserError(f"MODEL {path}: found no module {error.name}: {INSTALL}") from None
    try:
        found = ModelLoader(device).load_from_file(path)
    except pickle.UnpicklingError as error:
        raise UserError(f"MODEL {path}: refused, no plain weights: {error}") from None
    except UnsupportedModelError:
        raise UserError(f"MODEL {path}: found weights of no architecture that is known") from None
    except (OSError, EOFError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
        why = " ".join(str(error).split())[:150]
        raise UserError(f"MODEL {path}: cannot be loaded ({why})") from None
    if not isinstance(found, ImageModelDescriptor) or found.input_channels != 3:
        raise UserError(
            f"MODEL {path}: {found.architecture.name} with {found.input_channels} channels, "
            "expected a model from RGB to RGB"
        )
    return found.eval()


def overlap_of(model, asked: int | None) -> tuple[int, int | None]:
    """Settle the overlap: asked for, or the receptive field's radius up to the usual one.

    Returns: overlap, and the radius from which on tiles change nothing (None: not known).
    Units: pixels of the input.
    """
    radius = receptive_radius(model.model)
    reach = USUAL_OVERLAP if radius is None else min(radius, USUAL_OVERLAP)
    overlap = reach if asked is None else asked
    return -(-overlap // ALIGN) * ALIGN, radius


def upscale(model, image, tile: int, overlap: int):
    """Run a picture through a model in tiles; the whole at once with tile 0.

    Returns: a PIL image, scaled by model.scale.
    """
    import numpy as np
    import torch
    from PIL import Image
    from tqdm import tqdm

    pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
    picture = pixels.permute(2, 0, 1)[None].to(model.device, model.dtype)
    tile = tile or -(-max(image.size) // ALIGN) * ALIGN
    total = count(image.height, image.width, tile)
    with tqdm(total=total, desc="tiles", disable=None, leave=False) as bar:
        result = run_tiled(model, picture, model.scale, tile, overlap, bar.update)
    pixels = (result[0].permute(1, 2, 0).float() * 255).round().byte()
    return Image.fromarray(pixels.cpu().numpy())


def parse_arguments():
    """Parse; all that needs no model is checked here."""
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "model", metavar="MODEL", help="Real-ESRGAN, GFPGAN, ...: .pth, .safetensors"
    )
    parser.add_argument("image", metavar="IMAGE", help="the picture")
    parser.add_argument("--output-file", default="upscaled.png", help=".png, .jpg or .webp")
    parser.add_argument("--quality", type=int, default=95, help="of JPEG and WebP (100: lossless)")
    parser.add_argument("--tile", type=int, default=256, help="pixels of the input; 0: no tiles")
    parser.add_argument(
        "--overlap",
        type=int,
        help=f"pixels around a tile (the model's reach, {USUAL_OVERLAP} at most)",
    )
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    args = parser.parse_args()
    problems = []
    if Path(args.model).suffix.lower() not in ENDINGS or not Path(args.model).is_file():
        problems.append(f"MODEL {args.model}: expected a file, one of {', '.join(ENDINGS)}")
    if args.tile < 0 or args.tile % ALIGN:
        problems.append(f"--tile {args.tile}: expected 0, or a number divisible by {ALIGN}")
    if (args.overlap or 0) < 0:
        problems.append(f"--overlap {args.overlap}: expected 0 or more")
    if not 1 <= args.quality <= 100:
        problems.append(f"--quality {args.quality}: expected 1 to 100")
    if problem := file_problem(Path(args.output_file)):
        problems.append(f"--output-file {args.output_file}: {problem}")
    if problems:
        raise UserError("\n".join(problems))
    args.format = format_of(args.output_file, "--output-file")
    return args


def check_fit(model, args, image) -> None:
    """Refuse a picture that this model is not made for, or a result that its format cannot hold.

    Raises: UserError
    """
    if model.purpose == "FaceSR" and image.size != (FACE, FACE):
        raise UserError(
            f"IMAGE {args.image}: found {image.width}x{image.height}, expected one aligned face of "
            f"{FACE}x{FACE}: {model.architecture.name} restores a face, and nothing here finds them"
        )
    most, edge = MOST_PIXELS.get(args.format), max(image.size) * model.scale
    if most and edge > most:
        raise UserError(
            f"--output-file {args.output_file}: {edge} pixels, {args.format} holds {most}; use .png"
        )


def main() -> None:
    """Parse, load, upscale, write."""
    args = parse_arguments()
    image, about = open_picture(args.image)

    from utils.hardware import detect

    device = args.device or detect().device
    detect(device)
    path = Path(args.model)
    model = load_model(path, device)
    check_fit(model, args, image)
    overlap, radius = overlap_of(model, args.overlap)
    tile = 0 if model.purpose == "FaceSR" or max(image.size) <= args.tile else args.tile
    name, scale = model.architecture.name, model.scale
    large = upscale(model, image, tile, overlap)
    said = {"model": path.name, "architecture": name, "scale": scale, "tile": tile}
    with path.open("rb") as stream:
        said["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
    about["upscaled"] = json.dumps(said | ({"overlap": overlap} if tile else {}))
    save_picture(large, Path(args.output_file), about, args.quality)
    print(f"model       {name} {scale}x, {device}")
    if tile:
        exact = "not known" if radius is None else f"{radius} px"
        print(f"tiles       {tile} px, overlap {overlap} px (no seam at all from: {exact})")
    print(f"wrote {args.output_file}: {image.width}x{image.height} to {large.width}x{large.height}")


if __name__ == "__main__":
    run_script(main)

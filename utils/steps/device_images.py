"""Pictures rounded to bytes on the device: one copy, half as large, and one wait for it.

After the decoder, so compiler and packages know nothing of it; applied before they warm up, so that
its small kernels are loaded and its pinned buffer is there. The bytes are diffusers' own for every
pixel value, NaN included (tests/test_device_images.py). A CPU has no copy to save, and rounds no
faster so.
"""

from utils.steps import Verdict, off, on, unavailable

NAME = "device_images"
AFTER = ()
PARTS = ("pictures",)


def add_flags(parser) -> None:
    """Add the flag that turns the step off."""
    parser.add_argument(
        "--disable_device_images",
        action="store_true",
        help="copy floats to the host and round them there, as diffusers does",
    )


def check(args) -> Verdict:
    """Say what the step will do in this run."""
    if args.disable_device_images:
        return off("--disable_device_images")
    if args.machine.device == "cpu":
        return unavailable("the pixels are on the host already")
    return on()


def apply(pipeline, args) -> None:
    """Exchange the class of the pipeline's image processor; its settings stay."""
    from utils.kernels.device_images import DeviceImages

    pipeline.image_processor.__class__ = DeviceImages

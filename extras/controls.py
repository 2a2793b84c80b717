"""What --controlnet and its companions say, checked against the checkpoint before any weight.

diffusers adds the residuals of several ControlNets one by one and leaves out, without a word, those
of a deeper net that a shallower one has no partner for: nets of different depth are refused here.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from extras import derived, preprocess
from utils import checkpoints
from utils.errors import UserError
from utils.prepare import read_picture

EDGES = "tiny-edges"  # the bundled ControlNet: canny edges, for tiny-schnell
DEFAULTS = {  # of both models; what a ControlNet shares with its transformer
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
}
DEPTHS = {"num_layers": 19, "num_single_layers": 38, "conditioning_embedding_channels": None}


@dataclass(frozen=True)
class Control:
    """One condition: a net, what it looks at, and how much it says."""

    net: str  # bundled name, folder or hub id
    picture: str
    kind: str  # of preprocessing
    scale: float
    mode: int | None  # of a union net


def add_flags(parser) -> None:
    """Add the flags of this command; all but the last three are repeatable, in step."""
    add = parser.add_argument_group(
        "ControlNets, each flag once for all or once for each"
    ).add_argument
    add("--controlnet", action="append", help=f"{EDGES}, a folder or a hub id")
    add("--control_image", action="append", help="the picture that says where things are")
    add(
        "--preprocess",
        action="append",
        choices=preprocess.KINDS,
        help="make the control image of that picture (default: none, it is one)",
    )
    add("--controlnet_scale", action="append", type=float, help="how much it says (default: 1)")
    add("--control_mode", action="append", type=int, help="union nets only: number of the kind")
    add("--control_guidance_start", type=float, default=0.0, help="share of the steps before it")
    add("--control_guidance_end", type=float, default=1.0, help="share of the steps after which")
    add("--depth_model", default=preprocess.DEPTH_MODEL, help="folder or hub id")


def read_controls(args) -> list[Control]:
    """Read the flags.

    Raises: UserError with one line per problem.
    """
    problems = [
        f"--{flag}: none was given, expected one or more"
        for flag in ("controlnet", "control_image")
        if not getattr(args, flag)
    ]
    if problems:
        raise UserError("\n".join(problems))
    columns = {
        "controlnet": args.controlnet,
        "control_image": args.control_image,
        "preprocess": args.preprocess or ["none"],
        "controlnet_scale": args.controlnet_scale or [1.0],
        "control_mode": args.control_mode or [None],
    }
    most = max(map(len, columns.values()))
    for flag, values in columns.items():
        if len(values) not in (1, most):
            problems.append(f"--{flag}: found {len(values)} times, expected once or {most} times")
        columns[flag] = values * most if len(values) == 1 else values
    for scale in columns["controlnet_scale"]:
        if not 0 <= scale < math.inf:
            problems.append(f"--controlnet_scale {scale:g}: expected 0 or more")
    start, end = args.control_guidance_start, args.control_guidance_end
    if not 0 <= start < end <= 1:
        problems.append(
            f"--control_guidance_start {start:g}, --control_guidance_end {end:g}: expected shares "
            "of the steps, 0 to 1, the first below the second"
        )
    if problems:
        raise UserError("\n".join(problems))
    return [Control(*row) for row in zip(*columns.values(), strict=True)]


def config_of(net: str) -> dict:
    """Read a ControlNet's config.

    Raises: UserError if there is none, or it is another kind of model.
    """
    if net == EDGES:
        folder = checkpoints.BUNDLED_DIR / "tiny-schnell" / "transformer"
        return json.loads((folder / "config.json").read_text()) | {"num_single_layers": 0}
    if Path(net).is_dir():
        path = Path(net) / "config.json"
    elif net.count("/") == 1 and not net.startswith(("/", ".")):
        path = checkpoints.hub_file(
            net, "config.json", "--controlnet", f"bundled: {EDGES}; or name a folder"
        )
    else:
        raise UserError(
            f"--controlnet {net}: unknown (expected {EDGES}, a folder or a hub id such as "
            "InstantX/FLUX.1-dev-Controlnet-Canny)"
        )
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--controlnet {net}: config.json cannot be read ({error})") from None
    if not isinstance(config, dict):
        kind = type(config).__name__
        raise UserError(f"--controlnet {net}: config.json: found {kind}, expected keys and values")
    if config.get("_class_name") != "FluxControlNetModel":
        found = config.get("_class_name", "no _class_name")
        raise UserError(f"--controlnet {net}: found {found}, expected FluxControlNetModel")
    modes = config.get("num_mode")
    if modes is not None and not isinstance(modes, int):
        raise UserError(f"--controlnet {net}: num_mode found {modes!r}, expected a whole number")
    weights = {".safetensors", ".bin"}
    if Path(net).is_dir() and not weights & {file.suffix for file in Path(net).iterdir()}:
        raise UserError(f"--controlnet {net}: found no weights (*.safetensors) in this folder")
    return config


def check_nets(controls: list[Control], transformer: dict, ckpt: str) -> None:
    """Compare every net's config with the transformer's, with its mode and with one another.

    Raises: UserError with one line per problem.
    """
    configs = {control.net: config_of(control.net) for control in controls}
    problems = []
    for net, config in configs.items():
        for key, default in DEFAULTS.items():
            found, expected = config.get(key, default), transformer.get(key, default)
            if found != expected:
                problems.append(
                    f"--controlnet {net}: made for another transformer: {key} found {found}, "
                    f"expected {expected} of {ckpt}"
                )
    for control in controls:
        modes = configs[control.net].get("num_mode")
        if modes is None and control.mode is not None:
            problems.append(
                f"--control_mode {control.mode}: {control.net} is no union net; leave it out"
            )
        elif modes is not None and (control.mode is None or not 0 <= control.mode < modes):
            found = "none" if control.mode is None else control.mode
            problems.append(
                f"--control_mode: found {found}, expected 0 to {modes - 1} of {control.net}"
            )
    depths = {tuple(c.get(key, d) for key, d in DEPTHS.items()) for c in configs.values()}
    if len(depths) > 1:
        found = " and ".join(", ".join(f"{v}" for v in depth) for depth in sorted(depths, key=str))
        problems.append(
            f"--controlnet: found nets of {' / '.join(DEPTHS)} {found}, expected them alike: "
            "diffusers would leave out the deeper one's last residuals"
        )
    if problems:
        raise UserError("\n".join(problems))


def pictures(controls: list[Control]) -> list:
    """Read every control's picture, each file once.

    Raises: UserError for one that cannot be read.
    """
    read = {c.picture: read_picture("--control_image", c.picture) for c in controls}
    return [read[control.picture] for control in controls]


def control_images(controls: list[Control], read: list, args) -> list:
    """Make the control images of the run's size, preprocessed at that size."""
    return [
        preprocess.preprocess(c.kind, derived.to_size(picture, args), args.depth_model, args.device)
        for c, picture in zip(controls, read, strict=True)
    ]

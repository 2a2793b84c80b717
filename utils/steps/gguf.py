"""The transformer from a GGUF file: smaller weights, kept as they are or made bf16 once.

First of all, since every later step reads the final weights. diffusers' own loader reads Q8_0,
Q6_K, Q5, Q4, Q3 and Q2 (without ggml's integer products: a weight becomes bf16 before its product).

`compressed` keeps the file's bytes in memory and decodes them in every forward: a fifth (Q3_K) to a
half (Q8_0) of bf16's memory, and slower, since decoding is work. QKV fusion of the transformer and
float8 are off with it, because its weights are bytes, not matrices. `dequantize` decodes once while
loading: bf16's memory and speed, every later step included, with the file's precision.

How many steps a type deserves is the user's choice (docs/memory.md); nothing changes it here.
"""

import json
import tempfile
from pathlib import Path

from utils import gguf_file
from utils.checkpoints import hub_file
from utils.errors import UserError
from utils.random_weights import configs_of
from utils.steps import Verdict, import_problem, not_given, on, refused

NAME = "gguf"
AFTER = ()
PARTS = ("pipeline",)


def add_flags(parser) -> None:
    """Add the file and what becomes of its weights."""
    parser.add_argument(
        "--gguf_file",
        metavar="FILE_OR_ID",
        help="the transformer's weights: a .gguf file, or repo/name.gguf on the hub",
    )
    parser.add_argument(
        "--gguf_mode",
        choices=("compressed", "dequantize"),
        help="keep the file's bytes and decode them in every step (small memory), or decode once "
        "and let float8 take over (speed) (default: compressed)",
    )


def is_compressed(args) -> bool:
    """Whether the transformer's matrices stay bytes of a GGUF file."""
    return bool(args.gguf_file) and args.gguf_mode != "dequantize"


def local_file(name: str) -> Path:
    """Find the file, or fetch it from the hub.

    Raises: UserError if the hub does not have it or cannot be reached.
    """
    path = Path(name).expanduser()
    if path.exists() or name.count("/") != 2 or name.startswith(("/", ".", "~")):
        return path
    repo, _, file = name.rpartition("/")
    return hub_file(repo, file, flag="--gguf_file", instead="or name a local file")


def check(args) -> Verdict:
    """Look at the file's header: is it this checkpoint's transformer, of types that can be read?"""
    if not args.gguf_file:
        if args.gguf_mode:
            return refused(f"--gguf_mode {args.gguf_mode}: expected together with --gguf_file")
        return not_given("--gguf_file")
    if problem := import_problem("gguf"):
        return refused(
            f"--gguf_file: found {problem}; expected gguf 0.10 or newer: pip install gguf==0.19.0"
        )
    try:
        path = local_file(args.gguf_file)
        contents = gguf_file.read_header(path)
    except UserError as error:
        return refused(str(error))
    if problem := gguf_file.problem(contents, configs_of(args.checkpoint)["transformer"]):
        return refused(f"--gguf_file {args.gguf_file}: {problem}; --ckpt {args.ckpt}")
    if args.fused_kernels and is_compressed(args):
        return refused(
            "--fused_kernels: calls matrices, found --gguf_mode compressed; use --gguf_mode "
            "dequantize or leave out --fused_kernels"
        )
    types = " ".join(f"{kind}:{count}" for kind, count in contents.types.items())
    return on(
        lossless=contents.is_exact,
        mode=args.gguf_mode or "compressed",
        file=path.name,
        types=types,
        gib=round(contents.bytes / 2**30, 3),
    )


def identity(args) -> str:
    """Name the file's contents by a digest, for what is stored of a run; it is read once."""
    from utils.artifacts import file_digest, open_cache

    return "sha256:" + file_digest(local_file(args.gguf_file), open_cache(args.cache_dir))


def load_transformer(args):
    """Read the file through diffusers' loader, on the CPU.

    Returns: FluxTransformer2DModel with GGUFLinear layers, or in mode dequantize plain ones
    """
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig
    from diffusers.quantizers.gguf.utils import _dequantize_gguf_and_restore_linear

    with tempfile.TemporaryDirectory() as folder:  # without a config diffusers asks the hub
        config = configs_of(args.checkpoint)["transformer"]
        Path(folder, "config.json").write_text(json.dumps(config))
        transformer = FluxTransformer2DModel.from_single_file(
            str(local_file(args.gguf_file)),
            config=folder,
            quantization_config=GGUFQuantizationConfig(compute_dtype=args.dtype),
            dtype=args.dtype,
        )
    if not is_compressed(args):
        # Not transformer.dequantize(): it would go through the GPU, whether it fits there or not
        _dequantize_gguf_and_restore_linear(transformer)
        del transformer.hf_quantizer
    return transformer.requires_grad_(False)


def apply(pipeline, args) -> None:
    """Put the file's transformer in the place of the checkpoint's, which was not loaded."""
    pipeline.register_modules(transformer=load_transformer(args).to(args.load_device))

"""Write a checkpoint's transformer as GGUF: python -m extras.write_gguf --type Q8_0 --output-file F

For trying `--gguf_file` without a download, and for tests. Matrices become the wanted type, vectors
stay F32, and a matrix whose rows the type does not divide becomes F16, as other converters do it.
Names are diffusers' own. The gguf package writes these types; K-quants it can only read.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from utils.artifacts import replacing
from utils.benchmark_utils import Parser
from utils.checks import file_problem
from utils.errors import UserError, run_script

TYPES = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "BF16", "F16")
DEFAULT_CKPT = "tiny-schnell"


def quantize(tensor, kind: str):
    """Encode a matrix.

    Shapes: (rows, columns) fp32 -> (rows, bytes of a row) uint8, or fp16 for F16
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(tensor, GGMLQuantizationType[kind])


def write(folder: Path, path: Path, kind: str, encode=quantize) -> dict[str, int]:
    """Write the transformer in `folder` (diffusers' layout); the file is there whole or not at all.

    Returns: how many tensors are of each type
    Raises: UserError if there are no weights, or damaged ones.
    """
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    weights_files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if not weights_files:
        raise UserError(f"--ckpt: found no *.safetensors in {folder}")
    block = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0]
    counts = Counter()
    with replacing(path) as new:
        writer = GGUFWriter(new, "flux")
        for name, tensor in _tensors(weights_files):
            used = "F32" if tensor.ndim < 2 else "F16" if tensor.shape[1] % block else kind
            counts[used] += 1
            if used == "F32":
                writer.add_tensor(name, tensor)
            elif used == "F16":
                writer.add_tensor(name, tensor.astype(np.float16))
            else:
                raw = GGMLQuantizationType[used]
                writer.add_tensor(name, encode(tensor, used), raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return dict(counts)


def _tensors(files: list[Path]) -> Iterator[tuple]:
    """Read every weight by name, as fp32."""
    from safetensors import SafetensorError, safe_open

    for file in files:
        try:
            with safe_open(file, "pt") as weights:
                for name in weights.keys():  # noqa: SIM118  not a dict
                    yield name, weights.get_tensor(name).float().numpy()
        except SafetensorError as error:
            why = " ".join(str(error).split())
            raise UserError(f"--ckpt: {file} cannot be read ({why})") from None


def transformer_folder(ckpt: str) -> Path:
    """Find the weights of a bundled checkpoint or a folder.

    Raises: UserError if it is neither.
    """
    from utils import checkpoints

    found = checkpoints.resolve(ckpt)
    if found.path is None:
        raise UserError(f"--ckpt {ckpt}: on the hub, expected a bundled name or a folder")
    return found.path / "transformer"


def main() -> None:
    """Parse, write, and say what became of it."""
    parser = Parser(description="Write a checkpoint's transformer as a GGUF file.")
    parser.add_argument("--ckpt", default=DEFAULT_CKPT, help="bundled name or folder")
    parser.add_argument("--type", choices=TYPES, default="Q8_0", help="of the matrices")
    parser.add_argument("--output-file", required=True, help="name ending in .gguf")
    args = parser.parse_args()
    path = Path(args.output_file)
    problem = "" if path.suffix == ".gguf" else "expected a name ending in .gguf"
    if problem := problem or file_problem(path):
        raise UserError(f"--output-file {path}: {problem}")
    counts = write(transformer_folder(args.ckpt), path, args.type)
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"wrote {path}: {path.stat().st_size / 2**20:.1f} MiB ({kinds})")


if __name__ == "__main__":
    run_script(main)

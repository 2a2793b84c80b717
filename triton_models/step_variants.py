"""Should embeddings travel? Three ways of a denoising loop: python -m triton_models.step_variants

Starts a server of its own and loads two more models (measured/): one runs the loop over the served
transformer with all tensors in every call, with the embeddings kept there, or as one call; the
other is the transformer that keeps them. Calls take turns; what is counted is the time beside the
transformer's forwards, which each call reports itself. Other flags: the models'. JSON last.

--interface flux gives the bundled transformer FLUX.1's text embedding, (512, 4096) in bf16: 4 MiB.
"""

import json
import shutil
import tempfile
from pathlib import Path

import numpy as np

from triton_models import repository
from triton_models.client import Client
from triton_models.overhead import FASTEST, median, with_interval
from triton_models.serve import Server, end_by_signals, parse_args, problems_of
from utils.benchmark_utils import Parser
from utils.checkpoints import BUNDLED_DIR
from utils.errors import UserError, run_script

MEASURED = repository.HERE / "measured"
VARIANTS = ("every_step", "kept", "inside")
FLUX_INTERFACE = {"joint_attention_dim": 4096, "pooled_projection_dim": 768}


def flux_interface(folder: Path) -> list[str]:
    """Write tiny-dev's architecture with FLUX.1's embedding sizes. Returns: flags that build it"""
    shutil.copytree(
        BUNDLED_DIR / "tiny-dev", folder, ignore=shutil.ignore_patterns("*.safetensors")
    )
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | FLUX_INTERFACE))
    return ["--ckpt", str(folder), "--random_weights"]


def add_models(models: Path) -> None:
    """Add the two measured models to a server's repository, with the flags of the others."""
    served = (models / "dit_transformer" / "config.pbtxt").read_text()
    (flags,) = [line for line in served.splitlines() if 'key: "flags"' in line]
    caller = (MEASURED / "step_caller" / "config.pbtxt").read_text().splitlines()
    texts = {
        "dit_kept": served.replace('name: "dit_transformer"', 'name: "dit_kept"'),
        "step_caller": "\n".join(flags if 'key: "flags"' in line else line for line in caller),
    }
    for name, text in texts.items():
        (models / name).mkdir()
        (models / name / "config.pbtxt").write_text(text + "\n")
        (models / name / "1").symlink_to(MEASURED / name / "1")


def measure(client: Client, rounds: int, steps: int) -> dict[str, list[tuple[float, float]]]:
    """Take turns. Returns: variant -> (seconds, seconds of forwards) of each round

    Raises: RuntimeError if the variants' latents differ.
    """
    found: dict[str, list] = {variant: [] for variant in VARIANTS}
    for number in range(-1, rounds):  # the first is the warm-up
        latents = []
        for variant in VARIANTS if number % 2 else VARIANTS[::-1]:
            inputs = [
                client.grpc.InferInput("variant", [1], "BYTES"),
                client.grpc.InferInput("steps", [1], "INT32"),
            ]
            inputs[0].set_data_from_numpy(np.array([variant.encode()], dtype=np.object_))
            inputs[1].set_data_from_numpy(np.array([steps], dtype=np.int32))
            answer = client.connection.infer("step_caller", inputs)
            latents.append(answer.as_numpy("latents"))
            times = (float(answer.as_numpy(name)[0]) for name in ("seconds", "forward_s"))
            if number >= 0:
                found[variant].append(tuple(times))
        if not all(np.array_equal(latents[0], other) for other in latents[1:]):
            raise RuntimeError("the variants gave different latents")
    return found


def main() -> None:
    """Serve, measure, report."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="other flags: those of triton_models.serve",
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--interface", choices=("flux", "own"), default="own")
    own, rest = parser.parse_known_args()
    if own.rounds < 1 or own.steps < 1:
        raise UserError("--rounds, --steps: expected 1 or more")
    args, flags = parse_args(rest)
    if problems := problems_of(args):
        raise UserError("\n".join(problems))
    end_by_signals()
    with tempfile.TemporaryDirectory() as scratch:
        if own.interface == "flux":
            flags += flux_interface(Path(scratch) / "flux")
        server = Server(args, flags)
        try:
            server.start()
            add_models(server.folder / "models")
            server.wait_until_ready()
            with Client(args.grpc_port, key=server.key) as client:
                for name in ("dit_kept", "step_caller"):
                    client.load(name)
                found = measure(client, own.rounds, own.steps)
        finally:
            server.stop()
    row: dict = {"interface": own.interface, "rounds": own.rounds, "steps": own.steps}
    for variant, times in found.items():
        beside = [(seconds - forward_s) / own.steps for seconds, forward_s in times]
        name = f"{variant}_beside_the_forward_s"
        row[name], row[f"{name}_95"] = with_interval(beside, median)
        row[f"{variant}_fastest_tenth_s"] = float(np.percentile(beside, FASTEST))
        row[f"{variant}_forward_s"] = float(np.median([f for _, f in times])) / own.steps
    for name, value in row.items():
        print(f"{name}: {value:.3g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    run_script(main)

"""What serving costs beside a pipeline in process: python -m triton_models.overhead --ckpt NAME

Asks a running server that has the same flags. Calls take turns (server, here, here, server, ...),
each at few and at many steps. The transformer's forward is the same work on both sides, and the
pictures are compared to the bit; yet two processes run it at speeds that differ by some percent for
as long as they live (where their memory lies), so it is timed on both sides and taken out: what is
left is all that serving adds, as the client sees it. A step costs what is left at many steps less
that at few, over the steps between; an image costs the rest. Nothing of it depends on the size, so
small pictures, whose calls are short, see the least of the host's drift and of its other work.

Twice: medians of paired differences, and the fastest tenth of each side (other work only ever adds
time); each with intervals of 95 %. The goal is judged by the fastest tenth. JSON last.

Source: Efron 1979, Bootstrap methods (the percentile interval); timeit's documentation, on minima
"""

import argparse
import json
import time
from collections.abc import Callable

import numpy as np

from triton_models.client import Client, ServerError
from triton_models.loadtest import read_metrics, request
from triton_models.parts import settings
from utils.benchmark_utils import Parser
from utils.errors import UserError, run_script

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percentiles
FASTEST = 10  # percentile
GOAL_S = 0.02 * 0.05  # 2 % of a step of 50 ms


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read this command's own flags; the rest are the server's."""
    parser = Parser(
        description=__doc__.splitlines()[0],
        epilog="other flags: those of the server, and the size",
    )
    parser.add_argument("--rounds", type=int, default=30, help="four calls each")
    parser.add_argument("--steps", default="4,28", help="few and many")
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    return parser.parse_known_args(argv)


def with_interval(
    values: np.ndarray | list, of: Callable[[np.ndarray], np.ndarray]
) -> tuple[float, list[float]]:
    """Give a statistic over rounds (axis -2 of what `of` gets) and its bootstrap interval."""
    rounds = np.asarray(values, dtype=float).reshape(len(values), -1)
    drawn = np.random.default_rng(0).integers(len(rounds), size=(RESAMPLES, len(rounds)))
    low, high = np.percentile(of(rounds[drawn]), INTERVAL)
    return float(of(rounds)), [float(low), float(high)]


def median(rounds: np.ndarray) -> np.ndarray:
    """Give the median of the first column."""
    return np.median(rounds[..., 0], axis=-1)


class Side:
    """One side of the comparison: calls that give one picture, timed with their forwards."""

    def __init__(self, call: Callable[..., list], forward_s: Callable[[], float]) -> None:
        self.call, self.forward_s = call, forward_s  # forward_s: in all, so far

    def timed(self, *args) -> tuple[np.ndarray, tuple[float, float]]:
        """Make one picture. Returns: it, and its seconds: in all, in forwards"""
        before, start = self.forward_s(), time.perf_counter()
        (picture,) = self.call(*args)
        seconds = time.perf_counter() - start
        return np.asarray(picture), (seconds, self.forward_s() - before)


def served(client: Client, metrics_port: int) -> Side:
    """Give the server's side; it counts the seconds of its forwards itself."""

    def call(fields: dict, steps: int) -> list:
        return client.generate(**fields, num_inference_steps=steps)

    return Side(call, lambda: read_metrics(metrics_port).get("flux_forward_seconds_total", 0.0))


def in_process(run_args) -> Side:
    """Give the side of a pipeline of this process, its forward wrapped in a clock."""
    from utils.pipeline_utils import generate, load_pipeline, optimize

    pipeline = optimize(load_pipeline(run_args), run_args)
    forward, spent = pipeline.transformer.forward, [0.0]

    def clocked(*args, **kwargs):
        start = time.perf_counter()
        output = forward(*args, **kwargs)
        spent[0] += time.perf_counter() - start
        return output

    pipeline.transformer.forward = clocked

    def call(fields: dict, steps: int) -> list:
        run_args.prompt, run_args.seed = [fields["prompt"]], fields["seed"]
        return generate(pipeline, run_args, num_inference_steps=steps)

    return Side(call, lambda: spent[0])


def measure(sides: dict[str, Side], shape: dict, rounds: int, counts: list[int]) -> np.ndarray:
    """Take turns.

    Shapes: (rounds, sides, numbers of steps, 2), seconds: in all, in forwards
    Raises: UserError if the pictures differ: the server has other flags.
    """
    plain = argparse.Namespace(num_inference_steps=None, sizes="")
    found = np.zeros((rounds + 1, len(sides), len(counts), 2))  # the first is the warm-up
    for number in range(rounds + 1):
        fields = request(number, plain) | shape
        for at, steps in enumerate(counts):
            order = list(enumerate(sides.values()))
            pictures = []
            for place, side in order if (number + at) % 2 else order[::-1]:
                picture, found[number, place, at] = side.timed(fields, steps)
                pictures.append(picture)
            if not np.array_equal(*pictures):
                raise UserError(
                    f"the server's picture at {steps} steps is another than the pipeline's here: "
                    "give the flags that it runs with"
                )
    return found[1:]


def summary(found: np.ndarray, counts: list[int]) -> dict:
    """Turn seconds of (server, here) into costs: of each step, and of an image beside its steps."""
    few, many = counts
    per_step = (found[:, :, 1] - found[:, :, 0]) / (many - few)  # (rounds, sides, 2)
    beside = (found[..., 0] - found[..., 1]).reshape(len(found), 4)

    def step(columns: np.ndarray) -> np.ndarray:  # (..., server at few and many, here likewise)
        return (columns @ np.array([-1, 1, 1, -1])) / (many - few)

    def image(columns: np.ndarray) -> np.ndarray:
        return columns @ np.array([1, 0, -1, 0]) - few * step(columns)

    def fastest(rounds: np.ndarray) -> np.ndarray:
        return np.percentile(rounds, FASTEST, axis=-2)

    row: dict = {"rounds": len(found), "steps": counts}
    for name, values, of in (
        ("overhead_per_step_s", beside, lambda rounds: step(fastest(rounds))),
        ("overhead_per_image_s", beside, lambda rounds: image(fastest(rounds))),
        ("paired_per_step_s", step(beside), median),
        ("paired_per_image_s", image(beside), median),
        ("step_in_process_s", per_step[:, 1, 0], median),
        ("forward_in_process_s", per_step[:, 1, 1], median),
        ("forward_in_server_s", per_step[:, 0, 1], median),
    ):
        row[name], row[f"{name}_95"] = with_interval(values, of)
    row["goal_per_step_s"] = GOAL_S
    row["step_goal_met"] = row["overhead_per_step_s_95"][1] < GOAL_S
    return row


def main() -> None:
    """Measure and report.

    Raises: UserError for wrong flags, or without a server.
    """
    args, flags = parse_args()
    words = args.steps.split(",")
    if len(words) != 2 or not all(word.isdecimal() for word in words) or args.rounds < 1:
        raise UserError(f"--steps {args.steps}, --rounds {args.rounds}: expected such as 4,28, 30")
    counts = sorted(int(word) for word in words)
    if counts[0] == counts[1]:
        raise UserError(f"--steps {args.steps}: expected two different numbers")
    run_args = settings(flags)
    try:
        with Client(args.grpc_port) as client:
            sides = {
                "server": served(client, args.metrics_port),
                "here": in_process(run_args),
            }
            names = ("height", "width", "max_sequence_length")
            shape = {name: getattr(run_args, name) for name in names}
            row = summary(measure(sides, shape, args.rounds, counts), counts)
    except ServerError as error:
        raise UserError(f"--grpc-port {args.grpc_port}: {error.code} {error}") from None
    row |= {"size": f"{run_args.width}x{run_args.height}", "flags": flags}
    for name, value in row.items():
        print(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    run_script(main)

"""What serving costs beside a pipeline in process: python -m triton_models.overhead --ckpt NAME

Asks a running server that has the same flags. A host's speed drifts by more than serving costs, so
calls take turns (server, here, here, server, ...), each at few and at many steps, and only
differences within a round count. The transformer's forward is the same work on both sides, the
pictures are compared to the bit; yet two processes run it at speeds that differ by some percent for
as long as they live (where their memory lies), so it is timed on both sides and taken out: what is
left is all that serving adds, as the client sees it. A step costs what is left at many steps less
that at few, over the steps between; an image costs the rest. Medians over the rounds with intervals
of 95 %, the plain difference of the clocks beside them, JSON last.

Source: Efron 1979, Bootstrap methods (the percentile interval of a median)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from triton_models.client import Client, ServerError
from triton_models.loadtest import read_metrics, request
from triton_models.parts import settings
from utils.errors import UserError, run_script

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percentiles
GOAL_S = 0.02 * 0.05  # 2 % of a step of 50 ms


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read this command's own flags; the rest are the server's."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        allow_abbrev=False,
        epilog="other flags: those of the server, and the size",
    )
    parser.add_argument("--rounds", type=int, default=30, help="four calls each")
    parser.add_argument("--steps", default="4,28", help="few and many")
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    return parser.parse_known_args(argv)


def median_with_interval(values: list[float]) -> tuple[float, list[float]]:
    """Give the median and its bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), INTERVAL)
    return statistics.median(values), [float(low), float(high)]


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


def measure(sides: dict[str, Side], size: dict, rounds: int, counts: list[int]) -> np.ndarray:
    """Take turns.

    Shapes: (rounds, sides, numbers of steps, 2), seconds: in all, in forwards
    Raises: UserError if the pictures differ: the server has other flags.
    """
    shape = argparse.Namespace(num_inference_steps=None, sizes="")
    found = np.zeros((rounds + 1, len(sides), len(counts), 2))  # the first is the warm-up
    for number in range(rounds + 1):
        fields = request(number, shape) | size
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
    beside = found[..., 0] - found[..., 1]  # (rounds, sides, numbers of steps)
    beside_step = (beside[:, :, 1] - beside[:, :, 0]) / (many - few)
    added = beside[:, 0] - beside[:, 1]
    added_step = beside_step[:, 0] - beside_step[:, 1]
    row: dict = {"rounds": len(found), "steps": counts}
    for name, values in (
        ("overhead_per_step_s", added_step),
        ("overhead_per_image_s", added[:, 0] - few * added_step),
        ("overhead_of_many_steps_s", added[:, 1]),
        ("step_in_process_s", per_step[:, 1, 0]),
        ("forward_in_process_s", per_step[:, 1, 1]),
        ("forward_in_server_s", per_step[:, 0, 1]),
        ("clocks_difference_per_step_s", per_step[:, 0, 0] - per_step[:, 1, 0]),
    ):
        row[name], row[f"{name}_95"] = median_with_interval(values.tolist())
    row["image_in_process_s"] = float(np.median(found[:, 1, 1, 0]))
    row["share_of_a_step"] = row["overhead_per_step_s"] / row["step_in_process_s"]
    row["share_of_an_image"] = row["overhead_of_many_steps_s"] / row["image_in_process_s"]
    row["goal_per_step_s"] = GOAL_S
    row["step_goal_met"] = row["overhead_per_step_s_95"][1] < GOAL_S
    return row


def main() -> None:
    """Measure and report.

    Raises: UserError for wrong flags, or without a server.
    """
    args, flags = parse_args()
    words = args.steps.split(",")
    if len(words) != 2 or not all(word.isdigit() for word in words) or args.rounds < 1:
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
            size = {"height": run_args.height, "width": run_args.width}
            row = summary(measure(sides, size, args.rounds, counts), counts)
    except ServerError as error:
        raise UserError(f"--grpc-port {args.grpc_port}: {error.code} {error}") from None
    row |= {"size": f"{run_args.width}x{run_args.height}", "flags": flags}
    for name, value in row.items():
        print(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    run_script(main)

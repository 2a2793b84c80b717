"""What serving costs beside a pipeline in process: python -m triton_models.overhead --ckpt NAME

Asks a running server that has the same flags. A host's speed drifts by more than serving costs, so
calls take turns (server, here, here, server, ...), each at few and at many steps, and only
differences within a round count. A step costs the difference at many steps less that at few, over
the steps between; an image costs what is left. Medians over the rounds with intervals of 95 %, JSON
last. A forward of one row is the same work on both sides: the pictures are compared, to the bit.

Source: Efron 1979, Bootstrap methods (the percentile interval of a median)
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np

from triton_models.client import Client, ServerError
from triton_models.loadtest import request
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
    return parser.parse_known_args(argv)


def median_with_interval(values: list[float]) -> tuple[float, list[float]]:
    """Give the median and its bootstrap interval."""
    drawn = np.random.default_rng(0).choice(values, (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), INTERVAL)
    return statistics.median(values), [float(low), float(high)]


def seconds_of(call: Callable[[], list]) -> tuple[float, np.ndarray]:
    """Time one call that gives one picture."""
    start = time.perf_counter()
    (picture,) = call()
    seconds = time.perf_counter() - start
    return seconds, np.asarray(picture)


def measure(client: Client, run_args, rounds: int, counts: list[int]) -> dict[str, list]:
    """Take turns. Returns: "server" and "here" -> for each round, seconds at each number of steps

    Raises: UserError if the pictures differ: the server has other flags.
    """
    from utils.pipeline_utils import generate, load_pipeline, optimize

    pipeline = optimize(load_pipeline(run_args), run_args)
    shape = argparse.Namespace(num_inference_steps=None, sizes="")
    found: dict[str, list] = {"server": [], "here": []}
    for number in range(-1, rounds):  # the first is the warm-up
        fields = request(number, shape) | {"height": run_args.height, "width": run_args.width}
        fields["seed"] = run_args.seed = number + 1
        run_args.prompt = [fields["prompt"]]
        row: dict[str, list] = {"server": [], "here": []}
        for at, steps in enumerate(counts):
            calls = {
                "server": lambda s=steps, f=fields: client.generate(**f, num_inference_steps=s),
                "here": lambda s=steps: generate(pipeline, run_args, num_inference_steps=s),
            }
            order = list(calls) if (number + at) % 2 else list(calls)[::-1]
            pictures = {}
            for side in order:
                seconds, pictures[side] = seconds_of(calls[side])
                row[side].append(seconds)
            if not np.array_equal(pictures["server"], pictures["here"]):
                raise UserError(
                    f"the server's picture at {steps} steps is another than the pipeline's here: "
                    "give the flags that it runs with"
                )
        if number >= 0:
            for side, seconds in row.items():
                found[side].append(seconds)
    return found


def summary(found: dict[str, list], counts: list[int]) -> dict:
    """Turn seconds into costs: for each step, and for each image beside its steps."""
    server, here = (np.array(found[side]) for side in ("server", "here"))  # (rounds, 2)
    few, many = counts
    differences = server - here
    step = (differences[:, 1] - differences[:, 0]) / (many - few)
    step_here = (here[:, 1] - here[:, 0]) / (many - few)
    row: dict = {"rounds": len(here), "steps": counts}
    for name, values in (
        ("step_in_process_s", step_here),
        ("overhead_per_step_s", step),
        ("overhead_per_image_s", differences[:, 0] - few * step),
        ("overhead_of_many_steps_s", differences[:, 1]),
    ):
        row[name], row[f"{name}_95"] = median_with_interval(values.tolist())
    row["in_process_s"] = float(np.median(here[:, 1]))
    row["share_of_a_step"] = row["overhead_per_step_s"] / row["step_in_process_s"]
    row["share_of_an_image"] = row["overhead_of_many_steps_s"] / row["in_process_s"]
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
            row = summary(measure(client, run_args, args.rounds, counts), counts)
    except ServerError as error:
        raise UserError(f"--grpc-port {args.grpc_port}: {error.code} {error}") from None
    row |= {"size": f"{run_args.width}x{run_args.height}", "flags": flags}
    for name, value in row.items():
        print(f"{name}: {value:.5g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    run_script(main)

"""Load a running server and say how it took it: python -m triton_models.loadtest --requests 200

Closed load: `--clients N` ask again as soon as they are answered. Open load: `--rate R` requests a
second, whether or not the last ones were answered, so that queueing shows. Latencies are the
client's. Batches, stages and waiting are differences of the server's own metrics. What serving
costs beside the pipeline in one process, triton_models/overhead.py measures. JSON last.
"""

import argparse
import json
import queue
import re
import threading
import time
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from triton_models.client import Client, ServerError
from utils.benchmark_utils import Parser
from utils.errors import UserError, run_script

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "yellow", "white")


@dataclass
class Outcome:
    """What became of the requests so far."""

    seconds: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    images: int = 0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--clients", type=int, default=4, help="closed load; threads of open load")
    parser.add_argument("--rate", type=float, help="open load: requests a second")
    parser.add_argument("--sizes", default="", help="such as 128x128,96x64 (the checkpoint's own)")
    parser.add_argument("--num_inference_steps", type=int)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    return parser.parse_args(argv)


def problems_of(args: argparse.Namespace) -> list[str]:
    """Look at the flags before anything is sent."""
    problems = [
        f"--{name} {value:g}: expected more than 0"
        for name in ("requests", "clients", "rate", "num_inference_steps")
        if (value := getattr(args, name)) is not None and not value > 0
    ]
    if args.sizes and not re.fullmatch(r"\d+x\d+(,\d+x\d+)*", args.sizes):
        problems.append(f"--sizes {args.sizes}: expected such as 128x128,96x64")
    return problems


def request(number: int, args: argparse.Namespace) -> dict:
    """Give request k of the load: prompts, sizes and seeds in turn."""
    shape, colour = SHAPES[number % 4], COLOURS[number // 4 % 4]
    fields = {"prompt": f"a {colour} {shape} on a blue background", "seed": number}
    if args.num_inference_steps:
        fields["num_inference_steps"] = args.num_inference_steps
    if args.sizes:
        sizes = args.sizes.split(",")
        width, height = sizes[number % len(sizes)].split("x")
        fields |= {"width": int(width), "height": int(height)}
    return fields


def read_metrics(port: int) -> dict[str, float]:
    """Read the counters of the orchestrator.

    Raises: UserError if no server answers there.
    """
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--metrics-port {port}: no server answers there ({error})") from None
    pairs = (re.fullmatch(r"(flux_\S+) (\S+)", line) for line in lines)
    return {found[1]: float(found[2]) for found in pairs if found}


def run(args: argparse.Namespace) -> tuple[Outcome, float]:
    """Send the load. Returns: the outcome and the seconds that it took"""
    work: queue.SimpleQueue = queue.SimpleQueue()
    outcome, lock, start = Outcome(), threading.Lock(), time.perf_counter()
    stopped = threading.Event()
    for number in range(args.requests):
        due = start + number / args.rate if args.rate else start
        work.put((due, request(number, args)))

    def client_loop() -> None:
        with Client(args.grpc_port) as client:
            while not stopped.is_set():
                try:
                    due, fields = work.get_nowait()
                except queue.Empty:
                    return
                if stopped.wait(max(0.0, due - time.perf_counter())):
                    return
                begun = due if args.rate else time.perf_counter()  # waiting for a thread counts
                try:
                    images, error = len(client.generate(**fields)), None
                except ServerError as found:
                    images, error = 0, found.code or str(found)
                except queue.Empty:
                    images, error = 0, "no answer"
                with lock:
                    outcome.images += images
                    if error is None:
                        outcome.seconds.append(time.perf_counter() - begun)
                    else:
                        outcome.errors[error] = outcome.errors.get(error, 0) + 1

    with ThreadPoolExecutor(args.clients) as threads:
        clients = [threads.submit(client_loop) for _ in range(args.clients)]
        try:
            wait(clients, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
    for client in clients:
        client.result()  # what ended one by surprise is no measurement
    return outcome, time.perf_counter() - start


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Give the usual ones; nearest rank, so that each is a latency that was seen."""
    ranked = sorted(seconds)
    return {f"p{p}_s": ranked[-(-len(ranked) * p // 100) - 1] for p in (50, 90, 99)}


def batch_rows(grown: dict[str, float]) -> dict[str, int]:
    """Count images by the mean rows of their forwards, from a histogram's cumulative buckets."""
    counts, below = {}, 0.0
    for name, count in grown.items():
        if found := re.fullmatch(r'flux_batch_rows_bucket\{le="(.+)"\}', name):
            counts[f"<= {found[1]}"], below = int(count - below), count
    return counts


def main() -> None:
    """Load, measure, report."""
    args = parse_args()
    if problems := problems_of(args):
        raise UserError("\n".join(problems))
    before = read_metrics(args.metrics_port)
    outcome, took_s = run(args)
    after = read_metrics(args.metrics_port)
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    stages = {
        name.split('"')[1]: seconds
        for name, seconds in grown.items()
        if name.startswith("flux_stage_seconds_total") and seconds
    }
    inside, steps = sum(stages.values()), max(1.0, grown["flux_steps_total"])
    row = {
        "requests": args.requests,
        "clients": args.clients,
        "rate": args.rate,
        "answered": len(outcome.seconds),
        "errors": outcome.errors,
        "images_per_s": outcome.images / took_s,
        "mean_batch_rows": grown["flux_batch_rows_sum"] / max(1.0, grown["flux_batch_rows_count"]),
        "images_by_batch_rows": batch_rows(grown),
        "stage_seconds": stages,
        "queue_seconds": grown["flux_queue_seconds_total"],
        "outside_share": 1 - inside / sum(outcome.seconds) if outcome.seconds else None,
        "forward_seconds_per_step": grown["flux_forward_seconds_total"] / steps,
    }
    if outcome.seconds:
        row |= percentiles(outcome.seconds)
    for name, value in row.items():
        print(f"{name}: {value:.4g}" if isinstance(value, float) else f"{name}: {value}")
    print(json.dumps(row))


if __name__ == "__main__":
    run_script(main)

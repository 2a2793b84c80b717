"""Start a real tritonserver on this machine: python -m triton_models.serve --ckpt tiny-schnell

Makes the server's environment if it is missing (--env, own requirements), writes a model repository
from the folders here with the flags of this command, waits until every model computes, prints a
request to try, and watches: a model whose process died is loaded again. Ctrl-C stops it and leaves
nothing behind. Loopback addresses, always; loading models, which can carry code, takes a key that
only this process has. Flags that this command does not know go to every model (--ckpt,
--compile_export_mode, ... as for gen_image.py).
"""

import argparse
import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path

from triton_models import repository
from triton_models.client import ORCHESTRATOR, Client, missing_package
from triton_models.parts import HEALTH, MODELS, ROOT
from utils.benchmark_utils import Parser
from utils.checks import file_problem
from utils.errors import signals_later

STOP_S = 30
SILENCE_S = 60.0  # of the orchestrator, which answers a health check without computing
DAY_S = 86400.0  # a request is over within minutes: whoever asks for more means never
KEY_NAME = "admin-key"  # over gRPC: triton-grpc-protocol-admin-key
# what changes the server or names files and memory: never a client's
RESTRICTED = "model-repository,shared-memory,trace,logging"
# glibc gives a thread's memory back after every layer and faults it in again, 3,700 to 4,700 times:
# 5 ms of a denoising step of 53 ms on a CPU (results/serving.md); these settings keep it
KEEP_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**32),
    "MALLOC_TOP_PAD_": str(2**26),
}


def parse_args(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Read this command's own flags; the rest are the models'."""
    parser = Parser(description=__doc__.splitlines()[0], epilog="other flags: gen_image.py")
    parser.add_argument("--env", type=Path, default=ROOT / ".venv-triton", help="made if missing")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, default=8001)
    parser.add_argument("--metrics-port", type=int, default=8002)
    parser.add_argument("--batch-sizes", default="1,2,4", help="rows of one forward")
    parser.add_argument("--max-in-flight", type=int, default=32, help="requests; more are refused")
    parser.add_argument("--threads", type=int, default=1, help="per model, on a CPU")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds until ready")
    parser.add_argument(
        "--log", type=Path, help="the server's own words (default: a temporary file)"
    )
    parser.add_argument("--watch", type=float, default=10.0, help="seconds between checks")
    parser.add_argument(
        "--write-repository",
        type=Path,
        metavar="FOLDER",
        help="write the model repository for a tritonserver of your own, and stop",
    )
    return parser.parse_known_args(argv)


def problems_of(args: argparse.Namespace) -> list[str]:
    """Look at everything that would fail later, before anything slow."""
    problems = []
    for flag, value, least, most in (
        ("--max-in-flight", args.max_in_flight, 1, 2**16),
        ("--threads", args.threads, 1, 2**16),
        ("--timeout", args.timeout, 1, DAY_S),
        ("--watch", args.watch, 0.1, DAY_S),
    ):
        if not least <= value <= most:
            problems.append(f"{flag} {value:g}: expected {least} to {most:g}")
    sizes = args.batch_sizes.split(",")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes) or "1" not in sizes:
        problems.append(f"--batch-sizes {args.batch_sizes}: expected numbers, 1 among them")
    if args.write_repository is not None:
        folder = args.write_repository
        if folder.exists():
            problems.append(f"--write-repository {folder}: exists already")
        elif problem := file_problem(folder):
            problems.append(f"--write-repository {folder}: {problem}")
        return problems
    if problem := missing_package():  # asks whether the server is ready, and then watches it
        problems.append(problem)
    if repository.VERSION not in repository.STUBS:
        problems.append(
            f"found {repository.VERSION}, expected one of {', '.join(repository.STUBS)}: Triton's "
            "Python stub is built for each"
        )
    made_by = sorted(path.name for path in args.env.glob("lib/python3*"))
    if made_by and repository.VERSION not in made_by:
        problems.append(f"--env {args.env}: found {made_by[0]}, expected {repository.VERSION}")
    if args.log and (problem := file_problem(args.log)):
        problems.append(f"--log {args.log}: {problem}")
    ports = {"--http-port": args.http_port, "--grpc-port": args.grpc_port}
    ports |= {"--metrics-port": args.metrics_port}
    if len(set(ports.values())) < len(ports):
        problems.append(f"{', '.join(ports)}: found one port twice, expected three")
    for flag, port in ports.items():
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except (OSError, OverflowError) as error:
                problems.append(
                    f"{flag} {port}: cannot be used ({getattr(error, 'strerror', error)})"
                )
    return problems


class Server:
    """One tritonserver process with its repository, stopped and cleaned up at the end."""

    def __init__(self, args: argparse.Namespace, flags: list[str]) -> None:
        self.args, self.flags = args, flags
        self.region, self.key = f"flux-{os.getpid()}-", secrets.token_hex(16)
        self.folder = Path(tempfile.mkdtemp(prefix="flux-triton-"))
        self.process: subprocess.Popen | None = None
        self.silent: dict[str, float] = {}  # model -> since when it has not answered in time

    def start(self) -> None:
        """Write what the server needs and start it."""
        args = self.args
        python = repository.environment(args.env)
        repository.write_repository(self.folder / "models", args, self.flags)
        server = repository.write_backend(self.folder / "backends", args.env)
        libraries = server.parent.parent / "nvidia_pytriton.libs"
        env = os.environ | {
            "PATH": f"{python.parent}:{os.environ['PATH']}",  # the stub takes its prefix from here
            "LD_LIBRARY_PATH": f"{sysconfig.get_config_var('LIBDIR')}:{libraries}",
            "PYTHONUNBUFFERED": "1",
            # Triton would start an instance on each GPU: one transformer has to hear cancellations
            "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            "OMP_NUM_THREADS": str(args.threads),  # torch's own setting holds for one thread only
            **KEEP_MEMORY,
        }
        loads = [f"--load-model={name}" for name in (*MODELS, HEALTH)]
        command = [
            str(server / "bin" / "tritonserver"),
            f"--model-repository={self.folder / 'models'}",
            f"--backend-directory={self.folder / 'backends'}",
            f"--backend-config=python,shm-region-prefix-name={self.region}",
            # 30 s by default: a stub on a busy machine needs longer, and the whole server aborts
            f"--backend-config=python,stub-timeout-seconds={args.timeout:.0f}",
            f"--backend-config=python,thread-pool-size={repository.pool_size(args.max_in_flight)}",
            "--disable-auto-complete-config",
            "--model-control-mode=explicit",
            *loads,
            *(f"--{kind}-address=127.0.0.1" for kind in ("http", "grpc", "metrics")),
            f"--http-port={args.http_port}",
            f"--grpc-port={args.grpc_port}",
            f"--metrics-port={args.metrics_port}",
            f"--http-restricted-api={RESTRICTED}:{KEY_NAME}={self.key}",
            f"--grpc-restricted-protocol={RESTRICTED}:{KEY_NAME}={self.key}",
            "--exit-timeout-secs=10",
        ]
        self.log = args.log or self.folder / "server.log"
        with open(self.log, "wb") as log, signals_later():
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self) -> float:
        """Wait until every model answers a real request. Returns: seconds

        Raises: RuntimeError with the end of the server's log.
        """
        start = time.perf_counter()
        while time.perf_counter() - start < self.args.timeout:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended ({self.process.returncode})\n{self.tail()}")
            with contextlib.suppress(Exception), Client(self.args.grpc_port) as client:
                if client.is_ready() and not client.unhealthy():
                    return time.perf_counter() - start
            time.sleep(0.5)
        raise RuntimeError(f"not ready after {self.args.timeout:g} s\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """Give the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def heal(self) -> list[str]:
        """Load again what does not compute; say what was done.

        What is merely silent may be compiling for a call of a new kind: it has as long as a start;
        the orchestrator computes nothing itself.
        """
        from tritonclient.utils import InferenceServerException

        done = []
        with Client(self.args.grpc_port, key=self.key) as client:
            found, now = client.unhealthy(), time.monotonic()
            silent = [name for name, words in found.items() if words.startswith("no answer")]
            self.silent = {name: self.silent.get(name, now) for name in silent}
            for name, words in found.items():
                patience = self.args.timeout
                if name == ORCHESTRATOR:
                    patience = min(patience, SILENCE_S)
                if name in silent and now - self.silent[name] < patience:
                    continue
                self.silent.pop(name, None)  # a new process has its own time
                try:
                    client.reload(name)
                    outcome = "loaded again"
                except InferenceServerException as error:  # tried again at the next check
                    outcome = f"cannot be loaded again: {error.message()}"
                done.append(f"{'' if name in words else f'{name}: '}{words}; {outcome}")
        return done

    def stop(self) -> None:
        """Stop the server and its stubs, and remove what they would leave."""
        for impatient in (signal.SIGINT, signal.SIGTERM):  # a second one would leave it all behind
            signal.signal(impatient, signal.SIG_IGN)
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)  # stubs that a dead server left
            self.process.wait()
        for left in Path("/dev/shm").glob(f"{self.region}*"):
            left.unlink(missing_ok=True)
        shutil.rmtree(self.folder, ignore_errors=True)


def end_by_signals() -> None:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, also where a shell has them ignored."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.default_int_handler)


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    from utils.errors import UserError

    args, flags = parse_args()
    if problems := problems_of(args):
        raise UserError("\n".join(problems))
    from triton_models.parts import settings

    # Refuses what a model would refuse, here and now; but whether a stored package belongs to the
    # versions of the server's environment, only the models can tell
    settings([flag for flag in flags if flag.replace("_", "-") != "--use-cached-model"])
    end_by_signals()
    if args.write_repository is not None:
        with tempfile.TemporaryDirectory(dir=args.write_repository.parent) as scratch:
            repository.write_repository(Path(scratch) / "models", args, flags)
            (Path(scratch) / "models").rename(args.write_repository)
        print(f"wrote {args.write_repository}")
        return
    server = Server(args, flags)
    try:
        server.start()
        print(f"starting; the log is {server.log}", flush=True)
        print(f"ready after {server.wait_until_ready():.0f} s", flush=True)
        print(
            "try: python -m triton_models.client --prompt 'a red circle on a blue background' "
            f"--grpc-port {args.grpc_port} --output-file served.png\n"
            f"metrics: http://127.0.0.1:{args.metrics_port}/metrics",
            flush=True,
        )
        while server.process.poll() is None:
            time.sleep(args.watch)
            for line in server.heal():
                print(line, flush=True)
        raise UserError(f"tritonserver ended ({server.process.returncode})\n{server.tail()}")
    except RuntimeError as error:
        raise UserError(str(error)) from None
    except KeyboardInterrupt:
        print("stopping", flush=True)
    finally:
        server.stop()


if __name__ == "__main__":
    from utils.errors import run_script

    run_script(main)

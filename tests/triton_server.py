"""One real tritonserver for the tests, started as a user starts it."""

import contextlib
import functools
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from triton_models.parts import ROOT

ENV = ROOT / ".venv-triton"
READY_S = 900
ANSWER_S = 120.0  # a server that lost a request shall not cost ten minutes of a test run
NEEDS_ENV = pytest.mark.skipif(
    not (ENV / "bin" / "python3").exists(),
    reason="no .venv-triton: python -m triton_models.serve makes it",
)


@functools.cache
def _candidates() -> list[int]:
    """List the ports below those that the system gives away, in an order of this process's own."""
    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    ports = list(range(max(1024, lowest - 20_000), lowest)) or list(range(20_000, 60_000))
    random.Random(os.getpid()).shuffle(ports)
    return ports


def free_ports(count: int) -> list[int]:
    """Find ports that nobody uses, and that nobody is given while a server loads its models."""
    found: list[int] = []
    while len(found) < count:
        port = _candidates().pop()  # never given twice
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


class Served:
    """A running `python -m triton_models.serve`."""

    def __init__(self, folder: Path, *flags: str, metrics: int | None = None) -> None:
        self.http, self.grpc, free = free_ports(3)
        self.metrics = metrics or free
        self.words, self.log = folder / "words.txt", folder / "server.log"
        ports = f"--http-port {self.http} --grpc-port {self.grpc} --metrics-port {self.metrics}"
        command = [sys.executable, "-m", "triton_models.serve", *ports.split()]
        command += ["--log", str(self.log), *flags]
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        with open(self.words, "wb") as out:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | {"TMPDIR": str(self.temporary)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def wait(self) -> None:
        """Wait until it says that it is ready.

        Raises: AssertionError with its own words.
        """
        end = time.monotonic() + READY_S
        while "ready after" not in self.words.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.words.read_text()
            time.sleep(0.2)

    def client(self, timeout_s: float = ANSWER_S):
        """Open a connection; an answer that stays away is queue.Empty."""
        from triton_models.client import Client

        return Client(self.grpc, timeout_s=timeout_s)

    def counters(self) -> dict[str, float]:
        """Read the orchestrator's metrics."""
        from triton_models.loadtest import read_metrics

        return read_metrics(self.metrics)

    def post(self, path: str, body: bytes) -> bytes:
        """Send one HTTP request."""
        address = f"http://127.0.0.1:{self.http}{path}"
        with urllib.request.urlopen(address, data=body, timeout=600) as answer:
            return answer.read()

    def stubs(self, model: str) -> list[int]:
        """Find the processes of one model of this server."""
        words = f"{self.temporary}.*python_backend_stub.*/{model}/"
        found = subprocess.run(["pgrep", "-f", words], capture_output=True, text=True)
        return [int(pid) for pid in found.stdout.split()]

    def stop(self) -> int:
        """End it as a service manager does. Returns: its exit code"""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(600)
        finally:
            if self.process.poll() is None:
                self.process.kill()

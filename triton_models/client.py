"""Ask a running server for images: python -m triton_models.client --prompt "..."

Over a gRPC stream, so that progress can come before the image. `Client` is the same in Python.
"""

import contextlib
import io
import queue
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.benchmark_utils import Parser
from utils.checks import file_problem
from utils.errors import UserError, run_script
from utils.steps import import_problem

ORCHESTRATOR, HEALTH = "bls_orchestrator", "deep_health"
SILENCE_S = 660.0  # the server's own limit is 600: a request whose process died is never ended
TYPES = {  # request field -> Triton's type and numpy's
    "prompt": ("BYTES", "object"),
    "height": ("INT32", "int32"),
    "width": ("INT32", "int32"),
    "num_inference_steps": ("INT32", "int32"),
    "guidance_scale": ("FP32", "float32"),
    "seed": ("INT64", "int64"),
    "max_sequence_length": ("INT32", "int32"),
    "num_images_per_prompt": ("INT32", "int32"),
    "format": ("BYTES", "object"),
    "progress": ("BOOL", "bool"),
}


def missing_package() -> str:
    """Say what this Python lacks to ask a server, and what brings it; "" if nothing is missing."""
    if problem := import_problem("tritonclient", "tritonclient.grpc"):
        return f"found {problem}, expected Triton's client: pip install tritonclient[grpc]==2.73.0"
    return ""


class ServerError(Exception):
    """The server refused or failed; `code` is gRPC's name, such as INVALID_ARGUMENT.

    A stream's errors have words but no code, so the orchestrator's words begin with it; Triton's
    own (an unknown field) have none. Its header for real codes (triton_grpc_error) makes 2.51 log
    internal errors.
    """

    def __init__(self, error) -> None:
        found = re.match(r"([A-Z][A-Z_]+): (.*)", error.message(), re.DOTALL)
        self.code, words = found.groups() if found else ("", error.message())
        super().__init__(words)


class Client:
    """One connection. Use it with `with`: an open one holds a server's shutdown.

    `key` is what `serve` wants for loading and unloading, `timeout_s` how long an answer may stay
    away. Raises: UserError without the package.
    """

    def __init__(
        self,
        port: int = 8001,
        host: str = "127.0.0.1",
        key: str = "",
        timeout_s: float = SILENCE_S,
    ) -> None:
        if problem := missing_package():
            raise UserError(problem)
        import tritonclient.grpc as grpc

        self.grpc, self.key, self.timeout_s = grpc, key, timeout_s
        self.connection = grpc.InferenceServerClient(f"{host}:{port}")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *error) -> None:
        self.connection.close()

    def is_ready(self) -> bool:
        """Ask Triton, which knows only whether models were loaded."""
        return self.connection.is_server_ready()

    def unhealthy(self, timeout_s: float = 120.0) -> dict[str, str]:
        """Ask the deep health model: model -> what is wrong with it; itself, if it fails."""
        from tritonclient.utils import InferenceServerException

        try:
            found = self.connection.infer(HEALTH, [], client_timeout=timeout_s)
        except InferenceServerException as error:
            return {HEALTH: error.message()}
        columns = [found.as_numpy(name).tolist() for name in ("models", "words")]
        pairs = zip(*columns, strict=True)
        return {name.decode(): words.decode() for name, words in pairs if words}

    def load(self, model: str) -> None:
        """Load a model of the server's repository; takes the key."""
        self.connection.load_model(model, headers=self._headers())

    def reload(self, model: str) -> None:
        """Unload and load a model: the one way to bring back a stub that died."""
        self.connection.unload_model(model, headers=self._headers())
        self.load(model)

    def _headers(self) -> dict[str, str]:
        return {"triton-grpc-protocol-admin-key": self.key} if self.key else {}

    def inputs(self, fields: dict) -> list:
        """Turn request fields into Triton's inputs.

        Raises: KeyError for an unknown field, UserError for a number that its type cannot hold.
        """
        import numpy as np

        made = []
        for name, value in fields.items():
            kind, dtype = TYPES[name]
            values = value if isinstance(value, list) else [value]
            if kind.startswith(("INT", "FP")):
                most = (
                    np.iinfo(dtype).max if dtype.startswith("int") else float(np.finfo(dtype).max)
                )
                if not all(abs(v) <= most for v in values):
                    raise UserError(f"--{name} {value}: expected a number, {most} at most")
            values = [v.encode() if isinstance(v, str) else v for v in values]
            tensor = self.grpc.InferInput(name, [len(values)], kind)
            tensor.set_data_from_numpy(np.array(values, dtype=dtype))
            made.append(tensor)
        return made

    def responses(self, inputs: list) -> Iterator:
        """Send one request and give its answers as they come; leaving the iterator cancels it.

        Raises: ServerError for what the server refuses; queue.Empty after timeout_s of silence.
        """
        from tritonclient.utils import InferenceServerException

        answers: queue.SimpleQueue = queue.SimpleQueue()
        self.connection.start_stream(lambda result, error: answers.put((result, error)))
        ended = False
        try:
            with contextlib.suppress(InferenceServerException):  # the answer below has the reason
                self.connection.async_stream_infer(
                    ORCHESTRATOR, inputs, enable_empty_final_response=True
                )
            while not ended:
                result, error = answers.get(timeout=self.timeout_s)
                if error is not None:
                    raise ServerError(error)
                ended = result.get_response().parameters["triton_final_response"].bool_param
                if result.get_response().outputs:
                    yield result
        finally:
            self.connection.stop_stream(cancel_requests=not ended)

    def generate(
        self,
        prompt: str | list[str],
        on_step: Callable[[int, int], None] | None = None,
        **fields,
    ) -> list:
        """Make images; `on_step(step, steps)` is called as they come.

        Returns: PIL images, a prompt's images side by side
        Raises: ServerError for what the server refuses; queue.Empty after timeout_s of silence.
        """
        from PIL import Image

        fields |= {"prompt": prompt, "progress": on_step is not None}
        images = []
        for result in self.responses(self.inputs(fields)):
            found = result.as_numpy("images")
            if found is not None:
                images = [Image.open(io.BytesIO(png)).convert("RGB") for png in found.tolist()]
            elif on_step is not None:
                on_step(int(result.as_numpy("step")[0]), int(result.as_numpy("steps")[0]))
        return images


def main() -> None:
    """Ask once and write what comes.

    Raises: UserError for what the server refuses, or if there is none.
    """
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompt", action="append", required=True)
    for name in ("height", "width", "num_inference_steps", "seed", "max_sequence_length"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--num_images_per_prompt", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--output-file", type=Path, default=Path("served.png"))
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--grpc-port", type=int, default=8001)
    args = vars(parser.parse_args())
    target, host, port = (args.pop(name) for name in ("output_file", "host", "grpc_port"))
    problem = "" if target.suffix.lower() == ".png" else "expected a name ending in .png"
    if problem := problem or file_problem(target):
        raise UserError(f"--output-file {target}: {problem}")
    fields = {name: value for name, value in args.items() if value is not None}
    shown = sys.stdout.isatty()

    def on_step(step: int, steps: int) -> None:
        if shown:
            print(f"\rstep {step} of {steps}", end="\n" if step == steps else "", flush=True)

    try:
        with Client(port, host) as client:
            images = client.generate(on_step=on_step, **fields)
    except ServerError as error:
        where = error.code or f"--host {host}, --grpc-port {port}"
        raise UserError(f"{where}: {error}") from None
    except queue.Empty:
        raise UserError(f"no answer within {SILENCE_S:g} s; ask again") from None
    for k, image in enumerate(images):
        path = target if len(images) == 1 else target.with_stem(f"{target.stem}_{k}")
        image.save(path)
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)

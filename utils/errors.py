"""The one exception that a user is meant to read, and how a script ends."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

REQUIRED = (  # what requirements.txt brings, as it is imported
    *("torch", "diffusers", "transformers", "torchao", "cache_dit", "accelerate", "peft"),
    *("safetensors", "gguf", "tokenizers", "huggingface_hub", "PIL", "torchmetrics", "numpy"),
    *("psutil", "yaml", "scipy", "tqdm"),
)


class UserError(Exception):
    """Say what is wrong, one problem a line: what, found, expected, which flag."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: it ends a script as Ctrl-C does, clean-ups and children included."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main; exit 2 with one line per problem on bad input or without a package.

    130 on Ctrl-C, 143 on SIGTERM: what main has to say of them is the exception's text.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        main()
    except UserError as error:
        for line in str(error).splitlines():
            print(f"error: {line}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in REQUIRED:
            raise
        print(
            f"error: {package} is not installed in {sys.executable}: pip install -r "
            "requirements.txt, or activate the environment that has it (. .venv/bin/activate)",
            file=sys.stderr,
        )
        sys.exit(2)
    except BrokenPipeError:  # ... | head: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        about = f": {error}" if str(error) else ""
        print(f"{'terminated' if terminated else 'interrupted'}{about}", file=sys.stderr)
        sys.exit(143 if terminated else 130)


def _terminate(*_) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends it at once
    raise Terminated


@contextmanager
def signals_later() -> Iterator[None]:
    """Keep SIGINT and SIGTERM back until the body is done, where they raise an exception.

    For the start of a process: an exception before anybody has it would leave it running.
    """
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    raising = {number: handler for number, handler in handlers.items() if callable(handler)}
    came: list[int] = []
    for number in raising:
        signal.signal(number, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in raising.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])

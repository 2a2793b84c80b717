"""What a long step is doing, on stderr: a bar naming the stage on a terminal, lines anywhere."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def say(step: str, text: str) -> None:
    """Print one line without tearing a bar apart."""
    from tqdm import tqdm

    tqdm.write(f"{step}: {text}", file=sys.stderr)


@contextmanager
def stages(step: str, total: int) -> Iterator[Callable[[str], None]]:
    """Give a function that names the stage that begins; `total` is how many there will be."""
    from tqdm import tqdm

    with tqdm(total=total, desc=step, disable=None, leave=False, file=sys.stderr) as bar:
        begun = False

        def stage(name: str) -> None:
            nonlocal begun
            bar.update(int(begun))  # the stage before is done
            begun = True
            bar.set_postfix_str(name)

        yield stage

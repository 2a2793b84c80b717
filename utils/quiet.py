"""Keep the libraries' start-up chatter away from what the scripts have to say.

None of it concerns a FLUX.1 run: torchao announces compiled extensions that float8 does not use,
transformers an image processor that FLUX.1 has no part for, diffusers prompts that were cut
(utils/prompts.py says it better).
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def quiet_libraries() -> None:
    """Lower the libraries' logging to errors; call it before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "WARNING")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    # diffusers' cached version check, seen by the compiler: a constant in either case
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")


def no_bars_without_terminal() -> None:
    """Turn the loading bars of both libraries off where nobody sees them move."""
    import diffusers
    import transformers

    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


@contextmanager
def heard(name: str) -> Iterator[list[str]]:
    """Collect what a library's logger warns of in the body, whatever its level, and print none."""
    found: list[str] = []
    logger, handler = logging.getLogger(name), logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]

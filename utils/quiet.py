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
def heard(*names: str) -> Iterator[list[str]]:
    """Collect what loggers of libraries warn of in the body, whatever their level; print none."""
    found: list[str] = []
    loggers, handler = [logging.getLogger(name) for name in names], logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield found
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate

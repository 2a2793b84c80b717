"""Is a denoising job still there? Of one whose process died Triton never ends the call."""

import threading
import time

from triton_models import calls

WATCH_S = 10.0  # without news, until the transformer is asked


class Watch:
    """Asks the transformer for one name's jobs when they have been silent.

    In threads that can be left, since a transformer that hangs does not answer. A job is lost after
    two answers in a row that none runs: the first may have crossed its last answer, or come before
    it.
    """

    def __init__(self, job: str) -> None:
        self.job, self.since = job, time.perf_counter()
        self.words: list[str] = []  # of answers in a row that none runs
        self.thread: threading.Thread | None = None

    def news(self) -> None:
        """Take note that a job has said something."""
        self.words, self.since = [], time.perf_counter()

    def lost(self) -> str:
        """Say why the jobs are lost; "" as long as they may be there."""
        asked = self.thread is not None and self.thread.is_alive()
        if not asked and time.perf_counter() - self.since >= WATCH_S:
            self.since = time.perf_counter()
            self.thread = threading.Thread(target=self._ask, args=(self.words,), daemon=True)
            self.thread.start()
        return self.words[-1] if len(self.words) > 1 else ""

    def _ask(self, words: list[str]) -> None:
        try:
            calls.ask(self.job)
        except RuntimeError as error:
            words.append(str(error))
        else:
            words.clear()

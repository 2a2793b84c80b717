"""What the orchestrator counts, on Triton's own /metrics page."""

import threading
import time
from contextlib import contextmanager


class Metrics:
    """Counters and histograms of one orchestrator. Units are in the names, as Prometheus wants."""

    def __init__(self) -> None:
        import triton_python_backend_utils as pb_utils

        def family(name: str, description: str, kind: str):
            kind = getattr(pb_utils.MetricFamily, kind)
            return pb_utils.MetricFamily(name=name, description=description, kind=kind)

        self._requests = family("flux_requests_total", "Requests by outcome", "COUNTER")
        self._stages = family("flux_stage_seconds_total", "Seconds spent in a stage", "COUNTER")
        counters = {
            "flux_images_total": "Images answered",
            "flux_steps_total": "Denoising steps taken, one for each image",
            "flux_forward_seconds_total": "Seconds in the transformer's forward, by share of rows",
            "flux_queue_seconds_total": "Seconds in which a request waited for its turn: for a "
            "thread, and each image for the transformer's forwards",
        }
        self._families = {n: family(n, text, "COUNTER") for n, text in counters.items()}
        self._plain = {n: f.Metric(labels={}) for n, f in self._families.items()}
        self._batches = family(
            "flux_batch_rows", "Rows of the forwards that an image took part in, mean", "HISTOGRAM"
        )
        self._batch = self._batches.Metric(labels={}, buckets=[1.0, 1.5, 2.0, 3.0, 4.0, 8.0])
        self._labelled: dict[tuple, object] = {}
        # Two threads in Triton's metrics at once crash the whole server (2.51)
        self._lock = threading.Lock()

    def _of(self, family, **labels: str):
        key = id(family), *labels.items()
        if key not in self._labelled:
            self._labelled[key] = family.Metric(labels=labels)
        return self._labelled[key]

    def request(self, outcome: str) -> None:
        """Count one request's end."""
        with self._lock:
            self._of(self._requests, outcome=outcome).increment(1)

    def waited(self, seconds: float) -> None:
        """Count seconds of waiting before a request's first call."""
        with self._lock:
            self._plain["flux_queue_seconds_total"].increment(seconds)

    def images(self, count: int) -> None:
        """Count images that were answered."""
        with self._lock:
            self._plain["flux_images_total"].increment(count)

    def denoised(self, steps: int, mean_batch: float, forward_s: float, queue_s: float) -> None:
        """Count one image's steps, the batches that they were part of, their time and waiting."""
        with self._lock:
            self._plain["flux_steps_total"].increment(steps)
            self._plain["flux_forward_seconds_total"].increment(forward_s)
            self._plain["flux_queue_seconds_total"].increment(queue_s)
            self._batch.observe(mean_batch)

    @contextmanager
    def stage(self, name: str):
        """Add the body's seconds to a stage."""
        clock = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - clock
            with self._lock:
                self._of(self._stages, stage=name).increment(seconds)

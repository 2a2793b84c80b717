"""What is measured of a server: a load's latencies, the overhead over the scripts; no server."""

import numpy as np
import pytest

from triton_models import loadtest, overhead


@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()])
def test_a_load_that_breaks_off_is_no_measurement(monkeypatch, error):
    """Nor does it go on: the other client would wait for requests that are due in a year."""

    class Broken:
        def __init__(self, port: int) -> None: ...

        def __enter__(self) -> "Broken":
            return self

        def __exit__(self, *error) -> None: ...

        def generate(self, **fields) -> list:
            raise error

    monkeypatch.setattr(loadtest, "Client", Broken)
    with pytest.raises(type(error)):
        loadtest.run(loadtest.parse_args(["--requests", "9", "--clients", "2", "--rate", "3e-8"]))


def test_percentiles_are_latencies_that_were_seen():
    seconds = [float(k) for k in range(100, 0, -1)]
    assert loadtest.percentiles(seconds) == {"p50_s": 50, "p90_s": 90, "p99_s": 99}
    assert loadtest.percentiles([2.0, 1.0]) == {"p50_s": 1, "p90_s": 2, "p99_s": 2}


def test_overhead_is_told_apart_from_drift():
    """Costs of 1 ms a step and 20 ms an image; a forward that slows down, and is slower there."""
    found = np.zeros((5, 2, 2, 2))
    for number, drift in enumerate((1.0, 1.5, 2.0, 2.5, 3.0)):
        for at, steps in enumerate((4, 28)):
            here, there = drift * 0.05 * steps, 1.1 * drift * 0.05 * steps
            found[number, 0, at] = there + 0.1 + 0.02 + 0.001 * steps, there
            found[number, 1, at] = here + 0.1, here
    row = overhead.summary(found, [4, 28])
    for name in ("overhead", "paired"):
        assert row[f"{name}_per_step_s"] == pytest.approx(0.001)
        assert row[f"{name}_per_image_s"] == pytest.approx(0.02)
    assert row["step_in_process_s"] == pytest.approx(0.1) and row["rounds"] == 5
    assert row["forward_in_server_s"] == pytest.approx(0.11)
    low, high = row["step_in_process_s_95"]
    assert 0.05 - 1e-9 <= low < 0.1 < high <= 0.15 + 1e-9
    found[0, :, :, 0] += 5.0  # other work: a round that is slow on both sides changes little
    assert overhead.summary(found, [4, 28])["overhead_per_step_s"] == pytest.approx(0.001)
    found[:, 0, :, 0] += 0.001 * np.array([4, 28])
    assert not overhead.summary(found, [4, 28])["step_goal_met"]

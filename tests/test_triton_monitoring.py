"""The example files for Prometheus and Grafana: each query must find data of a real server."""

import json
import re
import shutil
import subprocess
import time
import urllib.parse
import urllib.request

import pytest

from tests.triton_server import NEEDS_ENV, Served, free_ports
from triton_models.parts import ROOT

FILES = ROOT / "triton_models" / "monitoring"
DASHBOARD = json.loads((FILES / "grafana-dashboard.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
FIELDS = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 16}


def _lost(given, found, path: str = "") -> list[str]:
    """List what one JSON tree has and the other has not, or has otherwise."""
    if isinstance(given, dict) and isinstance(found, dict):
        return [x for k, v in given.items() for x in _lost(v, found.get(k), f"{path}/{k}")]
    if isinstance(given, list) and isinstance(found, list) and len(given) == len(found):
        pairs = enumerate(zip(given, found, strict=True))
        return [x for k, (a, b) in pairs for x in _lost(a, b, f"{path}/{k}")]
    return [] if given == found else [f"{path}: {given!r} became {found!r}"]


def test_the_dashboard_is_of_grafanas_own_schema():
    """Read by the types that Grafana generates from its schema, and written again: all is kept."""
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.cog.plugins import register_default_plugins
    from grafana_foundation_sdk.models import dashboard, prometheus

    register_default_plugins()
    read = dashboard.Dashboard.from_json(DASHBOARD)
    assert _lost(DASHBOARD, json.loads(JSONEncoder().encode(read))) == []
    targets = [target for panel in read.panels for target in panel.targets]
    assert all(isinstance(target, prometheus.Dataquery) for target in targets)
    assert [target.expr for target in targets] == QUERIES
    unknown = DASHBOARD | {"panles": []}  # what the schema does not know is lost: the test sees it
    assert _lost(
        unknown, json.loads(JSONEncoder().encode(dashboard.Dashboard.from_json(unknown)))
    ) == ["/panles: [] became None"]


def _ask(port: int, path: str, **query: str) -> dict:
    address = f"http://127.0.0.1:{port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(address, timeout=30) as answer:
        return json.loads(answer.read())["data"]


def _values(port: int, query: str) -> list[float]:
    found = _ask(port, "query", query=query)["result"]
    return [float(series["value"][1]) for series in found]


@pytest.mark.slow
@NEEDS_ENV
@pytest.mark.skipif(not shutil.which("prometheus"), reason="no prometheus: apt install prometheus")
def test_prometheus_finds_data_for_every_panel(tmp_path):
    """Both as they are committed: prometheus.yml's port, the dashboard's queries."""
    config = FILES / "prometheus.yml"
    (metrics,) = re.findall(r"127\.0\.0\.1:(\d+)", config.read_text())
    (port,) = free_ports(1)
    server = Served(tmp_path, "--ckpt", "tiny-dev", "--batch-sizes", "1,2", metrics=int(metrics))
    command = ["prometheus", f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
    with open(tmp_path / "prometheus.log", "wb") as log:
        prometheus = subprocess.Popen(
            [*command, f"--storage.tsdb.path={tmp_path / 'data'}"], stdout=log, stderr=log
        )
    try:
        server.wait()
        end = time.monotonic() + 600
        with server.client() as client:
            while missing := _without_data(port):
                assert time.monotonic() < end, (missing, (tmp_path / "prometheus.log").read_text())
                client.generate(prompt="a red circle", num_images_per_prompt=2, **FIELDS)
        assert _ask(port, "targets")["activeTargets"][0]["health"] == "up"
        for query in QUERIES:
            assert all(value >= 0 for value in _values(port, query)), query
        (rows,) = _values(port, "flux_batch_rows_sum / flux_batch_rows_count")
        assert 1 <= rows <= 2
        # once a scrape has seen the last request's end
        while _values(port, "flux_steps_total / flux_images_total") != [2]:
            assert time.monotonic() < end
            time.sleep(0.5)
    finally:
        prometheus.terminate()
        prometheus.wait(30)
        server.stop()


def _without_data(port: int) -> list[str]:
    """List the queries that give nothing, or NaN: two scrapes must have seen requests."""
    try:
        return [q for q in QUERIES if not (v := _values(port, q)) or any(x != x for x in v)]
    except OSError:  # Prometheus is still starting
        return QUERIES

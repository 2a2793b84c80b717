"""The tables of docs/extras-pipelines.md are those of the committed results."""

import json
from pathlib import Path

from extras import compare_stages
from tiny_flux import evaluate_controlnet

PAGE = Path("docs/extras-pipelines.md").read_text()


def between(name: str) -> str:
    return PAGE.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]


def test_the_net_s_numbers():
    found = json.loads(Path("tiny_flux/evaluation-controlnet.json").read_text())
    assert between("controlnet") == evaluate_controlnet.table(found["rows"])


def test_the_stages_numbers():
    lines = Path("results/extras/stages.jsonl").read_text().splitlines()
    assert between("stages") == compare_stages.table([json.loads(line) for line in lines])

"""The repository keeps its promises: generated tables, one test command, a size that travels."""

import ast
import json
import subprocess
from pathlib import Path

import pytest

from utils import readme

ROOT = Path(__file__).resolve().parent.parent
TEXT = readme.README.read_text()


def tracked() -> list[Path]:
    """List the files that git tracks, or skip where there is no git checkout."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def test_the_readmes_tables_are_those_of_the_code():
    assert readme.render(TEXT) == TEXT, "run: python -m utils.readme"
    rows = readme.TABLES.read_text()
    assert readme.render(rows, readme.ROWS) == rows, "run: python -m utils.report"


def test_a_missing_marker_is_an_error():
    with pytest.raises(ValueError, match="no markers for steps"):
        readme.render("no tables here")


def test_ci_runs_the_readmes_test_command():
    script = (ROOT / ".ci" / "run").read_text()
    command = next(line for line in TEXT.splitlines() if 'pytest -m "not slow"' in line)
    for part in command.split(" && "):
        assert part.replace("pip install", "pip install --quiet") in script or part in script, part


def test_tracked_files_fit_one_transfer():
    assert sum(file.stat().st_size for file in tracked() if file.exists()) < 26 * 2**20


def test_every_committed_row_names_its_command_and_environment():
    for file in (ROOT / "results").glob("*.jsonl"):
        for line in file.read_text().splitlines():
            row = json.loads(line)
            assert row["command"].startswith("python run_benchmark.py")
            environment = row["environment"]
            assert environment["commit"] not in ("", "unknown")  # a lent machine does not know it
            assert environment["versions"]["torch"]
            if row.get("failed"):
                continue
            assert row["total_s"]["n"] >= 3  # at full size; several rounds are pooled
            if row["lossless"] and not row["call"]["random_weights"]:  # those draw noise
                assert row["quality"]["psnr_db_worst"] is None or (
                    row["quality"]["psnr_db_worst"] > 35
                )


def test_every_committed_picture_belongs_to_a_row():
    folder = ROOT / "results"
    rows = [json.loads(x) for f in folder.glob("*.jsonl") for x in f.read_text().splitlines()]
    named = {row.get(key) for row in rows for key in ("pictures", "reference_pictures")} - {None}
    kept = {str(file.relative_to(folder)) for file in (folder / "pictures").iterdir()}
    assert named == kept


def test_every_file_is_one_reading():
    """Each file is one reading."""
    for file in tracked():
        if file.suffix == ".py":
            assert len(file.read_text().splitlines()) <= 350, file


def test_tests_on_a_gpu_name_their_checkpoint():
    """Without one it is FLUX.1-schnell there, of which no weight is on a lent machine."""
    for file in (ROOT / "tests").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "make_args"):
                continue
            words = {word.value for word in node.args if isinstance(word, ast.Constant)}
            named = "--ckpt" in words or any(isinstance(word, ast.Starred) for word in node.args)
            assert named or "cuda" not in words, f"{file.name}:{node.lineno}"

"""How a script ends: bad input, a missing package, Ctrl-C and SIGTERM, with a real child."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from utils.errors import UserError, run_script

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import subprocess, sys
from pathlib import Path
from utils.errors import run_script

class Told(subprocess.Popen):
    def communicate(self, *how, **named):  # from here on run() ends it
        Path("{pid}.new").write_text(str(self.pid))
        Path("{pid}.new").rename("{pid}")
        return super().communicate(*how, **named)

subprocess.Popen = Told

def main():
    try:
        subprocess.run(["sleep", "3600"])
    finally:
        Path("{cleaned}").write_text("yes")

run_script(main)
"""


def wait_for(what, seconds: float = 600):
    """Wait until what() is true, and give it."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def is_running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGTERM, 143, "terminated\n"), (signal.SIGINT, 130, "interrupted\n")],
)
def test_a_signal_ends_a_script_as_an_exception_does(tmp_path, number, code, said):
    pid, cleaned = tmp_path / "pid", tmp_path / "cleaned"
    words = [sys.executable, "-c", CHILD.format(pid=pid, cleaned=cleaned)]
    script = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(pid.exists)
    child = int(pid.read_text())
    assert is_running(child)
    script.send_signal(number)
    _, errors = script.communicate(timeout=600)
    assert (script.returncode, errors) == (code, said)
    assert cleaned.exists()
    wait_for(lambda: not is_running(child))


def test_what_an_interrupted_main_has_to_say_is_told(capsys):
    def main():
        raise KeyboardInterrupt("rows so far are in x.jsonl")

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as end:
            run_script(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted: rows so far are in x.jsonl\n"


@pytest.mark.parametrize(
    ("words", "package"),
    [
        (("gen_image.py",), "torch"),
        (("run_benchmark.py", "--ladder"), "torch"),
        (("run_benchmark.py", "--explain"), "torch"),
        (("-m", "utils.report"), "PIL"),
        (("-m", "extras.img2img", "--image", "tiny_flux/source.png"), "diffusers"),
    ],
    ids=" ".join,
)
def test_a_missing_package_is_one_line(words, package):
    command = [sys.executable, "-S", *words]  # without site-packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: {package} is not installed in {sys.executable}: pip install -r requirements.txt, "
        "or activate the environment that has it (. .venv/bin/activate)\n"
    )


@pytest.mark.parametrize("error", [ModuleNotFoundError("x", name="fa3_fwd"), ValueError("x")])
def test_what_is_no_fault_of_the_user_keeps_its_trace(error):
    def main():
        raise error

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(type(error)):
            run_script(main)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not isinstance(error, UserError)


def test_a_reader_that_leaves_early_gets_no_trace():
    words = f"{sys.executable} run_benchmark.py --explain --ckpt tiny-dev | head -n 1"
    done = subprocess.run(words, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr

"""The doctor's advice on stored packages, folders and checkpoints: provoked, explained, cured."""

import http.server
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from doctor_pieces import COMPILED, ROOT, TINY, Done, cured

from extras.doctor.advice import explain


def foreign_package(root: Path) -> None:
    """Store a package of this very run, but of another torch."""
    from conftest import make_args

    from utils import artifacts
    from utils.steps import compile

    args = make_args("--device", "cpu", *COMPILED, "--cache-dir", str(root))
    identity = artifacts.identity_of_run(args, compile.compiler_options(args))
    identity |= compile._about(args) | {"versions": identity["versions"] | {"torch": "1.0"}}
    artifacts.save(artifacts.open_cache(root), identity, {compile.STORED: b"code"}, {})


def test_package_of_another_run(apart, explained, tmp_path):
    foreign_package(tmp_path / "cache")
    flags = ("--device", "cpu", *COMPILED, "--cache-dir", tmp_path / "cache")
    done = apart("gen_image.py", *flags, "--use-cached-model")
    assert done.code == 2
    commands = explained(done)["package of another run"]
    assert "versions.torch: found 1.0" in explain(done.output)[0].cause
    assert explain(done.output)[0].leave_out == ("--use-cached-model",)
    assert commands[0] == "python gen_image.py ..."


@pytest.mark.slow  # compiles the bundled checkpoint
def test_package_of_another_run_cured(apart, tmp_path):
    foreign_package(tmp_path / "cache")
    flags = ("--device", "cpu", *COMPILED, "--cache-dir", tmp_path / "cache")
    assert apart("gen_image.py", *flags).code == 0
    assert apart("gen_image.py", *flags, "--use-cached-model").code == 0


def test_cache_directory_open_to_others(apart, explained, tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    look = ("-m", "utils.artifacts", "list", "--cache-dir", folder)
    command = explained(apart(*look))["cache directory open to others"][0]
    subprocess.run(shlex.split(command), check=True)
    assert apart(*look).code == 0


def test_cache_directory_cannot_be_used(apart, explained, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ("--device", "cpu", *COMPILED, "--cache-dir", tmp_path / "file" / "cache")
    done = apart("gen_image.py", *flags)
    assert done.code == 2
    (command,) = explained(done)["cache directory cannot be used"]
    elsewhere = cured(command, flags, **{"~/flux-packages": str(tmp_path / "other")})
    elsewhere += ["--compile_export_mode", "disabled"]
    assert apart(*elsewhere).code == 0


def test_disk_full(apart, explained, tmp_path):
    small = tmp_path / "small"
    small.mkdir(mode=0o700)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=0700", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        from utils import artifacts
        from utils.errors import UserError

        artifacts.save(small, {"component": "transformer"}, {".pt2": os.urandom(40_000)}, {})
        other = {"component": "decoder"}
        with pytest.raises(UserError) as refusal:
            artifacts.save(small, other, {".pt2": os.urandom(40_000)}, {})
        (command,) = explained(Done(2, f"error: {refusal.value}"))["disk full"]
        _, *argv = shlex.split(command.replace("5GB", "1kB"))
        assert apart(*argv, "--cache-dir", small).code == 0
        artifacts.save(small, other, {".pt2": os.urandom(40_000)}, {})
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.fixture
def gated_hub():
    """Serve a hub that answers only who says who they are: to others the model is gated."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self):
            known = self.headers.get("Authorization") == "Bearer hf_testtoken"
            content = (TINY / "model_index.json").read_bytes()
            self.send_response(200 if known else 403)
            if not known:
                self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", '"1"')
            self.send_header("Content-Length", str(len(content) if known else 0))
            self.end_headers()
            if known and self.command == "GET":
                self.wfile.write(content)

        do_GET = do_HEAD = answer

        def log_message(self, *words):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_gated_checkpoint(gated_hub, explained, tmp_path):
    repo = "black-forest-labs/FLUX.1-schnell"
    code = "import sys; from utils.checkpoints import resolve; from utils.errors import run_script;"
    code += "run_script(lambda: print(resolve(sys.argv[1]).kind))"

    def resolve(**env) -> Done:
        env |= {"HF_ENDPOINT": gated_hub, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
        env |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        words = [sys.executable, "-c", code, repo]
        done = subprocess.run(words, cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
        return Done(done.returncode, done.stdout + done.stderr)

    done = resolve()
    assert done.code == 2
    commands = explained(done)["gated checkpoint"]
    assert commands[0] == "hf auth login"
    assert resolve(HF_TOKEN="hf_testtoken") == Done(0, "schnell\n")  # as a login leaves it


@pytest.mark.parametrize(
    ("ckpt", "name"),
    [("nope", "unknown checkpoint"), ("someone/FLUX", "hub out of reach")],
)
def test_checkpoints_that_cannot_be_had(apart, explained, ckpt, name):
    flags = ("--device", "cpu", "--ckpt", ckpt)
    command = explained(apart("gen_image.py", *flags))[name][0]
    assert apart(*cured(command, flags)).code == 0


def test_damaged_checkpoint(apart, explained, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(TINY, copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    done = apart("gen_image.py", "--device", "cpu", "--ckpt", copy)
    assert done.code == 2
    command = explained(done)["damaged checkpoint"][0]
    _, *argv = shlex.split(command)
    examined = apart(*argv)
    assert examined.code == 1 and f"vae/{file.name}: cannot be read" in examined.output

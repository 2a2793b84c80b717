"""Every advice of the doctor: its failure provoked for real, explained, cured where possible."""

import http.server
import os
import shlex
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import doctor_pieces
import pytest
from doctor_pieces import ROOT, Done, without

from extras.doctor.advice import ADVICE, explain, last_line

TINY = ROOT / "tiny_flux" / "tiny-schnell"
COMPILED = ("--compile_export_mode", "compile")


@pytest.fixture
def run(tmp_path):
    """Give a function that runs a script in a process of its own."""

    def here(*argv, **around) -> Done:
        argv = [*argv, "--output-file", tmp_path / "x.png"] if argv[0] == "gen_image.py" else argv
        return doctor_pieces.run(*argv, folder=tmp_path, **around)

    return here


@pytest.fixture
def explained(tmp_path):
    """Give a function: what a failed run wrote -> the doctor's commands, by the advice's name."""

    def of(done: Done) -> dict[str, list[str]]:
        assert done.output.strip()
        code, found = doctor_pieces.explain(done.output, tmp_path)
        assert code == 0, done.output
        tested.update(one["name"] for one in found)
        return {one["name"]: one["commands"] for one in found}

    return of


tested: set[str] = set()


def cured(command: str, flags: tuple, **words: str) -> list[str]:
    """Write a command of the doctor's as argv: `...` becomes the failed run's flags."""
    for name, value in words.items():
        command = command.replace(name, value)
    python, *argv = shlex.split(command)
    assert python == "python"
    at = argv.index("...")
    return [*argv[:at], *map(str, flags), *argv[at + 1 :]]


# What a process does first to be as the failure needs it; at the top, so that they can be pickled


def on_a_hopper_gpu() -> None:
    from utils import hardware

    machine = hardware.Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139.0)
    hardware.detect = lambda device=None: machine


def without_diffusers() -> None:
    without("diffusers")


def on_a_hopper_gpu_without_torchao() -> None:
    on_a_hopper_gpu()
    without("torchao")


def with_torchvision_of_another_build() -> None:
    import torch

    # As torchvision/_meta_registrations.py does where its _C.so could not be loaded
    torch.library.register_fake("torchvision::nms")(lambda dets, scores, threshold: None)


def new_shape_in_a_timed_run() -> None:
    time_two_shapes(num_warmup=0)


def new_shape_in_the_warm_up() -> None:
    time_two_shapes(num_warmup=2)


def time_two_shapes(num_warmup: int) -> None:
    import torch

    from utils.benchmark_utils import measure

    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    compiled(torch.ones(2))
    measure(lambda: compiled(torch.ones(3)), "cpu", num_runs=1, num_warmup=num_warmup)


# The provocations


def test_out_of_memory(run, explained):
    call = ("gen_image.py", "--device", "cpu", "--num_inference_steps", "1")
    large = (*call, "--height", "1024", "--width", "1024")
    done = run(*large, room_mib=500)
    assert done.code == 1
    smaller = explained(done)["out of memory"][0]
    done = run(*cured(smaller, large[1:], HALF="128"), room_mib=500)
    assert done.code == 0, done.output[-2000:]


@pytest.mark.gpu
def test_out_of_gpu_memory(explained):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    with pytest.raises(torch.OutOfMemoryError) as failure:
        torch.empty(2**50, dtype=torch.uint8, device="cuda")
    assert "out of memory" in explained(Done(1, str(failure.value)))


def test_a_killed_process_is_out_of_memory(explained):
    shell = "sleep 60 & kill -9 $!; wait $!"  # the kernel's OOM killer sends the same signal
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 137
    assert "out of memory" in explained(Done(137, done.stderr))


@pytest.mark.slow  # describes all layers of FLUX.1-dev
def test_weights_larger_than_the_memory(run, explained):
    import psutil

    if psutil.virtual_memory().total > 31 * 2**30:
        pytest.skip("this machine has room for FLUX.1-dev's 31.4 GiB")
    flags = ("--ckpt", "black-forest-labs/FLUX.1-dev", "--random_weights", "--device", "cpu")
    command = explained(run("gen_image.py", *flags))["weights larger than the memory"][0]
    assert run(*cured(command, flags)).code == 0


def test_attention_kernel_not_installed(run, explained):
    flags = ("--random_weights",)
    found = explained(run("gen_image.py", *flags, before=on_a_hopper_gpu))
    install, without = found["attention kernel not installed"]
    assert install == "pip install fa3-fwd==0.0.3"
    done = run(*cured(without, flags), before=on_a_hopper_gpu)
    assert "on:  quant" in done.output and not any(
        one.name == "attention kernel not installed" for one in explain(done.output)
    )


def test_torchao_does_not_fit(run, explained):
    flags = ("--random_weights", "--disable_fa3")
    found = explained(run("gen_image.py", *flags, before=on_a_hopper_gpu_without_torchao))
    install, without = found["torchao does not fit"]
    pin = next(x for x in (ROOT / "requirements.txt").read_text().split() if "torchao" in x)
    assert install == f"pip install {pin}"
    done = run(*cured(without, flags), before=on_a_hopper_gpu_without_torchao)
    assert "off: quant                  --disable_quant" in done.output
    assert not any(one.name == "torchao does not fit" for one in explain(done.output))


def test_torchvision_does_not_fit(run, explained):
    done = run("gen_image.py", "--device", "cpu", before=with_torchvision_of_another_build)
    assert explained(done) == {"torchvision does not fit": ["pip uninstall -y torchvision"]}


def test_package_missing(run, explained):
    done = run("gen_image.py", "--device", "cpu", before=without_diffusers)
    assert done.code == 1
    assert explained(done) == {"package missing": ["pip install -r requirements.txt"]}


def test_black_picture(run, explained, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "damaged"
    shutil.copytree(TINY, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["transformer_blocks.0.ff.net.2.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    done = run("gen_image.py", "--device", "cpu", "--ckpt", copy)
    assert done.code == 0  # a picture was written; it is black
    check = explained(done)["black picture or NaN"][0]
    by_picture = run("-m", "extras.doctor", "--explain-error", tmp_path / "x.png")
    assert by_picture.code == 0 and by_picture.output.startswith("black picture or NaN: image 0")

    _, *argv = shlex.split(check.replace("CKPT", str(copy)))
    examined = run(*argv)
    assert examined.code == 1
    assert "transformer_blocks.0.ff.net.2.weight holds NaN" in examined.output
    shutil.copy(TINY / "transformer" / file.name, file)
    assert run(*argv).output.endswith("healthy\n") and run(*argv).code == 0
    again = run("gen_image.py", "--device", "cpu", "--ckpt", copy)
    assert again.code == 0 and not explain(again.output)


def test_recompilation_in_a_timed_run(run, explained):
    done = run("-m", "utils.errors", before=new_shape_in_a_timed_run)
    assert done.code == 1
    command = explained(done)["recompilation in a timed run"][0]
    assert command.endswith("--num_warmup 2")
    assert run("-m", "utils.errors", before=new_shape_in_the_warm_up).code == 0


def test_a_new_call_of_a_package_in_a_timed_run(explained):
    from utils.calls import only_known_calls, refuse_if_only_known

    with pytest.raises(RuntimeError) as refusal, only_known_calls():
        refuse_if_only_known("export_aoti: transformer: a call of a new kind")
    assert "recompilation in a timed run" in explained(Done(1, str(refusal.value)))


def foreign_package(root: Path) -> None:
    """Store a package of this very run, but of another torch."""
    from conftest import make_args

    from utils import artifacts
    from utils.steps import compile

    args = make_args("--device", "cpu", *COMPILED, "--cache-dir", str(root))
    identity = artifacts.identity_of_run(args, compile.compiler_options(args))
    identity |= compile._about(args) | {"versions": identity["versions"] | {"torch": "1.0"}}
    artifacts.save(artifacts.open_cache(root), identity, {compile.STORED: b"code"}, {})


def test_package_of_another_run(run, explained, tmp_path):
    foreign_package(tmp_path / "cache")
    flags = ("--device", "cpu", *COMPILED, "--cache-dir", tmp_path / "cache")
    done = run("gen_image.py", *flags, "--use-cached-model")
    assert done.code == 2
    commands = explained(done)["package of another run"]
    assert "versions.torch: found 1.0" in explain(done.output)[0].cause
    assert explain(done.output)[0].leave_out == ("--use-cached-model",)
    assert commands[0] == "python gen_image.py ..."


@pytest.mark.slow  # compiles the bundled checkpoint
def test_package_of_another_run_cured(run, tmp_path):
    foreign_package(tmp_path / "cache")
    flags = ("--device", "cpu", *COMPILED, "--cache-dir", tmp_path / "cache")
    assert run("gen_image.py", *flags).code == 0
    assert run("gen_image.py", *flags, "--use-cached-model").code == 0


def test_cache_directory_open_to_others(run, explained, tmp_path):
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    look = ("-m", "utils.artifacts", "list", "--cache-dir", folder)
    command = explained(run(*look))["cache directory open to others"][0]
    subprocess.run(shlex.split(command), check=True)
    assert run(*look).code == 0


def test_cache_directory_cannot_be_used(run, explained, tmp_path):
    (tmp_path / "file").write_text("")
    flags = ("--device", "cpu", *COMPILED, "--cache-dir", tmp_path / "file" / "cache")
    done = run("gen_image.py", *flags)
    assert done.code == 2
    (command,) = explained(done)["cache directory cannot be used"]
    elsewhere = cured(command, flags, **{"~/flux-packages": str(tmp_path / "other")})
    elsewhere += ["--compile_export_mode", "disabled"]
    assert run(*elsewhere).code == 0


def test_disk_full(run, explained, tmp_path):
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
        assert run(*argv, "--cache-dir", small).code == 0
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
def test_checkpoints_that_cannot_be_had(run, explained, ckpt, name):
    flags = ("--device", "cpu", "--ckpt", ckpt)
    command = explained(run("gen_image.py", *flags))[name][0]
    assert run(*cured(command, flags)).code == 0


def test_damaged_checkpoint(run, explained, tmp_path):
    copy = tmp_path / "damaged"
    shutil.copytree(TINY, copy)
    file = copy / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    done = run("gen_image.py", "--device", "cpu", "--ckpt", copy)
    assert done.code == 2
    command = explained(done)["damaged checkpoint"][0]
    _, *argv = shlex.split(command)
    examined = run(*argv)
    assert examined.code == 1 and f"vae/{file.name}: cannot be read" in examined.output


def test_no_gpu_found(run, explained):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags = ("--device", "cuda")
    command = explained(run("gen_image.py", *flags))["no GPU found"][1]
    assert run(*cured(command, flags)).code == 0


def test_no_compiler(run, explained):
    flags = ("--device", "cpu", *COMPILED)
    env = {"CXX": "no-such-compiler"}
    command = explained(run("gen_image.py", *flags, env=env))["no C++ compiler"][1]
    assert run(*cured(command, flags), env=env).code == 0


def test_every_advice_was_provoked(request):
    """Last in the file: what no test above provoked is advice that nobody has seen to be right."""
    asked = {item.function.__name__ for item in request.session.items}
    apart = ("slow", "gpu")
    own = {
        name
        for name, test in globals().items()
        if name.startswith("test_")
        and not any(mark.name in apart for mark in getattr(test, "pytestmark", ()))
    }
    if not own <= asked:
        pytest.skip("only a part of this file was asked for")
    elsewhere = {"disk full", "weights larger than the memory", "no GPU found"}  # or slow
    assert {one.name for one in ADVICE} - tested <= elsewhere


def test_an_unknown_error_is_not_explained_away(tmp_path):
    done = Done(1, "Traceback (most recent call last):\nZeroDivisionError: division by zero")
    assert doctor_pieces.explain(done.output, tmp_path) == (1, [])
    (tmp_path / "log").write_text(done.output)
    words = ("-m", "extras.doctor", "--explain-error", tmp_path / "log")
    told = doctor_pieces.run(*words, folder=tmp_path)
    assert told.code == 1
    assert told.output.startswith("not known:") and "ZeroDivisionError" in told.output


def test_no_token_leaves_the_doctor():
    text = "error: --ckpt hf_abcdefghijklmnop: unknown checkpoint\nhf_abcdefghijklmnop"
    assert "abcdefgh" not in f"{explain(text)} {last_line(text)}"


def test_a_log_that_is_not_there_is_one_line(tmp_path):
    words = ("-m", "extras.doctor", "--explain-error", tmp_path / "none")
    told = doctor_pieces.run(*words, folder=tmp_path)
    assert told.code == 2 and "cannot be read (No such file" in told.output

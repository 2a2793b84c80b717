"""Every advice of the doctor: its failure provoked for real, explained, cured where possible."""

import shlex
import shutil
import subprocess
from pathlib import Path

import doctor_pieces
import pytest
from doctor_pieces import COMPILED, ROOT, TINY, Done, cured, without

from extras.doctor.advice import ADVICE, explain, last_line

# What a process does first to be as the failure needs it; at the top, so that they can be pickled


def on_a_hopper_gpu() -> None:
    from utils import hardware
    from utils.steps import memory

    machine = hardware.Machine("cuda", "NVIDIA H200", (9, 0), memory_gib=139.0)
    hardware.detect = lambda device=None: machine
    memory.free_bytes = lambda device: 139 * 2**30


def without_diffusers() -> None:
    without("diffusers")


def on_a_hopper_gpu_with_an_old_torchao() -> None:
    import torchao.quantization

    on_a_hopper_gpu()
    del torchao.quantization.Float8MMConfig  # as releases before it


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


ROOM_MIB = 800  # 550 do not suffice for tiles of 1280x1280, 1000 not for the whole decoder


@pytest.mark.slow  # five runs, one of them of 1280x1280
def test_out_of_memory(apart, explained):
    call = ("gen_image.py", "--device", "cpu", "--num_inference_steps", "1")
    large = (*call, "--height", "1280", "--width", "1280")
    done = apart(*large, room_mib=ROOM_MIB)
    assert done.code == 2
    found = explained(done)
    done = apart(*cured(found["out of memory"][0], large[1:], HALF="128"), room_mib=ROOM_MIB)
    assert done.code == 0, done.output[-2000:]
    (smaller_tier,) = found["a smaller memory tier"]
    python, *argv = shlex.split(smaller_tier)
    assert (python, *argv[: len(large)]) == ("python", *large)
    assert argv[-2:] == ["--memory", "tiled"]
    assert apart(*argv, room_mib=ROOM_MIB).code == 0  # the decoder's tiles fit


def test_no_memory_tier_is_small_enough(apart, explained):
    call = ("gen_image.py", "--device", "cpu", "--num_inference_steps", "1")
    tight = (*call, "--memory", "0.1GiB")
    _, anyway = explained(apart(*tight))["no memory tier is small enough"]
    assert apart(*cured(anyway, tight[1:])).code == 0


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
def test_weights_larger_than_the_memory(apart, explained):
    import psutil

    if psutil.virtual_memory().total > 31 * 2**30:
        pytest.skip("this machine has room for FLUX.1-dev's 31.4 GiB")
    flags = ("--ckpt", "black-forest-labs/FLUX.1-dev", "--random_weights", "--device", "cpu")
    command = explained(apart("gen_image.py", *flags))["weights larger than the memory"][0]
    assert apart(*cured(command, flags)).code == 0


def test_attention_kernel_not_installed(apart, explained):
    flags = ("--ckpt", "tiny-schnell")
    found = explained(apart("gen_image.py", *flags, before=on_a_hopper_gpu))
    install, without = found["attention kernel not installed"]
    assert install == "pip install fa3-fwd==0.0.3"
    done = apart(*cured(without, flags), before=on_a_hopper_gpu)
    assert "on:  quant" in done.output and not any(
        one.name == "attention kernel not installed" for one in explain(done.output)
    )


def test_torchao_does_not_fit(apart, explained):
    flags = ("--ckpt", "tiny-schnell", "--disable_fa3")
    found = explained(apart("gen_image.py", *flags, before=on_a_hopper_gpu_with_an_old_torchao))
    install, without = found["torchao does not fit"]
    pin = next(x for x in (ROOT / "requirements.txt").read_text().split() if "torchao" in x)
    assert install == f"pip install {pin}"
    done = apart(*cured(without, flags), before=on_a_hopper_gpu_with_an_old_torchao)
    assert "off: quant                  --disable_quant" in done.output
    assert not any(one.name == "torchao does not fit" for one in explain(done.output))


def test_torchvision_does_not_fit(apart, explained):
    done = apart("gen_image.py", "--device", "cpu", before=with_torchvision_of_another_build)
    assert explained(done) == {"torchvision does not fit": ["pip uninstall -y torchvision"]}


def test_package_missing(apart, explained):
    done = apart("gen_image.py", "--device", "cpu", before=without_diffusers)
    assert done.code == 2
    assert explained(done) == {"package missing": ["pip install -r requirements.txt"]}


def test_black_picture(apart, explained, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "damaged"
    shutil.copytree(TINY, copy)
    file = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["transformer_blocks.0.ff.net.2.weight"][0, 0] = torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    done = apart("gen_image.py", "--device", "cpu", "--ckpt", copy)
    assert done.code == 0  # a picture was written; it is black
    check = explained(done)["black picture or NaN"][0]
    by_picture = apart("-m", "extras.doctor", "--explain-error", tmp_path / "x.png")
    assert by_picture.code == 0 and by_picture.output.startswith("black picture or NaN: image 0")

    _, *argv = shlex.split(check.replace("CKPT", str(copy)))
    examined = apart(*argv)
    assert examined.code == 1
    assert "transformer_blocks.0.ff.net.2.weight holds NaN" in examined.output
    shutil.copy(TINY / "transformer" / file.name, file)
    examined = apart(*argv)
    assert examined.code == 0 and examined.output.endswith("healthy\n")
    again = apart("gen_image.py", "--device", "cpu", "--ckpt", copy)
    assert again.code == 0 and not explain(again.output)


def test_recompilation_in_a_timed_run(apart, explained):
    done = apart("-m", "utils.errors", before=new_shape_in_a_timed_run)
    assert done.code == 1
    command = explained(done)["recompilation in a timed run"][0]
    assert command.endswith("--num_warmup 2")
    assert apart("-m", "utils.errors", before=new_shape_in_the_warm_up).code == 0


def test_a_new_call_of_a_package_in_a_timed_run(explained):
    from utils.calls import only_known_calls, refuse_if_only_known

    with pytest.raises(RuntimeError) as refusal, only_known_calls():
        refuse_if_only_known("export_aoti: transformer: a call of a new kind")
    assert "recompilation in a timed run" in explained(Done(1, str(refusal.value)))


def test_no_gpu_found(apart, explained):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    flags = ("--device", "cuda")
    command = explained(apart("gen_image.py", *flags))["no GPU found"][1]
    assert apart(*cured(command, flags)).code == 0


def test_no_compiler(apart, explained):
    flags = ("--device", "cpu", *COMPILED)
    env = {"CXX": "no-such-compiler"}
    command = explained(apart("gen_image.py", *flags, env=env))["no C++ compiler"][1]
    assert apart(*cured(command, flags), env=env).code == 0


def test_every_advice_is_provoked():
    """What no test asks for by its name is advice that nobody has seen to be right."""
    texts = [file.read_text() for file in Path(__file__).parent.glob("test_doctor_advice*.py")]
    for advice in ADVICE:
        assert any(f'"{advice.name}"' in text for text in texts), advice.name


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

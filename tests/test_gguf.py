"""GGUF transformers: types, both modes, what goes with them, and files that are none."""

import shutil
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from conftest import make_args, optimized
from diffusers.quantizers.gguf.utils import GGUFLinear, dequantize_gguf_tensor
from test_cli import script

from extras import write_gguf
from extras.write_gguf import transformer_folder, write
from tests import k_quants
from tests.k_quants import KINDS, encode
from utils import quality
from utils.artifacts import file_digest, identity_of_run
from utils.errors import UserError
from utils.gguf_file import read_header
from utils.hardware import Machine
from utils.memory import weights_gib
from utils.pipeline_utils import load_pipeline
from utils.steps.gguf import local_file

TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_0", "Q4_0", "Q4_K", "Q3_K")
FOLDER = transformer_folder("tiny-schnell")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Give a function: type -> the trained checkpoint's transformer as a file of that type."""
    folder, made = tmp_path_factory.mktemp("gguf"), {}

    def file(kind: str):
        if kind not in made:
            made[kind] = folder / f"{kind}.gguf"
            write(FOLDER, made[kind], kind, **({"encode": encode} if kind in KINDS else {}))
        return made[kind]

    return file


@pytest.fixture(scope="module")
def runs(files):
    """Give a function: type, mode -> pipeline, arguments and what they draw."""
    made = {}

    def run(kind: str, mode: str):
        if (kind, mode) not in made:
            # Unfused, as compressed weights are: the same sums in the same order
            flags = ("--gguf_file", str(files(kind)), "--gguf_mode", mode)
            flags += ("--memory", "full", "--disable_fused_projections")
            pipeline, args = optimized(*flags)
            made[kind, mode] = pipeline, args, quality.run(pipeline, args)
        return made[kind, mode]

    return run


def step_sizes(x: np.ndarray, kind: str) -> np.ndarray:
    """Give the distance of two neighbouring numbers in each part, as the format has it."""
    parts = x.reshape(-1, 16 if kind in ("Q6_K", "Q3_K") else 32)
    if kind in ("Q6_K", "Q3_K"):
        return np.abs(parts).max(1) / {"Q6_K": 32, "Q3_K": 4}[kind]
    return (parts.max(1) - np.minimum(parts.min(1), 0)) / {"Q5_K": 31, "Q4_K": 15}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_k_quants_decode_to_what_was_packed(kind):
    x = np.random.default_rng(3).normal(size=(24, 1024)).astype(np.float32)
    x[5] = 0
    found = gguf.quants.dequantize(encode(x, kind), gguf.GGMLQuantizationType[kind])
    assert not found[5].any()
    # Rounding to steps of s has a variance of s^2 / 12; rounded scales (6 or 8 bits) add to it
    expected = np.sqrt((step_sizes(x, kind) ** 2).mean() / 12)
    assert 0.8 * expected < np.sqrt(((found - x) ** 2).mean()) < 1.3 * expected


def test_k_quants_say_what_they_take(capsys):
    for words, code in ((["--help"], 0), (["tiny-schnell", "Q9_K", "x.gguf"], 2), ([], 2)):
        with pytest.raises(SystemExit) as done:
            k_quants.main(words)
        assert done.value.code == code
    said = capsys.readouterr()
    assert "Q6_K,Q5_K,Q4_K,Q3_K" in said.out and "invalid choice: 'Q9_K'" in said.err


@pytest.mark.parametrize("kind", TYPES)
def test_both_modes_hold_what_ggufs_own_decoder_reads_and_draw_the_same(kind, files, runs):
    compressed, dense = (runs(kind, mode) for mode in ("compressed", "dequantize"))
    before, after = (dict(run[0].transformer.named_modules()) for run in (compressed, dense))
    quantised = 0
    for tensor in gguf.GGUFReader(files(kind)).tensors:
        if tensor.tensor_type.name != kind:
            continue
        name = tensor.name.removesuffix(".weight")
        assert type(before[name]) is GGUFLinear and before[name].weight.dtype == torch.uint8
        expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        decoded = dequantize_gguf_tensor(before[name].weight).float()
        # In fp16, 2^-11 an operation: d * scale, * q and the minimum's product reach twice the
        # largest weight (2 + 2 + 1), their difference once
        assert (decoded - expected).abs().max() <= 6 * 2.0**-11 * expected.abs().max()
        assert torch.equal(after[name].weight.float(), decoded.bfloat16().float())
        quantised += 1
    assert quantised == read_header(files(kind)).types[kind] > 20
    assert not any(type(module) is GGUFLinear for module in after.values())
    assert torch.equal(compressed[2].latents, dense[2].latents)


def test_fewer_bits_are_smaller_and_further_from_the_checkpoint(runs, reference):
    exact = reference().latents
    by_bits = ("Q8_0", "Q6_K", "Q5_1", "Q4_K", "Q3_K")
    errors = [quality.relative_l2(runs(k, "compressed")[2].latents, exact) for k in by_bits]
    assert errors == sorted(errors)
    sizes = [weights_gib(runs(kind, "compressed")[0]) for kind in by_bits]
    assert sizes == sorted(sizes, reverse=True)
    assert quality.compare(runs("Q8_0", "compressed")[2], reference())["psnr_db_worst"] > 30


def test_bf16_as_gguf_is_the_checkpoint(files, reference):
    pipeline, args = optimized("--gguf_file", str(files("BF16")), "--disable_fused_projections")
    assert args.plan["gguf"].lossless
    assert torch.equal(quality.run(pipeline, args).latents, reference().latents)


def test_what_the_other_steps_do_with_a_file(files, runs, float8_on_cpu):
    name = str(files("Q4_0"))
    plan = make_args("--device", "cpu", "--gguf_file", name).plan
    assert plan["fused_projections"].settings == {"modules": "VAE"}
    assert "--gguf_mode dequantize" in plan["quant"].reason
    pipeline, args = optimized("--gguf_file", name)
    attention = pipeline.transformer.transformer_blocks[0].attn
    assert hasattr(attention, "to_q") and not hasattr(attention, "to_qkv")
    assert hasattr(pipeline.vae.decoder.mid_block.attentions[0], "to_qkv")
    dense, args = optimized("--gguf_file", name, "--gguf_mode", "dequantize")
    assert args.plan["quant"].is_on
    attention = dense.transformer.transformer_blocks[0].attn
    assert "Float8" in type(attention.to_qkv.weight).__name__
    found, plain = quality.run(dense, args), runs("Q4_0", "compressed")[2]
    assert 0 < quality.relative_l2(found.latents, plain.latents) < 0.15  # float8 on top


def test_modulation_once_runs_on_compressed_weights(runs, files):
    flags = ("--gguf_file", str(files("Q8_0")), "--modulation_once")
    pipeline, args = optimized(*flags)
    found, plain = quality.run(pipeline, args), runs("Q8_0", "compressed")[2]
    assert quality.relative_l2(found.latents, plain.latents) < 0.02


def test_steps_stay_the_checkpoints_own_whatever_the_type(files):
    for kind in ("Q8_0", "Q6_K"):  # suggestions are documented, not applied
        assert make_args("--gguf_file", str(files(kind))).num_inference_steps == 4


def test_stored_packages_belong_to_the_files_contents(files, tmp_path):
    def identity(path):
        args = make_args("--gguf_file", str(path), "--cache-dir", str(tmp_path / "cache"))
        return identity_of_run(args, {})["checkpoint"]

    for folder in ("other", "cache"):
        (tmp_path / folder).mkdir(mode=0o700)
    copy = tmp_path / "other" / "Q8_0.gguf"
    shutil.copy(files("Q8_0"), copy)
    before = identity(copy)
    assert before == identity(files("Q8_0"))
    with copy.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert file_digest(copy, tmp_path / "cache") not in before["gguf"]
    assert identity(copy) != before


def broken(files, tmp_path, how: str):
    """Make a file that is wrong in one way."""
    path = tmp_path / "x.gguf"
    data = files("Q8_0").read_bytes()
    if how == "missing":
        return path
    if how == "cut":
        data = data[: len(data) // 2]
    elif how == "cut in the header":
        data = data[:900]
    elif how == "empty":
        data = b""
    elif how == "safetensors":
        data = (FOLDER / "diffusion_pytorch_model.safetensors").read_bytes()[:4096]
    elif how == "huge counts":
        data = data[:8] + struct.pack("<QQ", 2**60, 2**60) + data[24:]
    elif how == "llama":
        data = data.replace(struct.pack("<Q", 4) + b"flux", struct.pack("<Q", 4) + b"bert", 1)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "no such file"),
        ("cut", "damaged or cut off"),
        ("cut in the header", "damaged or cut off"),
        ("empty", "not a GGUF file"),
        ("safetensors", "not a GGUF file"),
        ("huge counts", "damaged or cut off"),
        ("llama", "architecture 'bert', expected 'flux'"),
    ],
)
def test_a_wrong_file_is_one_line(how, says, files, tmp_path):
    with pytest.raises(UserError) as error:
        make_args("--gguf_file", str(broken(files, tmp_path, how)))
    (line,) = str(error.value).splitlines()
    assert line.startswith("--gguf_file ") and says in line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--ckpt", "tiny-dev"), "guidance_embedder.linear_1.weight: found nothing, expected (256"),
        (("--fused_kernels",), "--gguf_mode compressed"),
        (("--compile_export_mode", "export_aoti"), "--gguf_mode dequantize"),
        (("--gguf_mode", "lossy"), "invalid choice"),
    ],
)
def test_what_does_not_go_together_is_one_line(flags, says, files, as_machine, capsys):
    from test_cli import HOPPER

    as_machine(HOPPER)
    with pytest.raises((UserError, SystemExit)) as error:
        make_args("--gguf_file", str(files("Q8_0")), "--ckpt", "tiny-schnell", *flags)
    lines = (str(error.value) + capsys.readouterr().err).splitlines()
    assert any(says in line for line in lines), lines


def test_a_mode_without_a_file_and_an_unreachable_hub():
    with pytest.raises(UserError, match="--gguf_mode compressed: expected together"):
        make_args("--gguf_mode", "compressed")
    with pytest.raises(UserError) as error:
        make_args("--gguf_file", "nobody/none-gguf/flux1-schnell-Q4_0.gguf")
    (line,) = str(error.value).splitlines()
    assert line.startswith("--gguf_file nobody/none-gguf: not in the local cache")


def test_the_documented_commands_run(tmp_path, monkeypatch, capsys):
    file, picture = tmp_path / "tiny.gguf", tmp_path / "x.png"
    words = ["write_gguf", "--type", "Q5_1", "--output-file", str(file)]
    monkeypatch.setattr(sys, "argv", words)
    write_gguf.main()
    assert "34 Q5_1" in capsys.readouterr().out
    assert read_header(file).types == {"Q5_1": 34}
    done = script("gen_image.py", "--gguf_file", str(file), "--output-file", str(picture))
    assert done.returncode == 0, done.stderr
    assert "types=Q5_1:34" in done.stdout and picture.stat().st_size > 1000


def test_the_writer_refuses_in_one_line(tmp_path, monkeypatch):
    for name, expected in (
        ("x.bin", r"expected a name ending in \.gguf"),
        (str(tmp_path / "no" / "x.gguf"), "no does not exist"),
        ("/proc/x.gguf", "the folder /proc cannot be written"),
    ):
        monkeypatch.setattr(sys, "argv", ["write_gguf", "--output-file", name])
        with pytest.raises(UserError, match=expected):
            write_gguf.main()
    with pytest.raises(UserError, match=r"found no .*safetensors in"):  # nor an empty file
        write(tmp_path, tmp_path / "x.gguf", "Q8_0")
    assert not list(tmp_path.iterdir())
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(UserError, match=r"found no .*safetensors in"):
        write(tmp_path, tmp_path / "x.gguf", "Q8_0")
    (tmp_path / "folder.safetensors").rmdir()
    (tmp_path / "cut.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match=r"cut\.safetensors cannot be read \("):
        write(tmp_path, tmp_path / "x.gguf", "Q8_0")
    assert [path.name for path in tmp_path.iterdir()] == ["cut.safetensors"]


def test_a_home_folder_is_no_repository(tmp_path, monkeypatch):
    """A shell leaves `--gguf_file=~/x.gguf` as it is; two slashes are a name on the hub."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_file("~/models/x.gguf") == tmp_path / "models" / "x.gguf"
    with pytest.raises(UserError, match="no such file"):
        read_header(local_file("~/models/x.gguf"))


def test_the_checkpoints_own_transformer_is_not_loaded(files):
    args = make_args("--device", "cpu", "--gguf_file", str(files("Q8_0")))
    assert load_pipeline(args).transformer is None


def test_the_default_on_cuda_is_compile_since_bytes_cannot_be_exported(files, as_machine):
    as_machine(Machine("cuda", "RTX 3090", (8, 6), memory_gib=24.0))
    flags = ("--gguf_file", str(files("Q4_0")), "--ckpt", "tiny-schnell")
    assert make_args(*flags).compile_export_mode == "compile"
    assert make_args(*flags, "--gguf_mode", "dequantize").compile_export_mode == "export_aoti"


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["blocks", "full"])
def test_compiled_blocks_decode_like_eager_ones(scope, runs, files, tmp_path):
    flags = ("--compile_export_mode", "compile", "--compile_scope", scope)
    name = ("--gguf_file", str(files("Q4_K")), "--cache-dir", str(tmp_path / "cache"))
    pipeline, args = optimized(*name, *flags)
    found, plain = quality.run(pipeline, args), runs("Q4_K", "compressed")[2]
    assert quality.relative_l2(found.latents, plain.latents) < 0.02

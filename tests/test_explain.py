"""--explain: what bounds what, on which machine, without a model."""

import subprocess
import sys

import pytest

from tests.conftest import make_args
from utils.architecture import DEV, KONTEXT
from utils.errors import UserError
from utils.explain import explain


def test_explain_says_what_bounds_what():
    here = ("--device", "cpu")
    text = explain(make_args("--ckpt", DEV, *here, checks=False))  # not prepared
    assert "NVIDIA H200 (by default" in text and "float8: block linear layers, attention" in text
    assert "28 times a call: 11.9 G parameters, 74.4 T FLOP" in text
    line = next(x for x in text.splitlines() if "img AdaLN" in x).split()
    assert "memory" in line and line[line.index("AdaLN") + 1] == "19"
    plain = explain(make_args("--ckpt", DEV, "--disable_quant", *here, checks=False), "l40s")
    assert (
        "NVIDIA L40S (as named)" in plain and "float8" not in plain and " fp8 " not in plain[500:]
    )
    a100 = explain(make_args(*here, checks=False), "A100")
    assert "upsample + conv" not in a100
    assert "upsample + conv" in explain(
        make_args(*here, "--subpixel_upsampling", "phases", checks=False), "A100"
    )
    assert "FLUX.1-schnell, schnell" in a100 and "precision   bf16\n" in a100
    preset = ("--acceleration", "hyper-8:of_the_hub.safetensors")
    assert "1 image(s), 8 evaluations" in explain(make_args("--ckpt", DEV, *preset, checks=False))
    kontext = explain(make_args("--ckpt", KONTEXT, *here, checks=False))
    assert "4096 + 4096 (--image of 1024x1024, assumed)" in kontext and "VAE ENCODER" in kontext
    tiny = explain(make_args("--ckpt", "tiny-dev", "--sigmas", "1,0.5", *here, checks=False))
    assert "64 image, 512 text" in tiny and "1 image(s), 2 evaluations" in tiny


def test_explain_refuses_what_cannot_run():
    for flags, machine, words in (
        ((), "H300", "--explain H300: unknown machine"),
        (("--height", "100"), "", "not divisible by 16"),
        (("--sigmas", "1,x"), "", "--sigmas 1,x: expected default"),
        (("--true_cfg_scale", "2"), "", "has no effect without --negative_prompt"),
        (("--step_mask", "junk"), "", "--step_mask junk: found 'junk', expected slow"),
        (("--attention_backend", "fa3"), "L20", "--attention_backend fa3: found NVIDIA L20"),
    ):
        with pytest.raises(UserError, match=words):
            explain(make_args("--device", "cpu", *flags, checks=False), machine)


def test_explain_builds_no_model():
    code = (
        "import sys; from utils.benchmark_utils import create_parser; from utils.explain import *\n"
        f"explain(create_parser().parse_args(['--ckpt', '{DEV}']), 'H200')\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)

"""The committed qualities of lossy formats: complete, in the docs as measured, and reproducible."""

import json
from pathlib import Path

import pytest
import torch

from tests import emulation, lossy_pictures
from utils import reference
from utils.kernels import flash_attention as fa
from utils.pipeline_utils import load_pipeline
from utils.prompts import quality_prompts

PAGE = Path(__file__).parents[1] / "docs/performance.md"


def rows() -> list[dict]:
    return [json.loads(line) for line in lossy_pictures.RESULTS.read_text().splitlines()]


def test_every_format_of_every_checkpoint_once():
    found = [(row["ckpt"], row["format"]) for row in rows()]
    assert len(found) == len(set(found))
    names = lossy_pictures.FORMATS | lossy_pictures.VARIANTS
    assert set(found) == {(ckpt, name) for ckpt in lossy_pictures.CKPTS for name in names}


@pytest.mark.parametrize("names", [lossy_pictures.FORMATS, lossy_pictures.VARIANTS])
def test_the_page_has_the_table(names):
    table = lossy_pictures.table(rows(), names)
    page = [line.strip() for line in PAGE.read_text().splitlines()]
    absent = [line for line in table.splitlines() if line not in page]
    assert not absent, "run: python -m tests.lossy_pictures --table [--variants]"


@pytest.mark.parametrize("fp8", [False, True])
def test_softmax_is_rounded_to_float8_where_queries_and_keys_are(fp8):
    """Two keys, the second one's score -1.125: of 256 times its weight, 83.1, float8 makes 80."""
    k = torch.tensor([0.0, -4.5])[None, :, None, None].expand(1, 2, 1, 16) * torch.eye(1, 16)
    q, v = torch.eye(1, 16)[None, :, None], torch.tensor([0.0, 1.0])[None, :, None, None]
    given = [x.to(fa.E4M3 if fp8 else torch.bfloat16) for x in (q, k, v.expand(k.shape))]
    one = torch.ones(1, 1) if fp8 else None
    with emulation.softmax():
        found = fa.flash_attn_func(*given, one, one, one)
    weight = torch.tensor(-1.125).exp()
    expected = (80 / 256 if fp8 else weight) / (1 + weight)
    torch.testing.assert_close(found, torch.full_like(found, expected))


def test_turned_queries_and_keys_lose_less_again():
    """Two of the eight pictures, measured anew."""
    args = lossy_pictures.settled("tiny-schnell")
    prompts = quality_prompts(args)[:2]
    kept, _ = reference.load_or_make(load_pipeline(args), args, prompts, with_fp32=True)
    names = ("float8 attention", "float8 attention, rotated")
    plain, rotated = (
        lossy_pictures.measure(args, prompts, lossy_pictures.FORMATS[name], kept) for name in names
    )
    assert rotated["latents_relative_l2"] < 0.75 * plain["latents_relative_l2"]
    (row,) = (r for r in rows() if (r["ckpt"], r["format"]) == ("tiny-schnell", names[1]))
    again = rotated["latents_relative_l2"] / row["quality"]["latents_relative_l2"]
    assert 0.5 < again < 2  # of two pictures instead of eight

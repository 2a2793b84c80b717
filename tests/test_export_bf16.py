"""Packages of a bf16 pipeline, on a GPU inside of CUDA graphs."""

import pytest
import torch
from aoti_pieces import generate, make_args, make_pipeline
from flux_pieces import relative_error

from utils.steps import export_aoti


@pytest.fixture(autouse=True)
def without_encoders(monkeypatch):
    monkeypatch.setattr("utils.pipeline_utils.generate", generate)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_pipeline(tmp_path):
    from utils.cudagraph import CUDAGraphWrapper
    from utils.hardware import detect

    pipeline = make_pipeline(torch.bfloat16).to("cuda")
    args = make_args(tmp_path / "cache", dtype=torch.bfloat16, machine=detect("cuda"))
    eager = generate(pipeline, args, output_type="latent")
    export_aoti.apply(pipeline, args)
    (runner,) = pipeline.transformer.forward.runners.values()
    assert isinstance(runner.run, CUDAGraphWrapper)
    first = generate(pipeline, args, output_type="latent")
    assert relative_error(first, eager) < 0.02
    assert torch.equal(generate(pipeline, args, output_type="latent"), first)
    again = make_pipeline(torch.bfloat16).to("cuda")
    args.use_cached_model = True
    export_aoti.apply(again, args)
    assert torch.equal(generate(again, args, output_type="latent"), first)


@pytest.mark.slow
def test_bf16_pipeline(tmp_path):
    pipeline = make_pipeline(torch.bfloat16)
    args = make_args(tmp_path / "cache", dtype=torch.bfloat16)
    eager = generate(pipeline, args, output_type="latent")
    export_aoti.apply(pipeline, args)
    assert relative_error(generate(pipeline, args, output_type="latent"), eager) < 0.02

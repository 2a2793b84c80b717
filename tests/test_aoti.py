"""Single components through export, compilation and the store: float8, lifted tensors, shells."""

import pytest
import torch
from aoti_pieces import make_transformer, packaged, quantise, transformer_call
from flux_pieces import relative_error

from utils import aoti, artifacts


def test_shell_shares_every_tensor_and_leaves_the_module_alone():
    model = make_transformer(torch.bfloat16)
    before = {name: type(module) for name, module in model.named_modules()}
    weights = aoti.Component("transformer", model).weights()
    live = dict(model.named_parameters())
    assert weights.keys() == live.keys()
    assert all(weights[name].data_ptr() == live[name].data_ptr() for name in live)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_package_for_a_gpu_is_linked_with_the_toolkits_stub_of_libcuda(tmp_path, monkeypatch):
    from torch._inductor import cpp_builder
    from torch.utils import cpp_extension

    stubs = tmp_path / "lib64" / "stubs"
    stubs.mkdir(parents=True)
    (tmp_path / "lib64" / "libcudart_static.a").touch()
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))  # as torch finds it by nvcc
    monkeypatch.setenv("CUDA_HOME", "")  # to be put back
    monkeypatch.delenv("CUDA_HOME")
    aoti.name_toolkit()
    *_, folders, libraries, _ = cpp_builder.get_cpp_torch_device_options("cuda", aot_mode=True)
    assert "cuda" in libraries and str(stubs) in folders


@pytest.mark.slow
def test_float8_rows_with_guidance_in_bf16(tmp_path):
    from torchao.quantization import PerRow

    model = make_transformer(torch.bfloat16, guidance=True)
    quantise(model, PerRow())
    call = {
        name: value.bfloat16() if isinstance(value, torch.Tensor) else value
        for name, value in transformer_call(guidance=torch.tensor([4.0])).items()
    }  # 4.0: bf16 rounds 3.5 * 1000
    with torch.no_grad():
        eager = model(**call)[0]
    forward, package = packaged("transformer", model, call, tmp_path)
    assert relative_error(forward(**call)[0], eager) < 0.02  # bf16: Inductor keeps fp32 inside
    other = call | {"guidance": torch.tensor([1.0], dtype=torch.bfloat16)}
    assert relative_error(forward(**other)[0], eager) > 1e-4  # an input, not a constant
    with pytest.raises(IndexError):  # it asks for another package
        forward(**(call | {"guidance": None}))
    kinds = {spec[1] for spec in package.constants.values()}
    assert kinds == {"torch.bfloat16", "torch.float8_e4m3fn", "torch.float32"}
    assert type(model.transformer_blocks[0].attn.to_q) is torch.nn.Linear

    other_model = make_transformer(torch.bfloat16, seed=3, guidance=True)
    quantise(other_model, PerRow())
    with torch.no_grad():
        truth = other_model(**call)[0]
    component = aoti.Component("transformer", other_model)
    run = aoti.attach(component, package.files, package.constants)
    component.inputs = component.bind((), call)[0]
    found = aoti.PackageForward(component, lambda _: run)(**call)[0]
    assert relative_error(found, truth) < 0.02


def test_scales_per_tensor_are_part_of_the_identity():
    """One-element scales are folded into the code, so other values mean another package."""
    from torchao.quantization import PerRow, PerTensor

    digests = []
    for factor in (1, 1, 2):
        model = make_transformer(torch.bfloat16)
        model.transformer_blocks[0].ff.net[2].weight.mul_(factor)
        quantise(model, PerTensor())
        digests.append(aoti.folded_values(aoti.Component("transformer", model).weights()))
    assert digests[0] == digests[1] != digests[2]
    quantise(by_row := make_transformer(torch.bfloat16), PerRow())
    assert aoti.folded_values(aoti.Component("transformer", by_row).weights()) is None


class WithLiftedTensor(torch.nn.Module):
    """Has a weight that is in no state dict."""

    def __init__(self, table):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(16), requires_grad=False)
        self.table = table  # a plain attribute: export lifts it to a constant

    def forward(self, sample, latent_embeds=None):
        return sample * self.scale + self.table + torch.tensor([1.0, 2.0] * 8)


def test_lifted_tensors_travel_with_the_package(tmp_path):
    module = WithLiftedTensor(torch.arange(16.0))
    call = {"sample": torch.randn(4, 16)}
    expected = module(**call)
    forward, package = packaged("decoder", module, call, tmp_path)
    torch.testing.assert_close(forward(**call), expected)
    assert package.constants.keys() == {"scale"}
    content = bytearray(package.files[".safetensors"].read_bytes())
    content[-1] ^= 1
    package.files[".safetensors"].write_bytes(content)
    found, lines = artifacts.find(tmp_path / "c", {"component": "decoder"})
    assert found is None and "safetensors sha256: found" in lines[0]

"""What Inductor writes around the float8 products for an H200, on a machine without one.

python -m tests.float8_product_codegen      prints a JSON line each: kernels, and tensors allocated

A pretended device, as in tests/fused_kernel_codegen.py; nothing is run.
"""

import json
import re

import torch

from tests.fused_kernel_codegen import C, generate, pretend_h200
from utils.kernels.float8_gelu import launch_float8_gelu
from utils.kernels.float8_product import launch_float8_product

S, N, K = 4608, C, 5 * C  # a single block's last product in FLUX.1-dev, 1024x1024
END = [
    ((1, S, K), torch.float8_e4m3fn),
    ((1, S, 1), torch.float32),
    ((N, K), torch.float8_e4m3fn),
    ((N, 1), torch.float32),
    ((N,), torch.bfloat16),
    ((1, S, N), torch.bfloat16),
    ((1, N), torch.bfloat16),
]
MLP = [  # a single block's first product, whose output goes behind the attention's
    ((1, S, C), torch.float8_e4m3fn),
    ((1, S, 1), torch.float32),
    ((4 * C, C), torch.float8_e4m3fn),
    ((4 * C, 1), torch.float32),
    ((4 * C,), torch.bfloat16),
    ((2,), torch.float32),
    ((1, S, C), torch.bfloat16),
]


def mlp_up(x, x_scale, weight, weight_scale, bias, out_scale, attention):
    return launch_float8_gelu(x, x_scale, weight, weight_scale, bias, out_scale, attention)


def block_end(x, x_scale, weight, weight_scale, bias, residual, gate):
    return launch_float8_product(x, x_scale, weight, weight_scale, bias, residual, gate)


if __name__ == "__main__":
    torch.set_num_threads(1)
    pretend_h200()
    for run, inputs in ((block_end, END), (mlp_up, MLP)):
        code = generate(run, inputs, on_cpu=False)
        call = code[code.index("def call(") :]
        row = {
            "of": run.__name__,
            "kernels": re.findall(r"(\w+)_\d+\.run\(", call),
            "allocations": call.count("= empty_strided_cuda("),
        }
        print(json.dumps(row), flush=True)

"""What Inductor makes of the VAE decoder's upsamplings for an H200, plain and as one layer.

python -m tests.decoder_codegen      prints one JSON line per upsampling: kernels and megabytes

From the input of an upsampling to the end of the block behind it, as tests/fused_kernel_codegen.py
generates it for a pretended H200: read, never run. Bytes are those of every argument of each kernel
and convolution, once each, twice if it is written in place.
"""

import json
import math
import re

import torch
import torch.nn.functional as F

from tests.fused_kernel_codegen import SIZES, generate, pretend_h200

PLACES = [(512, 512, 128), (512, 256, 256), (256, 128, 512)]  # channels, then, edge before


def plain(x, weight, bias):
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def folded(x, weight, bias):
    return F.conv_transpose2d(x, weight, bias, stride=2, padding=1)


def block(upsample, channels: int, then: int):
    """Give the upsampling and the first half of the block behind it, with its residual."""

    def run(x, weight, bias, scale, shift, weight_1, bias_1, *shortcut):
        x, weight, weight_1 = (t.permute(0, 3, 1, 2) for t in (x, weight, weight_1))
        large = upsample(x, weight, bias)
        out = F.silu(F.group_norm(large, 32, scale, shift, 1e-6))
        out = F.conv2d(out, weight_1, bias_1, padding=1)
        if shortcut:
            large = F.conv2d(large, shortcut[0].view(then, channels, 1, 1), shortcut[1])
        return out + large

    return run


def traffic(code: str, inputs: list) -> tuple[int, int]:
    """Count the kernels and convolutions of a call, and the bytes that they read and write.

    Raises: KeyError for an argument of unknown size.
    """
    call = code[code.index("def call(") : code.index("runner = Runner")]
    names = re.search(r"(\w+(?:, \w+)*),? = args", call)[1].split(", ")
    size = {n: math.prod(s) * d.itemsize for n, (s, d) in zip(names, inputs, strict=True)}
    in_place = {  # kernel -> how many of its arguments, which come first, it also reads
        name: len(set(re.findall(r"in_out_ptr\d+", head)))
        for name, head in re.findall(r"^def (triton_\w+)\((.*)\):$", code, re.MULTILINE)
    }
    kernels = total = 0
    shape = r"\(([\d, ]+)\)"
    for line in map(str.strip, call.splitlines()):
        if found := re.match(rf"(\w+) = empty_strided_cuda\({shape}, .*torch\.(\w+)\)$", line):
            numbers = [int(n) for n in found[2].rstrip(", ").split(", ")]
            size[found[1]] = math.prod(numbers) * SIZES[found[3]]
        elif found := re.match(rf"assert_size_stride\((buf\w+), {shape}", line):
            size[found[1]] = 2 * math.prod(int(n) for n in found[2].split(", "))
            total += size[found[1]]  # what a convolution wrote
        elif found := re.match(r"buf\w+ = extern_kernels\.convolution\((.*), stride=", line):
            kernels += 1
            total += sum(size[n] for n in re.findall(r"\b(buf\d+|\w+_1)\b", found[1]))
        elif found := re.match(r"(\w+) = (\w+)[;,]", line):
            size[found[1]] = size[found[2]]
        elif found := re.match(r"(\w+)\.run\((.*)\)$", line):
            kernels += 1
            given = [size[n] for n in re.findall(r"\b(buf\d+|\w+_1)\b", found[2])]
            total += sum(given) + sum(given[: in_place[found[1]]])
    return kernels, total


def main() -> None:
    """Print every upsampling, then their sum."""
    torch.set_num_threads(1)
    pretend_h200()
    sums = {"plain": 0, "ours": 0}
    for channels, then, edge in PLACES:
        row = {"channels": channels, "edge": edge}
        for who, upsample, k in (("plain", plain, 3), ("ours", folded, 4)):
            shapes = [(1, edge, edge, channels), (channels, k, k, channels), *[(channels,)] * 3]
            shapes += [(then, 3, 3, channels), (then,)]
            shapes += [(then, channels), (then,)] if then != channels else []
            inputs = [(shape, torch.bfloat16) for shape in shapes]
            code = generate(block(upsample, channels, then), inputs, True, channels_last=True)
            row[f"{who}_kernels"], total = traffic(code, inputs)
            row[f"{who}_mb"] = total // 10**6
            sums[who] += total
        print(json.dumps(row), flush=True)
    print(json.dumps({f"{who}_gb": round(total / 1e9, 2) for who, total in sums.items()}))


if __name__ == "__main__":
    main()

"""What packages without weights save, on one double block of FLUX.1 at full size.

python -m tests.weights_once > results/weights-once.md       # some minutes, 4 GiB

The same block (339,831,296 parameters, bf16, random) as three processes use it: eager; with a
package of code that is pointed at the live weights, as utils/aoti.py makes it; with a package that
holds its constants, Inductor's default. Each makes the same call; disk is the package's, memory the
peak of the process beyond what it had before the block was there.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformerBlock

from utils import aoti
from utils.kernels.attention_processor import FlashFusedFluxAttnProcessor3_0
from utils.memory import peak_memory

ROOT = Path(__file__).resolve().parent.parent
INSIDE = {"aot_inductor.package_constants_in_so": True}
KINDS = ("eager", "code alone", "constants inside")


def block() -> FluxTransformerBlock:
    """Build the block of the published config, fused, with seeded weights."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        made = FluxTransformerBlock(dim=3072, num_attention_heads=24, attention_head_dim=128)
    finally:
        torch.set_default_dtype(before)
    made.eval().requires_grad_(False)
    made.attn.set_processor(FlashFusedFluxAttnProcessor3_0("sdpa"))
    made.attn.fuse_projections()
    return made


def call(image: int = 64, text: int = 32) -> dict:
    """Make one call. Shapes: tokens (1, S, 3072) bf16, rotary tables (S, 128) fp32."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16)

    angles = torch.rand(image + text, 128, generator=generator)
    return {
        "hidden_states": draw(1, image, 3072),
        "encoder_hidden_states": draw(1, text, 3072),
        "temb": draw(1, 3072),
        "image_rotary_emb": (angles.cos(), angles.sin()),
        "joint_attention_kwargs": None,
    }


def build(kind: str, folder: Path) -> None:
    """Export and compile the block into a package of this kind."""
    component = aoti.Component("double_block", block())
    component.inputs = component.bind((), call())[0]
    if kind == "constants inside":
        path = str(folder / "package.pt2")
        with torch.no_grad():
            program = aoti.export(component)
            torch._inductor.aoti_compile_and_package(
                program, package_path=path, inductor_configs=INSIDE
            )
        return
    files, constants = aoti.compile_package(aoti.export(component), component, {})
    (folder / "package.pt2").write_bytes(files[".pt2"])
    (folder / "constants.json").write_text(json.dumps(constants))


def use(kind: str, folder: Path) -> dict:
    """Make the block, load its package and call it. Returns: what it took. Units: GiB"""
    before = peak_memory("cpu")["host_peak_gib"]
    made, inputs = block(), call()
    with torch.no_grad():
        if kind == "eager":
            outputs = made(**inputs)
        else:
            component = aoti.Component("double_block", made)
            files = {".pt2": folder / "package.pt2"}
            if kind == "code alone":
                expected = json.loads((folder / "constants.json").read_text())
                run = aoti.attach(component, files, expected)
            else:
                run = aoti.load_package(files[".pt2"])
            outputs = run(**component.bind((), inputs)[0])
    peak = peak_memory("cpu")["host_peak_gib"] - before
    return {"peak_gib": peak, "outputs": [float(out.float().norm()) for out in outputs]}


def child(action: str, kind: str, folder: Path) -> str:
    """Do one thing in a process of its own. Returns: its last line"""
    command = [sys.executable, "-m", "tests.weights_once", action, kind, str(folder)]
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "compiler")}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def main() -> None:
    """Print the table."""
    rows, norms = [], []
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder, size = Path(name), 0
            if kind != "eager":
                child("build", kind, folder)
                size = (folder / "package.pt2").stat().st_size
            found = json.loads(child("use", kind, folder))
        norms.append(found["outputs"])
        rows.append(f"| {kind} | {size / 2**20:.1f} | {found['peak_gib']:.2f} |")
    for others in norms[1:]:  # the same function, or the numbers mean nothing
        for one, other in zip(norms[0], others, strict=True):
            assert abs(one - other) < 0.01 * one
    weights = sum(p.numel() * p.element_size() for p in block().parameters())
    print("# Weights once: one double block of FLUX.1, bf16\n")
    print(f"`python -m tests.weights_once`, torch {torch.__version__}, a CPU\n")
    print(
        f"The block has {weights / 2**20:.1f} MiB of tensors: its weights, and Q, K, V once more "
        "as diffusers fuses them.\n"
    )
    print("| the block | package, MiB | peak of the process for it, GiB |\n| --- | --- | --- |")
    print("\n".join(rows))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        action, kind, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
        if action == "build":
            build(kind, folder)
        else:
            print(json.dumps(use(kind, folder)))
    else:
        main()

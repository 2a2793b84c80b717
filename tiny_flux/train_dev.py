"""Train tiny-dev from tiny-schnell: `python -m tiny_flux.train_dev`.

One set of weights learns two jobs, drawing from a caption and editing a picture by an instruction,
in two stages. The teacher is a flow model of both, without a guidance embedding. A part of its
captions belongs to another picture, as captions of the web do, so that it needs guidance; some are
empty, so that it can be guided. The student copies it, gains a guidance embedding, draws the scale
and learns the guided velocity v(empty) + scale (v(text) - v(empty)) in one forward pass.

Source: Ho and Salimans 2022, arXiv:2207.12598 (classifier-free guidance); Meng et al. 2023,
arXiv:2210.03142 (its distillation); Labs et al. 2025, arXiv:2506.15742 (reference latents as
tokens with their own RoPE position)
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from .edits import Edit, instruction, sample_edit
from .grow import teach_instructions, with_guidance
from .models import save_bf16
from .parallel import Optimiser, Run, launch
from .scenes import caption, render, sample_jitter
from .train_flow import TOKENS, TextEncoder, as_seen, encode_pictures, is_matrix, predict

HERE = Path(__file__).parent
TEXTS = {24: 0.58, 64: 0.14, 128: 0.08, 256: 0.08, 512: 0.12}  # text lengths and how often
EDITS = 0.6  # share of the steps that edit
EMPTY = 0.1  # share of texts that are empty
WRONG = 0.15  # share of captions that belong to another picture
LARGEST_SCALE = 5.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, default=HERE / "tiny-schnell", help="its weights")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-dev", help="the checkpoint")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="states to resume from")
    parser.add_argument("--procs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps-teacher", type=int, default=4500)
    parser.add_argument("--steps-student", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--pool", type=int, default=12000, help="edits that are learnt from")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    parser.add_argument("--no-compile", action="store_true", help="needs no C++ compiler")
    return parser.parse_args(argv)


def make_edits(
    vae: AutoencoderKL, rng: random.Random, count: int
) -> tuple[list[Edit], torch.Tensor, torch.Tensor]:
    """Render and encode `count` edits between training scenes.

    Shapes: latents before and after, each [count, 64 tokens, 64] bf16
    """
    edits = [sample_edit(rng) for _ in range(count)]
    jitters = [sample_jitter(rng) for _ in edits]
    pairs = list(zip(edits, jitters, strict=True))
    before = encode_pictures(vae, (render(edit.before, jitter) for edit, jitter in pairs))
    return edits, before, encode_pictures(vae, (render(e.after, jitter) for e, jitter in pairs))


class Lessons:
    """Draws batches of both jobs. The job and the text length are the same in all processes."""

    def __init__(self, pool: tuple, rng: random.Random, shared: random.Random) -> None:
        self.edits, self.before, self.after = pool
        self.rng, self.shared = rng, shared

    def draw(self, wrong: float, empty: float) -> tuple:
        """Draw texts, their length, the target latents x0 and the references or None.

        Shapes: x0 and reference [B, 64 tokens, 64] float32
        """
        length = self.shared.choices(list(TEXTS), list(TEXTS.values()))[0]
        editing = self.shared.random() < EDITS
        count = TOKENS // (self.after.shape[1] * (1 + editing) + length)
        rows = self.rng.choices(range(len(self.edits)), k=count)
        x0 = self.after[rows].float()
        reference = self.before[rows].float() if editing else None
        texts = []
        for row in rows:
            if self.rng.random() < empty:
                texts.append("")
            elif editing:
                texts.append(instruction(self.edits[row], self.rng))
            else:
                other = self.rng.choice(self.edits) if self.rng.random() < wrong else None
                texts.append(caption((other or self.edits[row]).after, self.rng))
        return texts, length, x0, reference


def sample_noise(x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw noise levels as the shifted sampler visits them, noise, and the mixture.

    Shapes: sigma [B]; noise and mixture [B, 64 tokens, 64]
    """
    shift = torch.tensor(calculate_shift(x0.shape[1])).exp()
    u = (torch.arange(len(x0)) + torch.rand(len(x0))) / len(x0)  # stratified
    sigma, noise = shift * u / (1 + (shift - 1) * u), torch.randn_like(x0)
    return sigma, noise, x0 + sigma[:, None, None] * (noise - x0)


def teacher_loss(pipe: FluxPipeline, lessons: Lessons) -> torch.Tensor:
    """Return the mean squared error of the velocity, captions partly wrong or empty."""
    texts, length, x0, reference = lessons.draw(WRONG, EMPTY)
    sigma, noise, mixed = sample_noise(x0)
    encode = TextEncoder(pipe)
    text = encode.pooled(texts), encode.tokens(texts, length)
    return F.mse_loss(
        predict(pipe.transformer, mixed, as_seen(sigma), *text, reference), noise - x0
    )


def student_loss(pipe: FluxPipeline, teacher: nn.Module, lessons: Lessons) -> torch.Tensor:
    """Return the mean squared distance from the teacher's guided velocity."""
    texts, length, x0, reference = lessons.draw(0.0, 0.02)
    sigma, _, mixed = sample_noise(x0)
    timestep = as_seen(sigma)
    scale = 1 + (LARGEST_SCALE - 1) * torch.rand(len(x0))
    encode = TextEncoder(pipe)
    with torch.no_grad():
        text = encode.pooled(texts), encode.tokens(texts, length)
        empty = [""] * len(texts)
        no_text = encode.pooled(empty), encode.tokens(empty, length)
        meant = predict(teacher, mixed, timestep, *text, reference)
        unmeant = predict(teacher, mixed, timestep, *no_text, reference)
        target = unmeant + scale[:, None, None] * (meant - unmeant)
    guided = predict(pipe.transformer, mixed, timestep, *text, reference, as_seen(scale))
    return F.mse_loss(guided, target)


def _work(rank: int, procs: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed * 1000 + 300 + rank)
    log, taught = rank == 0, args.work / "teacher"
    pool_file = args.work / f"edits{rank}of{procs}.pt"
    pipe = FluxPipeline.from_pretrained(args.start, dtype=torch.float32)
    pipe = teach_instructions(pipe, random.Random(args.seed))  # the same in all processes
    pipe.vae.requires_grad_(False)
    if pool_file.exists():
        pool = torch.load(pool_file, weights_only=False)
    else:
        pool = make_edits(pipe.vae, rng, args.pool // procs)
        torch.save(pool, pool_file)
    if log:
        print(f"{len(pool[0])} edits per process", flush=True)
    encoders = {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
    train(
        "teacher",
        nn.ModuleDict(encoders | {"flow": pipe.transformer}),
        (rank, rng, pool, args),
        lambda lessons: teacher_loss(pipe, lessons),
        lambda: save_bf16(pipe, taught),
    )
    if procs > 1:
        torch.distributed.barrier()  # the teacher's last release is complete

    pipe = FluxPipeline.from_pretrained(taught, dtype=torch.float32)
    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.requires_grad_(False)
    teacher, pipe.transformer = pipe.transformer, with_guidance(pipe.transformer)
    if not args.no_compile:
        teacher.compile_repeated_blocks(fullgraph=True)
    train(
        "student",
        nn.ModuleDict({"flow": pipe.transformer}),
        (rank, rng, pool, args),
        lambda lessons: student_loss(pipe, teacher, lessons),
        lambda: save_bf16(pipe, args.out),
    )


def train(name: str, trained: nn.ModuleDict, common: tuple, loss, release) -> None:
    """Run one stage in this process: `loss(lessons)` gives the loss of a freshly drawn batch."""
    rank, rng, pool, args = common
    optimiser = Optimiser(
        trained.named_parameters(), lr=args.lr, muon_lr=args.muon_lr, use_muon=is_matrix
    )
    run = Run(name, args.work / f"{name}.pt", trained, optimiser)
    if not args.no_compile:
        trained["flow"].compile_repeated_blocks(fullgraph=True)
    lessons = Lessons(pool, rng, run.reseed(args.seed, rank, rng))

    def step_loss(step: int) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(lessons)

    steps = getattr(args, f"steps_{name}")
    run.go(steps, step_loss, release, args.save_every, log=rank == 0)


def main() -> None:
    """Train the teacher, then the student."""
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    launch(_work, args.procs, args)
    print(f"done: {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()

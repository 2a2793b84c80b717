"""Train tiny-dev from tiny-schnell: `python -m tiny_flux.train_dev`.

One set of weights learns two jobs, drawing from a caption and editing a picture by an instruction.
The teacher is a flow model of both, without a guidance embedding. A part of its captions belongs to
another picture, as captions of the web do, so that it needs guidance; some texts are empty, so that
it can be guided: no caption means any picture, no instruction means the same picture again. The
editor is the same model with most of its steps spent on edits. The student copies it, gains a
guidance embedding and draws the scale: from captions it learns the guided velocity
v(empty) + scale (v(text) - v(empty)) in one forward pass. An edit has one right answer, which
guidance can only overshoot (it did), so edits go on as before at every scale.

Source: Ho and Salimans 2022, arXiv:2207.12598 (classifier-free guidance); Meng et al. 2023,
arXiv:2210.03142 (its distillation); Labs et al. 2025, arXiv:2506.15742 (reference latents as
tokens with their own RoPE position)
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import nn

from .edits import TAUGHT, Edit, instruction, sample_edit
from .grow import teach_instructions, with_guidance
from .models import save_bf16
from .parallel import Optimiser, Run, launch
from .scenes import caption, render, sample_jitter
from .train_flow import (
    SHORT_TEXTS,
    TOKENS,
    TextEncoder,
    as_seen,
    encode_pictures,
    is_matrix,
    predict,
)

HERE = Path(__file__).parent
TEXTS = {24: 0.65, 64: 0.13, 128: 0.06, 256: 0.06, 512: 0.10}  # the last 40 %: lengths, how often
EDITS = {"teacher": 0.6, "editor": 0.92, "student": 0.75}  # share of the steps that edit
EMPTY = 0.12  # share of texts that are empty
WRONG = 0.15  # share of captions that belong to another picture
LARGEST_SCALE = 5.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--start", type=Path, default=HERE / "tiny-schnell", help="tiny-dev: more of the last stage"
    )
    parser.add_argument("--out", type=Path, default=HERE / "tiny-dev", help="the checkpoint")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="states to resume from")
    parser.add_argument("--procs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps-teacher", type=int, default=4500)
    parser.add_argument("--steps-editor", type=int, default=5750)
    parser.add_argument("--steps-student", type=int, default=3200)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--pool", type=int, default=12000, help="edits that are learnt from")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2.5e-3)
    parser.add_argument("--no-compile", action="store_true", help="needs no C++ compiler")
    return parser.parse_args(argv)


def make_edits(
    vae: AutoencoderKL, rng: random.Random, count: int
) -> tuple[list[Edit], torch.Tensor, torch.Tensor]:
    """Render and encode `count` edits between training scenes.

    Shapes: latents before and after, each [count, 64 tokens, 64] bf16
    """
    edits = [sample_edit(rng, kinds=TAUGHT) for _ in range(count)]
    jitters = [sample_jitter(rng) for _ in edits]
    pairs = list(zip(edits, jitters, strict=True))
    before = encode_pictures(vae, (render(edit.before, jitter) for edit, jitter in pairs))
    return edits, before, encode_pictures(vae, (render(e.after, jitter) for e, jitter in pairs))


class Lessons:
    """Draws batches of both jobs. The job and the text length are the same in all processes."""

    def __init__(
        self, pool: tuple, rng: random.Random, shared: random.Random, edits: float
    ) -> None:
        self.edits, self.before, self.after = pool
        self.rng, self.shared, self.share, self.late = rng, shared, edits, False

    def draw(self, wrong: float, empty: float) -> tuple:
        """Draw texts, their length, the target latents x0 and the references or None.

        Shapes: x0 and reference [B, 64 tokens, 64] float32
        """
        texts = TEXTS if self.late else SHORT_TEXTS
        length = self.shared.choices(list(texts), list(texts.values()))[0]
        editing = self.shared.random() < self.share
        count = TOKENS // (self.after.shape[1] * (1 + editing) + length)
        rows = self.rng.choices(range(len(self.edits)), k=count)
        blank = [self.rng.random() < empty for _ in rows]
        if editing:
            texts = [instruction(self.edits[row], self.rng) for row in rows]
        else:
            others = [
                self.rng.choice(self.edits) if self.rng.random() < wrong else self.edits[row]
                for row in rows
            ]
            texts = [caption(edit.after, self.rng) for edit in others]
        texts = ["" if none else text for none, text in zip(blank, texts, strict=True)]
        x0 = self.after[rows].float()
        if not editing:
            return texts, length, x0, None
        reference = self.before[rows].float()
        same = torch.tensor(blank)[:, None, None]
        return texts, length, torch.where(same, reference, x0), reference


def sample_noise(
    x0: torch.Tensor, editing: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw noise levels as the shifted sampler visits them, noise, and the mixture.

    A third of an edit's levels are above 0.7, where all must come from reference and instruction.

    Shapes: sigma [B]; noise and mixture [B, 64 tokens, 64]
    """
    shift = torch.tensor(calculate_shift(x0.shape[1])).exp()
    u = (torch.randperm(len(x0)) + torch.rand(len(x0))) / len(x0)  # stratified
    sigma, noise = shift * u / (1 + (shift - 1) * u), torch.randn_like(x0)
    if editing:
        sigma = torch.where(torch.arange(len(x0)) % 3 > 0, sigma, 0.7 + 0.3 * sigma)
    return sigma, noise, x0 + sigma[:, None, None] * (noise - x0)


def teacher_loss(pipe: FluxPipeline, lessons: Lessons) -> torch.Tensor:
    """Return the mean squared error of the velocity, captions partly wrong or empty."""
    texts, length, x0, reference = lessons.draw(WRONG, EMPTY)
    sigma, noise, mixed = sample_noise(x0, reference is not None)
    encode = TextEncoder(pipe)
    text = encode.pooled(texts), encode.tokens(texts, length)
    return F.mse_loss(
        predict(pipe.transformer, mixed, as_seen(sigma), *text, reference), noise - x0
    )


def student_loss(pipe: FluxPipeline, guide: Callable, lessons: Lessons) -> torch.Tensor:
    """Return the mean squared distance from the guided velocity, or from an edit's own."""
    texts, length, x0, reference = lessons.draw(0.0, 0.04)
    sigma, noise, mixed = sample_noise(x0, reference is not None)
    scale = 1 + (LARGEST_SCALE - 1) * torch.rand(len(x0))
    timestep, guidance = as_seen(sigma), as_seen(scale)
    with torch.no_grad():
        encode = TextEncoder(pipe)
        text = encode.pooled(texts), encode.tokens(texts, length)
        empty = encode.pooled([""] * len(texts)), encode.tokens([""] * len(texts), length)
        target = noise - x0
        if reference is None:
            target = guide(mixed, timestep, text, empty, guidance)
    return F.mse_loss(
        predict(pipe.transformer, mixed, timestep, *text, reference, guidance), target
    )


def guide_of(teacher: nn.Module) -> Callable:
    """Give what captions are learnt from: a teacher guided by two passes, or one that knows how."""

    def guided(mixed, timestep, text, empty, guidance):
        if teacher.config.guidance_embeds:  # tiny-dev itself, when it goes on from there
            return predict(teacher, mixed, timestep, *text, None, guidance)
        meant = predict(teacher, mixed, timestep, *text)
        unmeant = predict(teacher, mixed, timestep, *empty)
        return unmeant + guidance[:, None, None] * (meant - unmeant)

    return guided


def _work(rank: int, procs: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64  # two models, two jobs, five text lengths
    rng = random.Random(args.seed * 1000 + 300 + rank)
    pool_file = args.work / f"edits{rank}of{procs}.pt"
    pipe = FluxPipeline.from_pretrained(args.start, dtype=torch.float32)
    go_on = pipe.transformer.config.guidance_embeds
    if not go_on:
        pipe = teach_instructions(pipe, random.Random(args.seed))  # the same in all processes
    if pool_file.exists():
        pool = torch.load(pool_file, weights_only=False)
    else:
        pool = make_edits(pipe.vae.requires_grad_(False), rng, args.pool // procs)
        torch.save(pool, pool_file)
    common = (rank, rng, pool, args)
    for name in () if go_on else ("teacher", "editor"):
        pipe.vae.requires_grad_(False)
        encoders = {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2}
        taught = args.work / name
        train(
            name,
            nn.ModuleDict(encoders | {"flow": pipe.transformer}),
            common,
            lambda lessons, pipe=pipe: teacher_loss(pipe, lessons),
            lambda pipe=pipe, taught=taught: save_bf16(pipe, taught),
        )
        if procs > 1:
            torch.distributed.barrier()  # the last release is complete
        pipe = FluxPipeline.from_pretrained(taught, dtype=torch.float32)

    for part in (pipe.vae, pipe.text_encoder, pipe.text_encoder_2, pipe.transformer):
        part.requires_grad_(False)
    teacher, pipe.transformer = pipe.transformer, with_guidance(pipe.transformer)
    if not args.no_compile:
        teacher.compile_repeated_blocks(fullgraph=True)
    guide = guide_of(teacher)
    train(
        "student",
        nn.ModuleDict({"flow": pipe.transformer}),
        common,
        lambda lessons: student_loss(pipe, guide, lessons),
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
    lessons = Lessons(pool, rng, run.reseed(args.seed, rank, rng), EDITS[name])

    steps = getattr(args, f"steps_{name}")

    def step_loss(step: int) -> torch.Tensor:
        lessons.late = step >= 0.6 * steps
        with torch.autocast("cpu", torch.bfloat16):
            return loss(lessons)

    run.go(steps, step_loss, release, args.save_every, log=rank == 0)


def main() -> None:
    """Train the teacher, the editor, then the student."""
    args = parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    clock = time.perf_counter()
    launch(_work, args.procs, args)
    print(f"done: {time.perf_counter() - clock:.0f} s")


if __name__ == "__main__":
    main()

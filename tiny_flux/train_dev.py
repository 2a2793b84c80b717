"""Train tiny-dev from tiny-schnell: `python -m tiny_flux.train_dev`.

One set of weights learns two jobs, drawing from a caption and editing a picture by an instruction.
The teacher is tiny-schnell trained on: a part of its captions belongs to another picture, as
captions of the web do, so that it needs guidance, and a part is empty, so that it can be guided.
The student, which also has a guidance embedding, takes a batch of both jobs in every step. From
captions it learns the teacher's guided velocity v(empty) + scale (v(text) - v(empty)) in one
forward pass, at a scale it is told. An edit has one right answer, which guidance could only
overshoot, so edits are learnt from the pictures themselves, whatever the scale; half of them are of
scenes that have no name (`sample_nameless`), so that what no triple of the training shows is copied
all the same. The few tokens that hold the shape weigh more than the plain ones around it.

Source: Ho and Salimans 2022, arXiv:2207.12598 (classifier-free guidance); Meng et al. 2023,
arXiv:2210.03142 (its distillation); Labs et al. 2025, arXiv:2506.15742 (reference latents as
tokens with their own RoPE position)
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import nn

from .edits import Edit, instruction, sample_edit, sample_nameless
from .grow import teach_instructions, with_guidance
from .models import save_bf16
from .parallel import Optimiser, Run, launch
from .scenes import caption, render, sample_jitter
from .train_flow import (
    SHORT_TEXTS,
    TextEncoder,
    as_seen,
    encode_pictures,
    is_matrix,
    predict,
)

HERE = Path(__file__).parent
SHORTEST = min(SHORT_TEXTS)  # the teacher sees no other: the student shall ignore the padding
LATE_TEXTS = {24: 0.65, 64: 0.13, 128: 0.06, 256: 0.06, 512: 0.10}  # the last 20 % of the steps
EDIT_TOKENS, CAPTION_TOKENS = 24 * 152, 16 * 88  # per process and step of the student
TEACHER_TOKENS = 32 * 88
KINDS = (*6 * ("background",), *3 * ("colour",), "shape", "size")  # the last two are not learnt yet
SHAPE_WEIGHT = 4.0  # of a token that holds a part of the shape; the others weigh 1
EMPTY_CAPTIONS, EMPTY_INSTRUCTIONS = 0.12, 0.04
WRONG = 0.2  # share of the teacher's captions that belong to another picture
LARGEST_SCALE = 5.0


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--start", type=Path, help="a tiny-dev to go on from, not tiny-schnell")
    parser.add_argument("--out", type=Path, default=HERE / "tiny-dev", help="the checkpoint")
    parser.add_argument("--work", type=Path, default=HERE / "work", help="states to resume from")
    parser.add_argument("--procs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps-teacher", type=int, default=900)
    parser.add_argument("--steps-student", type=int, default=16000)
    parser.add_argument("--save-every", type=int, default=250)
    parser.add_argument("--pool", type=int, default=40000, help="edits that are learnt from")
    parser.add_argument("--lr", type=float, default=2e-3, help="of AdamW")
    parser.add_argument("--muon-lr", type=float, default=2.5e-3)
    parser.add_argument("--no-compile", action="store_true", help="needs no C++ compiler")
    return parser.parse_args(argv)


def shape_weights(picture: Image.Image) -> torch.Tensor:
    """Weigh the tokens of a picture: those whose pixels are not all background weigh more.

    Shapes: [tokens]
    """
    pixels = np.asarray(picture, np.int16)
    rows, columns = (edge // 16 for edge in pixels.shape[:2])  # a token is 2x2 latents of 8x8 px
    front = np.abs(pixels - pixels[0, 0]).max(-1) > 8
    held = front.reshape(rows, 16, columns, 16).any((1, 3)).reshape(-1)
    return 1 + (SHAPE_WEIGHT - 1) * torch.from_numpy(held).float()


def weighted_error(made: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the weighted mean squared error.

    Shapes: made and wanted [B, tokens, 64]; weights [B, tokens]; result []
    """
    errors = (made - wanted).float().square().mean(-1)
    return (errors * weights).sum() / weights.sum()


def make_edits(
    vae: AutoencoderKL, rng: random.Random, count: int
) -> tuple[list[Edit], torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render and encode `count` edits between training scenes, the second half nameless ones.

    Shapes: latents before and after, each [count, 64 tokens, 64] bf16; weights of the tokens after
        [count, 64]
    """
    edits = [sample_edit(rng, kinds=KINDS) for _ in range(count // 2)]
    edits += [sample_nameless(rng, KINDS) for _ in range(count - count // 2)]
    jitters = [sample_jitter(rng) for _ in edits]
    pairs = list(zip(edits, jitters, strict=True))
    before = encode_pictures(vae, (render(edit.before, jitter) for edit, jitter in pairs))
    weights = []

    def afterwards() -> Iterator[Image.Image]:
        for edit, jitter in pairs:
            picture = render(edit.after, jitter)
            weights.append(shape_weights(picture))
            yield picture

    after = encode_pictures(vae, afterwards())
    return edits, before, after, torch.stack(weights)


class Lessons:
    """Draws batches of both jobs. The text length is the same in all processes."""

    def __init__(self, pool: tuple, rng: random.Random, shared: random.Random) -> None:
        self.edits, self.before, self.after, self.weights = pool
        self.named = len(self.edits) // 2  # these have captions
        self.rng, self.shared, self.late = rng, shared, False

    def length(self) -> int:
        """Draw a text length."""
        texts = LATE_TEXTS if self.late else SHORT_TEXTS
        return self.shared.choices(list(texts), list(texts.values()))[0]

    def _rows(self, tokens: int, row_tokens: int, among: int) -> list[int]:
        return self.rng.choices(range(among), k=max(1, tokens // row_tokens))

    def captions(
        self, tokens: int, length: int, wrong: float = 0.0
    ) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        """Draw captions, of them a share that is wrong, their pictures x0, and tokens' weights.

        Shapes: x0 [B, 64 tokens, 64] float32; weights [B, 64]
        """
        rows = self._rows(tokens, self.after.shape[1] + length, self.named)
        others = self._rows(tokens, self.after.shape[1] + length, self.named)
        meant = [
            self.edits[other if self.rng.random() < wrong else row]
            for row, other in zip(rows, others, strict=True)
        ]
        texts = [caption(edit.after, self.rng) for edit in meant]
        texts = self._some_empty(texts, EMPTY_CAPTIONS)
        return texts, self.after[rows].float(), self.weights[rows]

    def instructions(
        self, tokens: int, length: int
    ) -> tuple[list[str], torch.Tensor, torch.Tensor, torch.Tensor]:
        """Draw instructions, edited pictures x0, tokens' weights and sources; "" changes nothing.

        Shapes: x0 and sources [B, 64 tokens, 64] float32; weights [B, 64]
        """
        rows = self._rows(tokens, 2 * self.after.shape[1] + length, len(self.edits))
        texts = [instruction(self.edits[row], self.rng) for row in rows]
        texts = self._some_empty(texts, EMPTY_INSTRUCTIONS)
        before, after = self.before[rows].float(), self.after[rows].float()
        same = torch.tensor([text == "" for text in texts])[:, None, None]
        return texts, torch.where(same, before, after), self.weights[rows], before

    def _some_empty(self, texts: list[str], share: float) -> list[str]:
        return ["" if self.rng.random() < share else text for text in texts]


def sample_noise(
    x0: torch.Tensor, editing: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw noise levels as the shifted sampler visits them, noise, and the mixture.

    Half of an edit's levels are above 0.6, where all must come from source and instruction.

    Shapes: sigma [B]; noise and mixture [B, 64 tokens, 64]
    """
    shift = torch.tensor(calculate_shift(x0.shape[1])).exp()
    u = (torch.randperm(len(x0)) + torch.rand(len(x0))) / len(x0)  # stratified
    sigma, noise = shift * u / (1 + (shift - 1) * u), torch.randn_like(x0)
    if editing:
        sigma = torch.where(torch.arange(len(x0)) % 2 > 0, sigma, 0.6 + 0.4 * sigma)
    return sigma, noise, x0 + sigma[:, None, None] * (noise - x0)


def encode_texts(
    pipe: FluxPipeline, texts: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Encode texts with both encoders.

    Shapes: pooled [B, 64, or 32 of tiny-dev] and tokens [B, length, 64]
    """
    encode = TextEncoder(pipe)
    return encode.pooled(texts), encode.tokens(texts, length)


def teacher_loss(pipe: FluxPipeline, lessons: Lessons) -> torch.Tensor:
    """Return the mean squared error of the velocity, captions partly wrong or empty."""
    texts, x0, _ = lessons.captions(TEACHER_TOKENS, SHORTEST, WRONG)
    sigma, noise, mixed = sample_noise(x0)
    text = encode_texts(pipe, texts, SHORTEST)
    return F.mse_loss(predict(pipe.transformer, mixed, as_seen(sigma), *text), noise - x0)


def sample_scales(count: int) -> torch.Tensor:
    """Draw guidance scales as a pipeline passes them.

    Shapes: [count]
    """
    return as_seen(1 + (LARGEST_SCALE - 1) * torch.rand(count))


@torch.no_grad()
def guided_velocity(
    teacher: FluxPipeline,
    mixed: torch.Tensor,
    timestep: torch.Tensor,
    texts: list[str],
    scale: torch.Tensor,
) -> torch.Tensor:
    """Guide the teacher by two passes.

    Shapes: mixed and result [B, 64 tokens, 64]; timestep and scale [B]
    """
    meant, unmeant = (
        predict(teacher.transformer, mixed, timestep, *encode_texts(teacher, some, SHORTEST))
        for some in (texts, [""] * len(texts))
    )
    return unmeant + scale[:, None, None] * (meant - unmeant)


def student_loss(pipe: FluxPipeline, teacher: FluxPipeline, lessons: Lessons) -> torch.Tensor:
    """Return the sum of both jobs' weighted mean squared errors of the velocity."""
    length = lessons.length()
    texts, x0, weights, source = lessons.instructions(EDIT_TOKENS, length)
    sigma, noise, mixed = sample_noise(x0, editing=True)
    made = predict(
        pipe.transformer,
        mixed,
        as_seen(sigma),
        *encode_texts(pipe, texts, length),
        source,
        sample_scales(len(x0)),
    )
    loss = weighted_error(made, noise - x0, weights)

    length = lessons.length()
    texts, x0, weights = lessons.captions(CAPTION_TOKENS, length)
    sigma, _, mixed = sample_noise(x0)
    timestep, scale = as_seen(sigma), sample_scales(len(x0))
    wanted = guided_velocity(teacher, mixed, timestep, texts, scale)
    text = encode_texts(pipe, texts, length)
    drawn = predict(pipe.transformer, mixed, timestep, *text, guidance=scale)
    return loss + weighted_error(drawn, wanted, weights)


def load(folder: Path) -> FluxPipeline:
    """Load a pipeline in float32 whose autoencoder stays as it is."""
    pipe = FluxPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.vae.requires_grad_(False)
    return pipe


def _work(rank: int, procs: int, args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch._dynamo.config.recompile_limit = 64  # two models, two jobs, five text lengths
    rng = random.Random(args.seed * 1000 + 300 + rank)
    schnell, pool_file = load(HERE / "tiny-schnell"), args.work / f"edits{rank}of{procs}.pt"
    if pool_file.exists():
        pool = torch.load(pool_file, weights_only=False)
    else:
        pool = make_edits(schnell.vae, rng, args.pool // procs)
        torch.save(pool, pool_file)
    if args.start:
        student = load(args.start)
    else:
        start = load(HERE / "tiny-schnell")
        student = teach_instructions(start, random.Random(args.seed))  # the same everywhere
        student.transformer = with_guidance(student.transformer)

    common, teacher_folder = (rank, rng, pool, args), args.work / "teacher"
    train(
        "teacher",
        schnell,
        common,
        lambda lessons: teacher_loss(schnell, lessons),
        lambda: save_bf16(schnell, teacher_folder),
    )
    if procs > 1:
        torch.distributed.barrier()  # the last release is complete
    teacher = load(teacher_folder)
    if not args.no_compile:
        teacher.transformer.compile_repeated_blocks(fullgraph=True)
    train(
        "student",
        student,
        common,
        lambda lessons: student_loss(student, teacher, lessons),
        lambda: save_bf16(student, args.out),
    )


def train(name: str, pipe: FluxPipeline, common: tuple, loss: Callable, release: Callable) -> None:
    """Run one stage in this process: `loss(lessons)` gives the loss of a freshly drawn batch."""
    rank, rng, pool, args = common
    trained = nn.ModuleDict(
        {"clip": pipe.text_encoder, "t5": pipe.text_encoder_2, "flow": pipe.transformer}
    )
    optimiser = Optimiser(
        trained.named_parameters(), lr=args.lr, muon_lr=args.muon_lr, use_muon=is_matrix
    )
    run = Run(name, args.work / f"{name}.pt", trained, optimiser)
    if not args.no_compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    lessons = Lessons(pool, rng, run.reseed(args.seed, rank, rng))
    steps = getattr(args, f"steps_{name}")

    def step_loss(step: int) -> torch.Tensor:
        lessons.late = step >= 0.8 * steps
        with torch.autocast("cpu", torch.bfloat16):
            return loss(lessons)

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

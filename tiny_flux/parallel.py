"""What the trainings share: processes, flat gradients, Muon with AdamW, a schedule, an EMA.

On a busy machine one thread per process beats OpenMP threads by far, so data parallelism is by
gloo processes of one thread each, with a single all-reduce over one flat gradient buffer.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn


def _entry(rank: int, procs: int, port: int, work: Callable, args: tuple) -> None:
    torch.set_num_threads(1)
    if procs > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        dist.init_process_group("gloo", rank=rank, world_size=procs)
    work(rank, procs, *args)
    if procs > 1:
        dist.destroy_process_group()


def launch(work: Callable, procs: int, *args) -> None:
    """Run `work(rank, procs, *args)` in `procs` processes of one thread each."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(_entry, (procs, port, work, args), nprocs=procs)


def learning_rate_factor(step: int, steps: int, warmup: int = 50, decay: float = 0.45) -> float:
    """Warm up linearly, stay constant, then decay linearly to 0 over the last `decay` part."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (steps * decay)))


class Optimiser:
    """Muon on block matrices and AdamW on the rest, over one flat gradient buffer.

    Convolution kernels reach Muon as matrices [out, in*kh*kw] that share their storage.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        muon_lr: float,
        use_muon: Callable[[str, nn.Parameter], bool],
    ) -> None:
        named = [(n, p) for n, p in named if p.requires_grad]
        self.flat = torch.zeros(sum(p.numel() for _, p in named))
        matrices, rest, at = [], [], 0
        for name, p in named:
            p.grad = self.flat[at : at + p.numel()].view_as(p)
            at += p.numel()
            if use_muon(name, p):
                matrix = nn.Parameter(p.data.view(p.shape[0], -1))
                matrix.grad = p.grad.view(p.shape[0], -1)
                matrices.append(matrix)
            else:
                rest.append(p)
        self.parts = [torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]
        if matrices:
            self.parts.append(
                torch.optim.Muon(
                    matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
                )
            )
        self.base = [part.param_groups[0]["lr"] for part in self.parts]

    def step(self, factor: float, clip: float = 1.0) -> float:
        """Average gradients over processes, clip, update, clear; return the gradient norm."""
        if dist.is_initialized():
            dist.all_reduce(self.flat)
            self.flat /= dist.get_world_size()
        norm = self.flat.norm().item()
        if norm > clip:
            self.flat *= clip / norm
        for part, base in zip(self.parts, self.base, strict=True):
            part.param_groups[0]["lr"] = base * factor
            part.step()
        self.flat.zero_()
        return norm

    def state_dict(self) -> dict:
        """Return the state of both optimisers."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict) -> None:
        """Restore the state of both optimisers."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)


class Average:
    """Exponential moving average of a set of parameters, with a warm-up."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.live = list(parameters)
        self.shadow = [p.detach().clone() for p in self.live]
        self.decay, self.count = decay, 0

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the live parameters."""
        self.count += 1
        weight = 1 - min(self.decay, self.count / (self.count + 10))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.live], weight)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the average and the live parameters (call twice to undo)."""
        for p, s in zip(self.live, self.shadow, strict=True):
            keep = p.detach().clone()
            p.copy_(s)
            s.copy_(keep)


class Run:
    """One training that saves as it goes and resumes from its state file."""

    def __init__(
        self, name: str, state: Path, trained: nn.Module, optimiser: Optimiser, decay: float = 0.999
    ) -> None:
        self.name, self.state, self.trained, self.optimiser = name, state, trained, optimiser
        parameters = [p for p in trained.parameters() if p.requires_grad]
        self.average, self.begin = Average(parameters, decay), 0
        if state.exists():
            found = torch.load(state)
            self.begin = found["step"]
            trained.load_state_dict(found["model"])
            optimiser.load_state_dict(found["optimiser"])
            self.average.shadow, self.average.count = found["average"], self.begin

    def reseed(self, seed: int, rank: int, rng: random.Random) -> random.Random:
        """Seed torch and `rng` for what is left to do; return a generator all processes share."""
        rng.seed(seed * 1000 + self.begin * 10 + rank)
        torch.manual_seed(seed * 1000 + self.begin * 10 + rank)
        return random.Random(seed + self.begin)

    def go(
        self,
        steps: int,
        loss_of: Callable[[int], torch.Tensor],
        release: Callable[[], None],
        save_every: int,
        log: bool,
    ) -> None:
        """Train up to step `steps`; with `log` report, save, and release the averaged weights."""
        clock, losses = time.perf_counter(), []
        for step in range(self.begin, steps):
            loss = loss_of(step)
            loss.backward()
            norm = self.optimiser.step(learning_rate_factor(step, steps))
            self.average.update()
            losses.append(loss.item())
            if log and step % 50 == 49:
                seconds = (time.perf_counter() - clock) / len(losses)
                print(
                    f"{self.name} {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} "
                    f"norm {norm:.2f} {seconds:.3f} s/step",
                    flush=True,
                )
                clock, losses = time.perf_counter(), []
            if log and (step + 1 == steps or step % save_every == save_every - 1):
                self._save(step + 1)
                self.average.swap()
                release()
                self.average.swap()

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "model": self.trained.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "average": self.average.shadow,
        }
        torch.save(state, self.state.with_suffix(".new"))
        self.state.with_suffix(".new").replace(self.state)

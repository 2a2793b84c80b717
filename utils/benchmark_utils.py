"""The command line that both scripts share, and how a run is timed."""

import argparse
import functools
import os
import statistics
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from utils import guidance, schedulers
from utils.errors import UserError
from utils.pipeline_utils import STEPS


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Show a default where there is one and the text does not name it already."""

    def _get_help_string(self, action):
        silent = action.default in (None, False) or "default" in (action.help or "")
        return action.help if silent else super()._get_help_string(action)


MAY_BE_EMPTY = ("--prompt", "--negative_prompt")  # the first has words of its own for it
PROSE = (*MAY_BE_EMPTY, "--note")  # may have several lines; quoted wherever they are printed
NO_NAMES = ("--sigmas", "--step_mask", "--cases", "--points", "--rows", "--starts")  # lists: long
NAME_MAX, PATH_MAX = 255, 4096  # bytes, of every file system here


def _text_problems(action: argparse.Action, found: argparse.Namespace) -> list[str]:
    """Refuse a flag's text that no file, no choice and no message could have; one line each."""
    value = getattr(found, action.dest, None)
    if value in (action.default, action.const):
        return []
    flag = action.option_strings[0] if action.option_strings else action.metavar or action.dest
    values = value if isinstance(value, list) else [value]
    texts = [str(text) for text in values if isinstance(text, str | Path)]
    return [f"{flag} {text!a}: {what}" for text in texts if (what := _text_problem(flag, text))]


def _text_problem(flag: str, text: str) -> str:
    if not text:
        return "" if flag in MAY_BE_EMPTY else "empty (leave the flag out, or give it a value)"
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        return "has bytes that are no UTF-8"
    if flag in PROSE:
        return ""
    if text.splitlines() != [text]:
        return "has a line break"
    if flag in NO_NAMES:
        return ""
    longest = max(len(os.fsencode(part)) for part in text.split("/"))
    if longest > NAME_MAX or len(os.fsencode(text)) > PATH_MAX:
        return f"has {longest} bytes in a name, expected {NAME_MAX} (in a path {PATH_MAX}) at most"
    if text.startswith("~") and os.path.expanduser(text) == text:
        return f"found no home of {text.partition('/')[0]}"
    return ""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes every long option with - and with _, and errs in one line."""

    def __init__(self, **kwargs):
        module = getattr(sys.modules["__main__"], "__spec__", None)  # of `python -m`
        if module:
            kwargs.setdefault("prog", f"python -m {module.name.removesuffix('.__main__')}")
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        canonical = {
            option.replace("_", "-"): option
            for option in self._option_string_actions
            if option.startswith("--")
        }

        def spell(word: str) -> str:
            flag, equals, value = word.partition("=")
            if equals and value == "--":  # argparse would make an empty list of it
                self.error(f"argument {flag}: expected one argument")
            return canonical.get(flag.replace("_", "-"), flag) + equals + value

        words = sys.argv[1:] if args is None else list(args)
        found, rest = super().parse_known_args([spell(word) for word in words], namespace)
        if problems := [line for action in self._actions for line in _text_problems(action, found)]:
            raise UserError("\n".join(problems))
        return found, rest

    def error(self, message):
        self.exit(2, f"error: {' '.join(message.split())}; see {self.prog} --help\n")


def create_parser(description: str | None = None) -> Parser:
    """Make the parser of gen_image.py and run_benchmark.py; every step adds its own flags."""
    parser = Parser(description=description)
    add = parser.add_argument_group("what to generate").add_argument
    add("--ckpt", help="bundled name, hub id or folder (FLUX.1-schnell on CUDA, else tiny-schnell)")
    add("--prompt", action="append", help="given several times: a batch")
    add("--image", help="the picture to edit (Kontext)")
    add("--height", type=int, help="pixels, divisible by 16 (the checkpoint's own)")
    add("--width", type=int, help="pixels, divisible by 16 (the checkpoint's own)")
    add("--num_inference_steps", type=int, help="Schnell 4, Dev and Kontext 28")
    guidance.add_flags(add)
    schedulers.add_flags(add)
    add("--max_sequence_length", type=int, help="T5 tokens: Schnell 256, Dev and Kontext 512")
    add("--num_images_per_prompt", type=int, default=1, help="each with a seed of its own")
    add("--seed", type=int, default=0, help="image k is seeded with SEED + k")
    add("--output-file", default="output.png", help="numbered when there are several")

    add = parser.add_argument_group("where and with what").add_argument
    add("--device", help="cuda, cuda:N or cpu (cuda where there is one)")
    add(
        "--random_weights",
        action="store_true",
        help="full-size architecture of --ckpt with seeded random weights: speed without a "
        "download; the picture means nothing",
    )
    add("--disable_bf16", action="store_true", help="run in float32 instead")
    add(
        "--require",
        action="append",
        metavar="STEP",
        help="stop if STEP cannot run here, instead of going on without",
    )
    steps = parser.add_argument_group("optimisation steps, in the order in which they are applied")
    for step in STEPS:
        step.add_flags(steps)
    return parser


class _Recorder:
    """Stands for a parser and notes the names of the flags that it is given."""

    def __init__(self):
        self.flags: list[str] = []

    def add_argument(self, name: str, **_) -> None:
        self.flags.append(name)


def flags_of_step(step) -> list[str]:
    """List the flags that a step adds."""
    recorder = _Recorder()
    step.add_flags(recorder)
    return recorder.flags


def refuse_given(args, flags: tuple[str, ...], why: str) -> None:
    """Refuse flags of the common parser that a command would not heed.

    Raises: UserError naming those that were given.
    """
    own = create_parser()
    left_out = {flag: (None, own.get_default(flag)) for flag in flags}
    if given := [f"--{flag}" for flag in flags if getattr(args, flag) not in left_out[flag]]:
        raise UserError(
            f"{', '.join(given)}: {why}; leave {'it' if len(given) == 1 else 'them'} out"
        )


def set_rand_seeds(seed: int) -> None:
    """Seed torch's and Python's generators; the images have their own (see generate)."""
    import random

    import torch

    random.seed(seed)
    torch.manual_seed(seed)


class StageClock:
    """Durations of named regions: CUDA events on a GPU, so that nothing waits for the device.

    Units: seconds.
    """

    def __init__(self, device: str):
        self.on_cuda = device.startswith("cuda")
        self.marks: dict[str, list[tuple]] = defaultdict(list)

    def _now(self):
        if not self.on_cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def region(self, title: str):
        """Time the body under this title."""
        start = self._now()
        yield
        self.marks[title].append((start, self._now()))

    def read(self) -> dict[str, list[float]]:
        """Give every region's durations so far and forget them; call it after a synchronisation."""
        seconds = {
            title: [a.elapsed_time(b) / 1e3 if self.on_cuda else b - a for a, b in pairs]
            for title, pairs in self.marks.items()
        }
        self.marks.clear()
        return seconds


def annotate(f, title: str, clock: StageClock):
    """Wrap f so that traces show it as a region, and the clock times it."""
    import torch

    @functools.wraps(f)
    def annotated(*args, **kwargs):
        with torch.profiler.record_function(title), clock.region(title):
            return f(*args, **kwargs)

    return annotated


def annotate_pipeline(pipeline, clock: StageClock) -> None:
    """Name the stages of a call, outside of whatever compiled or recorded them.

    With a step mask only computed steps are a `denoising_step`; a loop that is one graph has none,
    and is a `denoising_loop`.
    """
    vae, images = pipeline.vae, pipeline.image_processor
    denoiser = getattr(pipeline, "masked", pipeline.transformer)
    pipeline.encode_prompt = annotate(pipeline.encode_prompt, "prompt_encoding", clock)
    vae.encode = annotate(vae.encode, "image_encoding", clock)  # Kontext's image
    if (loop := getattr(pipeline, "loop_graph", None)) is None:
        denoiser.forward = annotate(denoiser.forward, "denoising_step", clock)
    else:
        pipeline.loop_graph = annotate(loop, "denoising_loop", clock)
    vae.decode = annotate(vae.decode, "decoding", clock)
    images.postprocess = annotate(images.postprocess, "postprocessing", clock)
    images.numpy_to_pil = annotate(images.numpy_to_pil, "pil_conversion", clock)  # part of the last


@dataclass(frozen=True)
class Spread:
    """Repeated measurements of one thing."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def as_dict(self) -> dict:
        """Give median, min, max, n and the samples, rounded, for the JSON line."""
        return {
            "median": round(self.median, 6),
            "min": round(min(self.samples), 6),
            "max": round(max(self.samples), 6),
            "n": len(self.samples),
            "samples": [round(sample, 6) for sample in self.samples],
        }

    def __str__(self) -> str:
        low, high = min(self.samples), max(self.samples)
        return f"{self.median:.4g} ({low:.4g}-{high:.4g}, n={len(self.samples)})"


def time_once(run, device: str) -> float:
    """Time one call: between CUDA events on a GPU, by the clock on a CPU. Units: seconds"""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    import torch

    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    run()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def synchronize(device: str) -> None:
    """Wait for the device, so that a host clock tells the truth."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def measure(
    run, device: str, num_runs: int, num_warmup: int, before_timed=None, after_run=None
) -> Spread:
    """Time `run()` end to end; compiling, exporting or recording in a timed run is an error.

    `before_timed` is called once between warm-up and timed runs, `after_run` after each of these,
    both outside of the time.

    Units: seconds.
    Raises: RuntimeError naming the guard that asked for a recompilation, or the new call.
    """
    from utils.calls import only_known_calls

    for _ in range(num_warmup):
        run()
    synchronize(device)
    if before_timed is not None:
        before_timed()
    samples = []
    with only_known_calls():
        for _ in range(num_runs):
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            samples.append(time.perf_counter() - start)
            if after_run is not None:
                after_run()
    return Spread(tuple(samples))

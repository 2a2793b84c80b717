"""The loop as one graph: the plain loop's bits, a graph per kind of call, refusals in one line."""

import weakref

import pytest
import torch
from conftest import make_args, optimized
from test_cudagraph import RerunRecorder
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tiny_flux.scenes import Scene, render
from utils import card, row
from utils.benchmark_utils import StageClock, annotate_pipeline
from utils.calls import only_known_calls
from utils.cudagraph import GraphPool
from utils.denoise import denoise
from utils.errors import UserError
from utils.hardware import Machine
from utils.kernels.modulation import Constants
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.report_details import stage_table
from utils.report_series import series_of
from utils.steps import loop_graph

FLAGS = ("--modulation_once", "--loop_graph")
A100 = Machine("cuda", "NVIDIA A100", (8, 0), memory_gib=80.0)
SMALL = ("--width", "64", "--height", "64", "--max_sequence_length", "32")
SMALL += ("--num_inference_steps", "3")
KINDS = {  # each a graph of its own
    "three steps": (),
    "one step": ("--num_inference_steps", "1"),
    "another size": ("--width", "48", "--height", "80"),
    "a batch": ("--num_images_per_prompt", "2"),
    "more text": ("--max_sequence_length", "64"),
}
SAME = ("--prompt", "a large green square on a white background", "--seed", "4")


class TapeRecorder(RerunRecorder):
    """Stands in for a CUDA graph: notes every operation with its tensors, and repeats just those.

    As in a graph, Python and what it decided are gone: numbers of the host are what they were.
    """

    def record(self, fn):
        self.recorded += 1
        tape = []

        class Tape(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                out = function(*args, **(kwargs or {}))
                tape.append((function, args, kwargs or {}, tree_leaves(out)))
                return out

        with Tape():
            outputs = fn()

        def replay():
            for function, args, kwargs, old in tape:
                for to, new in zip(old, tree_leaves(function(*args, **kwargs)), strict=True):
                    if isinstance(to, torch.Tensor) and to.data_ptr() != new.data_ptr():
                        to.copy_(new)
            return outputs

        return replay


def taped(*flags: str) -> tuple:
    """Give a pipeline whose loop is taped, its arguments and the recorder."""
    pipeline, args = optimized(*SMALL, *flags, "--modulation_once")
    recorder = TapeRecorder()
    loop_graph.wrap(pipeline, GraphPool(recorder))
    return pipeline, args, recorder


def latents(pipeline, args, graph: bool = True) -> torch.Tensor:
    """Run the call, through the graph or through the same pipeline's plain loop."""
    kept = pipeline.loop_graph
    pipeline.loop_graph = kept if graph else None
    found = generate(pipeline, args, output_type="latent")
    pipeline.loop_graph = kept
    return found


@pytest.fixture
def picture(tmp_path):
    render(Scene("circle", "red", "blue")).save(tmp_path / "in.png")
    return str(tmp_path / "in.png")


@pytest.mark.parametrize("model", ["tiny-schnell", "tiny-dev", "tiny-kontext"])
def test_replays_equal_the_plain_loop_to_the_bit(model, picture):
    """Prompts, seeds and guidance change what is in a graph's inputs, shapes and steps the graph.

    And nothing of a replay runs in Python: the transformer is not called.
    """
    own = ("--image", picture) if model == "tiny-kontext" else ()
    own += () if model == "tiny-schnell" else ("--guidance_scale", "1.5")
    flags = ("--ckpt", model, *own[:2], *SMALL)
    pipeline, _, recorder = taped(*flags)
    known = KINDS if model == "tiny-dev" else dict.fromkeys(list(KINDS)[:2], ())
    for k, kind in enumerate(known, 1):
        latents(pipeline, make_args("--device", "cpu", *flags, *KINDS[kind]))
        assert recorder.recorded == k, kind
    calls = [make_args("--device", "cpu", *flags, *KINDS[kind], *SAME, *own) for kind in known]
    expected = [latents(pipeline, args, graph=False) for args in calls]
    forwards = []
    pipeline.transformer.register_forward_hook(lambda *_: forwards.append(1))
    with only_known_calls():
        for args, wanted in zip(calls, expected, strict=True):
            assert torch.equal(latents(pipeline, args), wanted)
        new = make_args("--device", "cpu", *flags, "--num_inference_steps", "2")
        with pytest.raises(RuntimeError, match=r"denoising loop: .* is recorded in a timed run"):
            latents(pipeline, new)
    assert recorder.recorded == len(known) and not forwards


def test_what_a_step_leaves_in_memory_does_not_grow():
    """The bytes that live at once, which a graph's pool has to hold, are those of one step."""

    class Live(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.known, self.peak = {}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                self.known[id(tensor)] = weakref.ref(tensor)
            live = [tensor for known in self.known.values() if (tensor := known()) is not None]
            self.known = {id(tensor): weakref.ref(tensor) for tensor in live}
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in live}
            self.peak = max(self.peak, sum(storages.values()))
            return out

    pipeline, _ = optimized("--ckpt", "tiny-dev", "--modulation_once")
    width = sum(pipeline.transformer.modulation_widths)
    peaks = []
    for steps in (2, 6):
        table = torch.zeros(steps, 1, width, dtype=torch.bfloat16)
        context = torch.zeros(1, 64, pipeline.transformer.inner_dim, dtype=torch.bfloat16)
        constants = Constants(table, context, torch.zeros(128, 128), torch.zeros(128, 128))
        start = torch.zeros(1, 64, 64, dtype=torch.bfloat16)
        lengths = torch.zeros(steps)
        with torch.no_grad(), Live() as live:
            denoise(pipeline.transformer, start, None, constants, lengths)
        peaks.append(live.peak - table.nbytes)  # of which a view of one row counts as all
    assert abs(peaks[1] - peaks[0]) < start.nbytes < peaks[0] / 100  # not one latent tensor more


def test_a_step_is_the_loop_over_its_steps_and_the_row_says_so():
    pipeline, args, _ = taped()
    clock = StageClock("cpu")
    annotate_pipeline(pipeline, clock)
    runs = []
    for _ in range(2):
        generate(pipeline, args)
        runs.append(clock.read())
    assert not any("denoising_step" in run for run in runs)
    step = row.stage_seconds(runs, 3)["denoising_step"]
    assert step.samples == tuple(run["denoising_loop"][0] / 3 for run in runs)
    plan = {"loop_graph": {"state": "on", "settings": {"denoising_step": "loop/3"}}}
    stages = {"denoising_step": step.as_dict()}
    made = {"row": "x", "steps": plan, "stages_s": stages, "total_s": step.as_dict()}
    about = {"load_s": 1.0, "optimize_s": 1.0, "memory_gib": {}, "step_cache": None}
    scores = {"prompts": 1, "reference": "eager", "psnr_db_worst": None, "checker_right": None}
    scores |= {"latents_relative_l2": 0.0, "fp32_relative_l2": None}
    call = {"random_weights": False}
    text = row.render(made | about | {"quality": scores, "roofline": {}, "call": call})
    assert " s per step (loop/3)" in text
    _, rows = stage_table(series_of([made | {"format": 2, "environment": {}, "call": call}])[0])
    assert rows[0][1][0][0] == "denoising step (loop/3)"


def test_the_bar_is_full_once_the_loop_is_queued(monkeypatch):
    pipeline, args, _ = taped()
    done = []

    class Bar:
        __enter__ = __exit__ = lambda self, *_: self

        def update(self, steps):
            done.append(steps)

    monkeypatch.setattr(pipeline, "progress_bar", lambda total: Bar())
    latents(pipeline, args)
    assert done == [3]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (FLAGS[1:], "--loop_graph: found no --modulation_once"),
        ((*FLAGS, "--step_mask", "fast"), "--step_mask counts the steps"),
        ((*FLAGS, "--compile_export_mode", "disabled"), "expected compile or export_aoti"),
    ],
)
def test_refused_in_one_line_before_any_weight(flags, expected, as_machine):
    as_machine(A100)
    with pytest.raises(UserError) as refusal:
        make_args("--ckpt", "tiny-dev", *flags)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--cache_dit_config", "cache_config.yaml"), "a step cache calls"),
        (("--true_cfg_scale", "2", "--negative_prompt", "x"), "true CFG twice"),
        (("--memory", "group"), "--modulation_once calls the modulation outside"),
    ],
)
def test_what_its_own_loop_refuses_stays_refused(flags, expected, as_machine):
    as_machine(A100)
    with pytest.raises(UserError, match=expected):
        make_args("--ckpt", "tiny-dev", *FLAGS, *flags)


def test_a_trace_would_show_no_step(as_machine, monkeypatch):
    as_machine(A100)
    args = make_args(*FLAGS, checks=False)
    args.trace_file, args.machine = "t.json", A100
    verdict = loop_graph.check(args)
    assert verdict.state == "refused" and "--trace-file shows steps" in verdict.reason


def test_where_it_is_on_and_what_the_card_says(as_machine):
    assert make_args("--device", "cpu", *FLAGS).plan["loop_graph"].state == "unavailable"
    assert make_args("--device", "cpu").plan["loop_graph"].reason == "no --loop_graph"
    as_machine(A100)
    args = make_args("--random_weights", *FLAGS)
    assert args.plan["loop_graph"].is_on and args.plan["loop_graph"].lossless
    assert "denoising_step=loop/4" in card.render(args)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
@pytest.mark.parametrize("mode", ["compile", "export_aoti"])
@pytest.mark.parametrize("model", ["tiny-schnell", "tiny-dev"])
def test_gpu_the_graph_of_the_loop_equals_a_graph_per_step(model, mode, untuned, tmp_path):
    """The same code and the same packages: to the bit, for calls that change in every input."""
    where = ("--compile_export_mode", mode, "--compile_scope", "blocks")
    where += ("--cache-dir", str(tmp_path / "packages"), "--disable_quant", "--modulation_once")
    flags = ("--ckpt", model, "--device", "cuda", *SMALL, *where)
    calls = [make_args(*flags, *kind) for kind in ((), SAME, *list(KINDS.values())[1:])]
    found, graphs = [], []
    for own in ((), ("--loop_graph",)):
        torch._dynamo.reset()
        args = make_args(*flags, *own)
        pipeline = optimize(load_pipeline(args), args)
        first = [generate(pipeline, call, output_type="latent") for call in calls]
        with only_known_calls():
            for call, wanted in zip(calls, first, strict=True):
                assert torch.equal(generate(pipeline, call, output_type="latent"), wanted)
        found.append(first)
        graphs.append(pipeline.graph_pool.recorded)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    assert graphs[1] == 1 + len(KINDS)  # the warm-up's decoder, and a loop for each kind of call


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")
def test_gpu_a_replay_waits_for_nothing(untuned):
    flags = ("--ckpt", "tiny-dev", "--device", "cuda", *FLAGS, "--compile_scope", "blocks")
    args = make_args(*flags, "--compile_export_mode", "compile")
    torch._dynamo.reset()
    pipeline = optimize(load_pipeline(args), args)
    loop, expected = pipeline.loop_graph, generate(pipeline, args)[0]

    def strict(*positional, **named):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return loop(*positional, **named)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    pipeline.loop_graph = strict
    assert generate(pipeline, args)[0].tobytes() == expected.tobytes()

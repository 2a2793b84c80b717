"""Text encoders compiled and graphed, and the padding that a prompt does not need."""

import pytest
import torch
from conftest import make_args
from test_cudagraph import RerunRecorder
from torch.utils._python_dispatch import TorchDispatchMode

from utils import roofline
from utils.cudagraph import GraphPool
from utils.errors import UserError
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.quality import relative_l2
from utils.steps import text_encoders, text_padding
from utils.work import Call

SHORT, LONG = "a red circle", "a red circle on a blue background, " * 12


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(make_args("--device", "cpu"))


def encode(pipeline, *prompts: str, length: int = 256):
    with torch.no_grad():
        return pipeline.encode_prompt(list(prompts), list(prompts), max_sequence_length=length)


# --- text_encoders -----------------------------------------------------------------------------


def test_text_encoders_are_asked_for_and_need_a_compiler():
    assert make_args("--device", "cpu").plan["text_encoders"].state == "off"
    verdict = make_args(
        "--device", "cpu", "--compile_text_encoders", "--compile_export_mode", "compile"
    ).plan["text_encoders"]
    assert verdict.is_on and verdict.lossless
    with pytest.raises(UserError, match="found --compile_export_mode disabled, expected compile"):
        make_args("--device", "cpu", "--compile_text_encoders")


def test_the_blocks_of_both_encoders_are_found(pipeline):
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        assert len(text_encoders.blocks(encoder)) == encoder.config.num_hidden_layers
    groups = text_encoders.groups(pipeline)
    assert {name: len(group) for name, group in groups.items()} == {
        "clip_block": 2,
        "t5_first_block": 1,
        "t5_block": 1,
    }


class Launches(TorchDispatchMode):
    """Counts the operators that write something: on a GPU a kernel each, at least."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.count += not (op.is_view or op is torch.ops.aten._unsafe_view.default)
        return op(*args, **(kwargs or {}))


def test_docs_performance_counts_what_an_eager_block_launches(pipeline, monkeypatch):
    for encoder, expected in ((pipeline.text_encoder, 14), (pipeline.text_encoder_2, 36)):
        block, launches = text_encoders.blocks(encoder)[-1], Launches()
        forward = block.forward

        def counted(*inputs, forward=forward, launches=launches, **named):
            with launches:
                return forward(*inputs, **named)

        monkeypatch.setattr(block, "forward", counted)
        encode(pipeline, SHORT)
        assert launches.count == expected


def test_graphed_encoders_give_what_the_eager_ones_give():
    pipeline = load_pipeline(make_args("--device", "cpu"))
    expected = [encode(pipeline, prompt) for prompt in (SHORT, LONG)]
    recorder = RerunRecorder()
    text_encoders.wrap(pipeline, GraphPool(recorder))
    for _ in range(2):
        for prompt, (embeds, pooled, _ids) in zip((SHORT, LONG), expected, strict=True):
            found = encode(pipeline, prompt)
            assert torch.equal(found[0], embeds) and torch.equal(found[1], pooled)
    assert recorder.recorded == 2  # one a component: the prompt is no part of the kind of call
    encode(pipeline, SHORT, length=64)
    assert recorder.recorded == 3  # T5 has another length, CLIP always 77


def test_a_capture_makes_the_masks_of_the_warm_up(pipeline, monkeypatch):
    """A mask in one of them only is another kind of call, compiled inside of the capture."""
    from transformers import masking_utils

    plain, asked = pipeline.text_encoder_2.forward, []

    def forward(ids, **kwargs):
        asked.append(masking_utils.is_tracing(None))
        return plain(ids, **kwargs)

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ids = torch.zeros(1, 16, dtype=torch.long)
    forward(ids)
    run = text_encoders._graphed(forward, "T5", GraphPool(RerunRecorder()))
    assert torch.equal(run(ids).last_hidden_state, plain(ids).last_hidden_state)
    assert asked == [True, False, False]  # alone, recorded, replayed


class HostSpy(TorchDispatchMode):
    """Notes what a CUDA graph cannot record: a value asked for, or a copy between devices."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, out) if isinstance(x, torch.Tensor)]
        between = len({x.device.type for x in tensors}) > 1
        if between or "_local_scalar_dense" in str(func) or "nonzero" in str(func):
            self.seen.append(str(func))
        return out


def test_nothing_in_an_encoder_asks_the_host():
    """On tensors without values: no synchronisation and no copy, so a graph can record it."""
    from utils.checkpoints import resolve
    from utils.random_weights import modules

    parts = modules(resolve("tiny-schnell"), torch.bfloat16, "meta")
    for name, length in (("text_encoder", 77), ("text_encoder_2", 128)):
        ids = torch.zeros(1, length, dtype=torch.long, device="meta")
        with torch.no_grad(), HostSpy() as spy:
            parts[name].eval()(ids, output_hidden_states=False)
        assert not spy.seen, name
    with HostSpy() as spy:
        torch.zeros(2).to("meta")
        torch.ones(1).item()
    assert len(spy.seen) == 2  # they would have been noticed


@pytest.mark.slow
def test_compiled_encoders_are_as_near_to_fp32_as_eager_ones_and_compile_once():
    flags = ("--device", "cpu", "--compile_export_mode", "compile", "--compile_scope", "blocks")
    args = make_args(*flags, "--compile_text_encoders")
    exact = encode(load_pipeline(make_args("--device", "cpu", "--disable_bf16")), LONG)
    pipeline = load_pipeline(args)
    eager = encode(pipeline, LONG)
    torch._dynamo.utils.counters.clear()
    text_encoders.apply(pipeline, args)
    compiled = encode(pipeline, LONG)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 3  # CLIP, T5 first, T5 others
    for k in range(2):
        assert relative_l2(compiled[k], exact[k]) <= 1.25 * relative_l2(eager[k], exact[k])
    with torch.compiler.set_stance("fail_on_recompile"):
        encode(pipeline, SHORT)


# --- text_padding ------------------------------------------------------------------------------


def test_a_bucket_is_the_longest_prompts_and_there_are_eight(pipeline):
    tokenizer = pipeline.tokenizer_2
    assert text_padding.bucket(tokenizer, [SHORT], 512) == 64
    tokens = len(tokenizer(LONG).input_ids)
    assert tokens > 64
    assert text_padding.bucket(tokenizer, [SHORT, LONG], 512) == -(-tokens // 64) * 64
    assert text_padding.bucket(tokenizer, [LONG], 64) == 64  # cut, as without the step
    assert text_padding.bucket(tokenizer, [LONG], 100) == 100
    lengths = {text_padding.bucket(tokenizer, ["red " * n], 512) for n in range(1, 600, 3)}
    assert lengths == {64 * k for k in range(1, 9)}


def test_a_shortened_prompt_has_exactly_the_embeddings_of_its_bucket():
    args = make_args("--device", "cpu", "--drop_text_padding", "--prompt", SHORT)
    pipeline = load_pipeline(args)
    expected = encode(pipeline, SHORT, length=64)
    text_padding.apply(pipeline, args)
    for found, kept in zip(encode(pipeline, SHORT), expected, strict=True):
        assert found.shape == kept.shape and torch.equal(found, kept)
    assert encode(pipeline, SHORT, LONG)[0].shape[1] > 64  # a batch has its longest prompt's
    embeds, pooled, _ = expected
    given = pipeline.encode_prompt(prompt_embeds=embeds, pooled_prompt_embeds=pooled)
    assert given[0] is embeds  # those that are given pass through


@pytest.mark.parametrize("flags", [(), ("--modulation_once",)])
def test_the_run_is_that_of_fewer_text_tokens_and_counted_so(flags):
    args = make_args("--device", "cpu", "--drop_text_padding", *flags)
    assert not args.plan["text_padding"].lossless
    short = generate(optimize(load_pipeline(args), args), args, output_type="latent")
    told = make_args("--device", "cpu", "--max_sequence_length", "64", *flags)
    same = generate(optimize(load_pipeline(told), told), told, output_type="latent")
    assert torch.equal(short, same)
    assert isinstance(roofline.call_of(args), Call)
    assert roofline.call_of(args).text_tokens == 64 == roofline.call_of(told).text_tokens

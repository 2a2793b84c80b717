"""The step cache: its settings, and what it does to tiny-dev."""

import pytest
import torch
from conftest import make_args

from tiny_flux.scenes import Scene, render
from utils import card, quality
from utils.calls import only_known_calls
from utils.errors import UserError
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.prepare import settle_call
from utils.steps import cache_dit
from utils.steps.cache_dit import last_call, read_settings

FLUX_FAST = """
cache_type: DBCache
warmup_steps: 0
max_cached_steps: -1
Fn_compute_blocks: 1
Bn_compute_blocks: 0
residual_diff_threshold: 0.12
enable_taylorseer: true
taylorseer_cache_type: residual
taylorseer_kwargs:
  n_derivatives: 2
"""


def run_of(*flags):
    return make_args("--ckpt", "tiny-dev", "--device", "cpu", *flags)


def test_an_older_file_is_translated(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(FLUX_FAST)
    cache, taylor = read_settings(file)
    assert cache["max_warmup_steps"] == 0 and "warmup_steps" not in cache
    assert taylor["taylorseer_order"] == 2 and taylor["enable_calibrator"] is True


@pytest.mark.parametrize(("blocks", "state"), [(56, "on"), (57, "refused")])
def test_a_published_checkpoint_has_the_blocks_of_flux(blocks, state, roomy, tmp_path):
    """Its config names what differs from diffusers' defaults alone."""
    file = tmp_path / "cache.yaml"
    file.write_text(f"Fn_compute_blocks: {blocks}")
    dev = ("--ckpt", "black-forest-labs/FLUX.1-dev", "--random_weights")
    args = make_args(*dev, "--device", "cpu", "--cache_dit_config", str(file), checks=False)
    settle_call(args)
    assert cache_dit.check(args).state == state


def test_our_own_file_is_read_to_the_last_key():
    from utils.checkpoints import BUNDLED_DIR

    cache, taylor = read_settings(BUNDLED_DIR.parent / "cache_config.yaml")
    assert cache["residual_diff_threshold"] == 0.12
    assert taylor["taylorseer_order"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cache_config: {threshold: 1}", "unknown key threshold"),
        ("Fn_compute_blocks: many", "Fn_compute_blocks: found 'many', expected a whole number"),
        ("Fn_compute_blocks: 0", "Fn_compute_blocks: found 0, expected a whole number, 1 or more"),
        ("Fn_compute_blocks: null", "Fn_compute_blocks: found None, expected a whole number"),
        ("Fn_compute_blocks: 500", "Fn_compute_blocks 500 + Bn_compute_blocks 0 is 500, expected "),
        ("max_warmup_steps: 2.5", "max_warmup_steps: found 2.5, expected a whole number, 0 or"),
        ("warmup_steps: true", "max_warmup_steps: found True, expected a whole number, 0 or more"),
        ("max_cached_steps: -2", "max_cached_steps: found -2, expected a whole number, -1 or more"),
        ("residual_diff_threshold: -1", "residual_diff_threshold: found -1, expected a number, 0"),
        ("residual_diff_threshold: .nan", "residual_diff_threshold: found nan, expected a number"),
        ("residual_diff_threshold: 1e-2", "found '1e-2', expected a number, 0 or more (such as"),
        ("enable_taylorseer: maybe", "enable_taylorseer: found 'maybe', expected true or false"),
        ("taylorseer_order: one", "taylorseer_order: found 'one', expected a whole number"),
        ("taylorseer_kwargs: 2", "taylorseer_kwargs: found 2, expected keys and values"),
        ("taylorseer_cache_type: all", "found 'all', expected residual or hidden_states"),
        ("steps_computation_mask: [1, 2]", "steps_computation_mask: found [1, 2], expected a list"),
        ("", "the file is empty"),
        ("cache_config:", "the file is empty"),
        ("cache_type: DBPrune", "cache_type: expected DBCache"),
        ("- 1", "found list, expected keys and values"),
        ("a: [", "while parsing"),
        ("a: " + "[" * 5000, "no YAML: maximum recursion depth exceeded"),
        ("a: 2020-99-99", "no YAML: month must be in 1..12"),
    ],
)
def test_wrong_files_are_refused_in_one_line(text, expected, tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="--cache_dit_config") as refusal:
        run_of("--cache_dit_config", str(file))
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_missing_file_and_an_export_are_refused():
    with pytest.raises(UserError, match="No such file"):
        run_of("--cache_dit_config", "no.yaml")
    with pytest.raises(UserError, match="cannot be exported"):
        export = ("--compile_export_mode", "export_aoti")
        run_of("--cache_dit_config", "cache_config.yaml", *export)
    with pytest.raises(UserError, match="--compile_scope full"):
        whole = ("--compile_export_mode", "compile", "--compile_scope", "full")
        run_of("--cache_dit_config", "cache_config.yaml", *whole)


EAGER = ("--compile_export_mode", "disabled")
OURS = ("--cache_dit_config", "cache_config.yaml")


@pytest.fixture
def often(tmp_path):
    """Write settings that reuse as often as they may."""
    file = tmp_path / "often.yaml"
    file.write_text(
        "cache_config: {Fn_compute_blocks: 1, residual_diff_threshold: 9, max_warmup_steps: 2}"
    )
    return ("--cache_dit_config", str(file), "--num_inference_steps", "8")


def test_without_a_named_mode_the_blocks_are_compiled_and_the_card_says_so():
    args = run_of(*OURS)
    assert (args.compile_export_mode, args.compile_scope) == ("compile", "blocks")
    assert args.plan["compile"].is_on and not args.plan["cache_dit"].lossless
    text = card.render(args)
    assert "mode        compile (the default with a step cache, which cannot be exported)" in text
    assert run_of(*OURS, *EAGER).compile_export_mode == "disabled"


def test_reused_steps_are_fewer_block_calls_and_are_reported(often):
    args = run_of(*often, *EAGER)
    reference = quality.run(load_pipeline(plain := run_of(*often[2:])), plain)
    pipeline = load_pipeline(args)
    calls = []
    last = pipeline.transformer.single_transformer_blocks[-1]
    last.register_forward_hook(lambda *_: calls.append(1))
    optimize(pipeline, args)
    result = quality.run(pipeline, args)
    used = last_call(pipeline, args)
    assert 2 <= len(calls) == len(used["computed"]) < 8
    assert used["computed"][:2] == [0, 1]
    assert sorted(used["computed"] + used["reused"]) == list(range(8))
    assert card.step_cache(used)[0].startswith(f"step cache  {len(calls)} of 8 steps computed: 0-")
    assert quality.relative_l2(result.latents, reference.latents) > 0  # it is lossy
    assert last_call(pipeline, run_of()) is None


def test_nothing_leaks_between_calls_or_into_other_pipelines(often):
    args = run_of(*often, *EAGER)
    pipeline = optimize(load_pipeline(args), args)
    first = generate(pipeline, args)[0]
    used = last_call(pipeline, args)
    others = (
        ("--prompt", "a large green square", "--seed", "5"),
        ("--width", "160", "--height", "96", "--num_images_per_prompt", "2"),
        ("--num_inference_steps", "3"),  # ends inside of a cycle
    )
    for other in others:
        generate(pipeline, run_of(*often, *other, *EAGER))
        assert generate(pipeline, args)[0].tobytes() == first.tobytes(), other
        assert last_call(pipeline, args) == used
    plain = run_of(*often[2:])
    stock = load_pipeline(plain)
    assert "_is_cached" not in vars(type(stock)) and not hasattr(stock, "_is_cached")
    second = optimize(load_pipeline(args), args)
    assert generate(second, args)[0].tobytes() == first.tobytes()
    assert generate(pipeline, args)[0].tobytes() == first.tobytes()
    expected = quality.run(load_pipeline(plain), plain).images[0]
    assert generate(stock, plain)[0].tobytes() == expected.tobytes()


def test_an_interrupted_call_leaves_nothing_behind(often):
    args = run_of(*often, *EAGER)
    pipeline = optimize(load_pipeline(args), args)
    first = generate(pipeline, args)[0]
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    handle = pipeline.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate(pipeline, args)
    handle.remove()
    assert generate(pipeline, args)[0].tobytes() == first.tobytes()


@pytest.mark.parametrize("model", ["tiny-dev", "tiny-kontext"])
def test_our_settings_save_steps_and_keep_the_picture(model, reference, tmp_path):
    """At 28 steps, with the settings that the README recommends."""
    image = tmp_path / "in.png"
    render(Scene("circle", "red", "blue")).save(image)
    flags = ("--ckpt", model, *(("--image", str(image)) if model == "tiny-kontext" else ()))
    args = make_args("--device", "cpu", *flags, *OURS, *EAGER)
    pipeline = optimize(load_pipeline(args), args)
    scores = quality.compare(quality.run(pipeline, args), reference(*flags))
    assert len(last_call(pipeline, args)["reused"]) >= 8
    assert scores["psnr_db_worst"] > 31, scores


def test_compiled_blocks_without_graph_breaks_or_recompilation(often):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    args = run_of(*often)  # no mode is named
    pipeline = optimize(load_pipeline(args), args)
    first = quality.run(pipeline, args)
    used = last_call(pipeline, args)
    eager = run_of(*often, *EAGER)
    reference = quality.run(optimize(load_pipeline(eager), eager), eager)
    assert quality.compare(first, reference)["psnr_db_worst"] > 35
    generate(pipeline, run_of(*often, "--prompt", "a white ring", "--seed", "3"))
    with only_known_calls():
        again = quality.run(pipeline, args)
    assert again.images[0].tobytes() == first.images[0].tobytes()
    assert last_call(pipeline, args) == used
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3


def test_more_computed_blocks_than_there_are_is_one_line(tmp_path):
    file = tmp_path / "deep.yaml"
    file.write_text("Fn_compute_blocks: 2\nBn_compute_blocks: 1")
    with pytest.raises(UserError, match=r"is 3, expected fewer than the 3 blocks of tiny-dev"):
        run_of("--cache_dit_config", str(file), *EAGER)


def test_optional_keys_may_be_none_and_limits_may_be_off(tmp_path):
    file = tmp_path / "open.yaml"
    file.write_text(
        "Fn_compute_blocks: 1\nmax_cached_steps: -1\nnum_inference_steps: null\n"
        "max_accumulated_residual_diff_threshold: 0.5\nsteps_computation_mask: [1, 0]\n"
    )
    cache, taylor = read_settings(file)
    assert cache["num_inference_steps"] is None and cache["steps_computation_mask"] == [1, 0]
    assert not taylor


def test_every_key_of_cache_dit_has_a_type():
    import dataclasses

    from cache_dit import DBCacheConfig

    from utils.steps import cache_dit

    typed = {*cache_dit.LEAST, *cache_dit.THRESHOLDS, *cache_dit.SWITCHES, *cache_dit.CHOICES}
    keys = {field.name for field in dataclasses.fields(DBCacheConfig)}
    assert keys | set(cache_dit.TAYLOR_KEYS) == typed | {"cache_type", "steps_computation_mask"}

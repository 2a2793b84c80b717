"""The step cache's settings, and its mechanics on a random-weight Dev of the bundled size."""

import json
import shutil

import pytest
from conftest import make_args

from utils import quality
from utils.errors import UserError
from utils.pipeline_utils import generate, load_pipeline, optimize
from utils.steps.cache_dit import read_settings

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


@pytest.fixture(scope="module")
def dev(tmp_path_factory):
    """Make a folder with the bundled configs and a guidance embedding: an architecture of Dev."""
    from utils.checkpoints import BUNDLED_DIR

    folder = tmp_path_factory.mktemp("dev")
    ignore = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(BUNDLED_DIR / "tiny-schnell", folder, ignore=ignore, dirs_exist_ok=True)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"guidance_embeds": True}))
    return str(folder)


def run_of(dev, *flags):
    return make_args("--ckpt", dev, "--random_weights", "--device", "cpu", *flags)


def test_an_older_file_is_translated(tmp_path):
    file = tmp_path / "old.yaml"
    file.write_text(FLUX_FAST)
    cache, taylor = read_settings(file)
    assert cache["max_warmup_steps"] == 0 and "warmup_steps" not in cache
    assert taylor["taylorseer_order"] == 2 and taylor["enable_calibrator"] is True


def test_our_own_file_is_read_to_the_last_key():
    from utils.checkpoints import BUNDLED_DIR

    cache, taylor = read_settings(BUNDLED_DIR.parent / "cache_config.yaml")
    assert cache["residual_diff_threshold"] == 0.12
    assert taylor["taylorseer_order"] == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cache_config: {threshold: 1}", "unknown key threshold"),
        ("Fn_compute_blocks: many", "Fn_compute_blocks: found 'many', expected a number"),
        ("cache_type: DBPrune", "cache_type: expected DBCache"),
        ("- 1", "found list, expected keys and values"),
        ("a: [", "while parsing"),
    ],
)
def test_wrong_files_are_refused_in_one_line(text, expected, tmp_path, dev):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="--cache_dit_config") as refusal:
        run_of(dev, "--cache_dit_config", str(file))
    assert expected in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_a_missing_file_and_an_export_are_refused(dev):
    with pytest.raises(UserError, match="No such file"):
        run_of(dev, "--cache_dit_config", "no.yaml")
    with pytest.raises(UserError, match="cannot be exported"):
        export = ("--compile_export_mode", "export_aoti")
        run_of(dev, "--cache_dit_config", "cache_config.yaml", *export)
    with pytest.raises(UserError, match="--compile_scope full"):
        whole = ("--compile_export_mode", "compile", "--compile_scope", "full")
        run_of(dev, "--cache_dit_config", "cache_config.yaml", *whole)


def test_reused_steps_are_fewer_block_calls_and_nothing_leaks_between_calls(dev, tmp_path):
    file = tmp_path / "eager.yaml"
    file.write_text(
        "cache_config: {Fn_compute_blocks: 1, residual_diff_threshold: 9, max_warmup_steps: 2}"
    )
    args = run_of(dev, "--cache_dit_config", str(file), "--num_inference_steps", "8")
    plain = run_of(dev, "--num_inference_steps", "8")
    assert args.guidance_scale == 3.5 and args.plan["cache_dit"].is_on
    reference = quality.run(load_pipeline(plain), plain)
    pipeline = load_pipeline(args)
    calls = []
    last = pipeline.transformer.single_transformer_blocks[-1]
    last.register_forward_hook(lambda *_: calls.append(1))
    optimize(pipeline, args)
    first = quality.run(pipeline, args)
    assert 2 <= len(calls) < 8
    again = generate(pipeline, args)[0]
    assert again.tobytes() == first.images[0].tobytes()
    assert quality.relative_l2(first.latents, reference.latents) > 0  # it is lossy, and says so
    assert not args.plan["cache_dit"].lossless


def test_more_computed_blocks_than_there_are_is_one_line(dev, tmp_path):
    file = tmp_path / "deep.yaml"
    file.write_text("Fn_compute_blocks: 8")
    args = run_of(dev, "--cache_dit_config", str(file))
    with pytest.raises(UserError, match=r"is 8, expected fewer than the 3 blocks"):
        optimize(load_pipeline(args), args)

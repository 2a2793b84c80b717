"""What torch.compile has made, in the store: found again, refused by field, not opened damaged."""

from types import SimpleNamespace

import pytest
import torch
from aoti_pieces import generate, make_args, make_pipeline

from utils import artifacts
from utils.errors import UserError
from utils.steps import compile, inductor_tuning_flags, on

PARTS = SimpleNamespace(transformer="a transformer", vae=SimpleNamespace(decoder="a decoder"))
CALL = {"prompt": ["x"], "num_images_per_prompt": 1, "text_tokens": 32}


def arguments(root, **changes):
    settings = {"compile_export_mode": "compile", "compile_scope": "blocks"}
    settings |= CALL | {"guidance_scale": None, "cache_dit_config": None}
    settings |= {"drop_text_padding": False}
    return make_args(root, **(settings | changes))


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Store three bytes for a run as the step does: the folder, its arguments, what was loaded."""
    loaded = []
    monkeypatch.setattr(torch.compiler, "save_cache_artifacts", lambda: (b"abc", None))
    monkeypatch.setattr(torch.compiler, "load_cache_artifacts", loaded.append)
    args = arguments(tmp_path / "cache")
    root = artifacts.open_cache(args.cache_dir)
    identity, is_new = compile._load(root, PARTS, args)
    assert is_new and not loaded
    compile._store(root, identity)
    return root, args, loaded


def test_the_next_start_of_the_same_run_loads_it(stored):
    root, args, loaded = stored
    args.use_cached_model = True
    assert compile.check(args).is_on
    assert compile._load(root, PARTS, args)[1] is False and loaded == [b"abc"]
    args.use_cached_model, args.force_export = False, True
    assert compile._load(root, PARTS, args)[1] is True and loaded == [b"abc"]


def test_what_another_process_removes_meanwhile_is_compiled_anew(stored, monkeypatch):
    root, args, loaded = stored
    find = artifacts.find

    def found(*where):
        package = find(*where)
        for path in package[0].files.values():
            path.unlink()
        return package

    monkeypatch.setattr("utils.artifacts.store.find", found)
    assert compile._load(root, PARTS, args)[1] is True and not loaded


@pytest.mark.parametrize(
    ("changes", "field", "early"),
    [
        ({"width": 32}, "call.size: found 16x16, expected 32x16", True),
        ({"prompt": ["x", "y"]}, "call.images: found 1, expected 2", True),
        ({"text_tokens": 64}, "text_tokens: found 32, expected 64", True),
        ({"text_tokens": 64, "drop_text_padding": True}, "text_tokens: found 32, exp", False),
        ({"guidance_scale": 3.5}, "call.guidance: found False, expected True", True),
        ({"compile_scope": "full"}, "scope: found blocks, expected full", True),
        ({"dtype": torch.bfloat16}, "dtype: found torch.float32, expected torch.bfloat16", True),
        ({"plan": {"quant": on(granularity="row")}}, "steps.quant.granularity: found noth", False),
    ],
    ids=["size", "batch", "text", "unpadded", "guidance", "scope", "dtype", "steps"],
)
def test_another_run_is_refused_by_field(stored, changes, field, early):
    root, _, loaded = stored
    args = arguments(root, use_cached_model=True, **changes)
    verdict = compile.check(args)
    assert (verdict.state == "refused" and field in verdict.reason) is early
    with pytest.raises(UserError, match=field):
        compile._load(root, PARTS, args)
    assert not loaded


def test_a_damaged_file_is_compiled_anew_and_never_loaded(stored, capsys):
    root, args, loaded = stored
    (path,) = root.glob("*.compiled")
    path.write_bytes(b"abd")
    assert compile._load(root, PARTS, args)[1] is True
    said = capsys.readouterr().err
    assert "stored package is damaged or does not fit" in said and "sha256: found" in said
    args.use_cached_model = True
    with pytest.raises(UserError, match="sha256: found"):
        compile._load(root, PARTS, args)
    path.write_bytes(b"abc")
    path.chmod(0o666)
    with pytest.raises(UserError, match="mode: found 0666"):
        compile._load(root, PARTS, args)
    assert not loaded


def test_a_full_disk_costs_the_stored_copy_and_not_the_run(stored, monkeypatch, capsys):
    root, args, _ = stored

    def full(*_):
        raise UserError("No space left on device")

    monkeypatch.setattr(artifacts, "save", full)
    compile._store(root, compile._load(root, PARTS, args)[0])
    assert "compile: not stored: No space left on device" in capsys.readouterr().err


def test_torch_gives_and_takes_real_artefacts_through_the_store(tmp_path):
    """One Linear is a call of a library: Inductor makes a graph of it, and no C++ compiler runs."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    args, linear, x = arguments(tmp_path / "cache"), torch.nn.Linear(8, 8), torch.randn(4, 8)
    root = artifacts.open_cache(args.cache_dir)
    for is_new in (True, False):
        torch._dynamo.reset()
        counters.clear()
        with fresh_cache(), torch.no_grad():
            torch.compiler._cache.CacheArtifactManager.clear()
            identity, found_new = compile._load(root, PARTS, args)
            assert found_new is is_new
            assert torch.equal(torch.compile(linear)(x), linear(x))
            if is_new:
                compile._store(root, identity)
        hits, misses = (counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
        assert (hits, misses) == ((0, 1) if is_new else (1, 0))


def test_a_run_with_compiled_text_encoders_is_another(stored):
    root, args, loaded = stored
    args.compile_text_encoders = args.use_cached_model = True
    with pytest.raises(UserError, match="parts: found"):
        compile._load(root, PARTS, args)
    assert not loaded


@pytest.mark.slow
def test_a_second_start_compiles_no_graph(tmp_path, monkeypatch):
    """Both starts with empty compiler caches: only the store is left between them."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    monkeypatch.setattr("utils.pipeline_utils.generate", generate)
    images = []
    for use_cached_model in (False, True):
        torch._dynamo.reset()
        counters.clear()
        with fresh_cache():
            pipeline = make_pipeline()
            args = arguments(tmp_path / "cache", use_cached_model=use_cached_model)
            args.plan["inductor_tuning_flags"] = inductor_tuning_flags.check(args)
            compile.apply(pipeline, args)
            images.append(generate(pipeline, args))
        misses = counters["inductor"]["fxgraph_cache_miss"]
        assert (misses == 0) is use_cached_model
    assert torch.equal(*images)

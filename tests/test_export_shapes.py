"""Packages of several kinds of call at once: a batch of four, and FLUX.1's wide format in small."""

from pathlib import Path

import pytest
from conftest import make_args

from utils import quality
from utils.artifacts import open_cache, read_manifest
from utils.calls import only_known_calls
from utils.pipeline_utils import generate, load_pipeline, optimize

# 1024x1024 and 768x1344, each edge a quarter
CALLS = {
    "square": ("--height", "256", "--width", "256"),
    "wide": ("--height", "192", "--width", "336"),
    "four": ("--height", "256", "--width", "256", "--num_images_per_prompt", "4"),
}


@pytest.mark.slow
def test_a_family_of_packages_serves_sizes_and_batches(reference, tmp_path):
    """One process, three kinds of call, each lossless; a second process builds nothing."""
    steps = ("--num_inference_steps", "2")
    cache = ("--compile_export_mode", "export_aoti", "--cache-dir", str(tmp_path / "cache"))
    runs = {k: make_args("--device", "cpu", *cache, *v, *steps) for k, v in CALLS.items()}
    pipeline = optimize(load_pipeline(runs["square"]), runs["square"])
    for name, args in runs.items():
        eager = reference(*CALLS[name], *steps)
        exact = reference(*CALLS[name], *steps, "--disable_bf16")
        found = quality.run(pipeline, args)  # of another kind: its packages are built now
        ours = quality.relative_l2(found.latents, exact.latents)
        assert ours <= 1.25 * quality.relative_l2(eager.latents, exact.latents), name
    assert [image.size for image in generate(pipeline, runs["wide"])] == [(336, 192)]
    with only_known_calls():
        assert len(generate(pipeline, runs["four"])) == 4
    root = open_cache(runs["square"].cache_dir)
    manifests = [read_manifest(path)[0] for path in root.glob("transformer-*.json")]
    covered = {tuple(m["identity"]["inputs"]["hidden_states"]["shape"]) for m in manifests}
    assert covered == {(1, 256, 64), (1, 252, 64), (4, 256, 64)}
    again = make_args("--device", "cpu", *cache, *CALLS["wide"], *steps, "--use-cached-model")
    before = sorted(path.name for path in Path(root).iterdir())
    second = optimize(load_pipeline(again), again)
    assert quality.run(second, again).latents.equal(quality.run(pipeline, runs["wide"]).latents)
    assert sorted(path.name for path in Path(root).iterdir()) == before

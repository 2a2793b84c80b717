"""Requests with a memory: what belongs to a request, what a hit saves, what harm is survived."""

import ast
import copy
import os
import shutil
import threading
from pathlib import Path

import doctor_pieces
import pytest
from conftest import make_args
from doctor_pieces import ROOT, without
from PIL import Image

from extras import cached, prompts
from utils import artifacts, embeddings
from utils.errors import UserError

PICTURE = {  # flags that may change the picture: each has to enter the key
    "acceleration",
    "artifact_digest",
    "artifact_repo",
    "attention_backend",
    "cache_dit_config",
    "channel_group_norm",
    "ckpt",
    "compile_export_mode",
    "compile_scope",
    "compile_image_encoder",
    "compile_text_encoders",
    "conv_benchmark",
    "deferred_scales",
    "device",
    "disable_bf16",
    "disable_channels_last",
    "disable_device_images",
    "disable_fa3",
    "disable_fused_projections",
    "disable_inductor_tuning_flags",
    "disable_quant",
    "drop_text_padding",
    "fa3_dtype",
    "fa3_rotation",
    "fused_kernels",
    "fusion_limits",
    "fused_mlp",
    "gguf_file",
    "gguf_mode",
    "guidance_scale",
    "height",
    "image",
    "loop_graph",
    "lora",
    "max_sequence_length",
    "memory",
    "modulation_once",
    "negative_prompt",
    "num_images_per_prompt",
    "num_inference_steps",
    "persistent_tma",
    "prompt",
    "quant_dtype",
    "quant_filter",
    "quant_granularity",
    "quant_text_encoder",
    "random_weights",
    "scheduler",
    "seed",
    "sigmas",
    "static_scales",
    "step_mask",
    "step_mask_gain",
    "step_mask_order",
    "subpixel_upsampling",
    "swap_loras",
    "triton_float8",
    "true_cfg_scale",
    "vae_attention",
    "width",
}


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    return make_args("--device", "cpu", "--cache-dir", str(tmp_path_factory.mktemp("cache")))


def name(args) -> str:
    """Give what an entry of this request is called."""
    return artifacts.name_of(cached.request_identity(args))


def test_every_flag_is_classified():
    from utils.benchmark_utils import create_parser

    flags = {action.dest for action in create_parser()._actions} - {"help"}
    unknown = flags - PICTURE - cached.NEUTRAL.keys()
    assert not unknown, "does it change the picture? PICTURE here, or NEUTRAL in extras/cached.py"
    assert flags >= PICTURE and not cached.NEUTRAL.keys() & PICTURE


def test_each_field_changes_the_key_and_neutral_ones_do_not(args, monkeypatch):
    before, of_run = name(args), cached._of_run(args)
    for flag in cached.NEUTRAL:
        other = copy.copy(args)
        setattr(other, flag, getattr(args, flag, None) if flag == "cache_dir" else "another value")
        assert name(other) == before, flag
    monkeypatch.setattr(cached, "_of_run", lambda args: of_run)  # the flag itself has to count
    for flag in PICTURE:
        other = copy.copy(args)
        setattr(other, flag, "another value")
        if flag in ("image", "gguf_file"):  # of any content: its digest counts
            setattr(other, flag, str(ROOT / "tiny_flux" / "source.png"))
        assert name(other) != before, flag


def test_contents_count_where_a_flag_names_a_file(args, tmp_path):
    other = copy.copy(args)
    other.image = str(tmp_path / "x.png")
    names = set()
    for colour in ("red", "blue"):
        Image.new("RGB", (16, 16), colour).save(other.image)
        names.add(name(other))
    assert len(names) == 2


def test_a_long_negative_prompt_is_no_file(args):
    other = copy.copy(args)
    other.negative_prompt = "no " * 100
    assert cached.request_identity(other)["files"] == {}


def test_what_takes_more_than_one_call_is_refused(monkeypatch):
    """Of swapped LoRAs only the first would have been drawn."""
    for module, flags in ((cached, []), (prompts, ["--generate"])):
        monkeypatch.setattr("sys.argv", ["x", *flags, "--prompt", "a", "--swap_loras"])
        with pytest.raises(UserError, match=r"--swap_loras: .* use --lora alone, or gen_image"):
            module.main()


def test_settings_of_steps_weights_versions_and_code_count(args, tmp_path, monkeypatch):
    root, identity = artifacts.open_cache(tmp_path / "c"), cached.request_identity(args)
    artifacts.save(root, identity, {cached.FIRST: b"png"}, {})
    assert cached.find_pictures(root, identity) == ([b"png"], [])

    def refused(found: dict, field: str) -> bool:
        pictures, lines = cached.find_pictures(root, found)
        return not pictures and any(field in line for line in lines)

    off = copy.copy(args)
    off.plan = {k: v for k, v in args.plan.items() if k != "channels_last"}
    assert refused(cached.request_identity(off), "steps.channels_last: found")
    weights = tmp_path / "tiny"
    shutil.copytree(ROOT / "tiny_flux" / "tiny-schnell", weights)
    config = weights / "scheduler" / "scheduler_config.json"
    here = make_args("--device", "cpu", "--ckpt", str(weights), "--cache-dir", args.cache_dir)
    before = cached.request_identity(here)
    config.write_text(config.read_text() + "\n")
    assert cached.request_identity(here)["checkpoint"] != before["checkpoint"]
    for field in ("torch", "transformers"):
        other = {"versions": identity["versions"] | {field: "1.0"}}
        assert refused(identity | other, f"versions.{field}: found")
    assert refused(identity | {"code": "0"}, "code: found")


def request(folder: Path, *flags: str, **around) -> tuple[doctor_pieces.Done, Path]:
    """Make a request of the memory in `folder`'s parent; gives what was said, and the picture."""
    folder.mkdir(exist_ok=True)
    words = ("-m", "extras.cached", "--request_cache", folder.parent / "memory", "--device", "cpu")
    words = (*words, "--cache-dir", folder.parent / "packages", "--output-file", folder / "x.png")
    return doctor_pieces.run(*words, *flags, folder=folder, **around), folder / "x.png"


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Make one request, and give the folder of the memory and what the request left."""
    folder = tmp_path_factory.mktemp("requests")
    done, picture = request(folder / "first")
    assert done.code == 0, done.output
    return folder, done, picture.read_bytes()


def test_a_request_that_was_made_before_loads_nothing(first, tmp_path_factory):
    folder, done, picture = first
    assert "text        encoded and stored" in done.output and "request     made" in done.output
    assert (folder / "memory").stat().st_mode & 0o777 == 0o700
    again, found = request(folder / "again", before=without_diffusers)
    assert again.code == 0, again.output
    assert "request     found" in again.output
    assert found.read_bytes() == picture
    other, _ = request(folder / "other", "--seed", "1", before=without_diffusers)
    assert other.code == 2 and "diffusers is not installed" in other.output  # that one has to load


def without_diffusers() -> None:
    without("diffusers")


def test_another_seed_takes_the_embeddings_of_the_first(first, tmp_path):
    folder, _, _ = first
    done, picture = request(folder / "seed", "--seed", "3")
    assert "text        found" in done.output
    call = ("gen_image.py", "--device", "cpu", "--seed", "3", "--output-file", tmp_path / "y.png")
    assert doctor_pieces.run(*call, folder=tmp_path).code == 0
    with Image.open(picture) as one, Image.open(tmp_path / "y.png") as other:
        assert one.tobytes() == other.tobytes()
        assert one.text == other.text  # how it was made


@pytest.mark.parametrize(
    "harm", ["cut off", *(pytest.param(x, marks=pytest.mark.slow) for x in ("changed", "none"))]
)
def test_a_damaged_entry_is_found_and_made_again(first, harm):
    folder, _, picture = first
    (stored,) = [p for p in (folder / "memory").glob("*.png0") if p.read_bytes() == picture]
    name = stored.name.rsplit("-", 1)[0]
    if harm == "cut off":
        stored.write_bytes(picture[:100])
    elif harm == "changed":
        stored.write_bytes(picture[:-20] + b"x" + picture[-19:])
    else:
        (folder / "memory" / f"{name}.json").write_text("{")
    done, again = request(folder / "harm")
    assert done.code == 0 and "request     made" in done.output
    said = {"cut off": "size: found 100", "changed": "sha256: found", "none": "manifest"}
    assert said[harm] in done.output
    assert again.read_bytes() == picture
    done, again = request(folder / "harm", before=without_diffusers)
    assert "request     found" in done.output and again.read_bytes() == picture


def test_of_two_processes_at_once_one_makes_the_picture(tmp_path):
    results = {}

    def make(name: str) -> None:
        results[name] = request(tmp_path / name, "--seed", "9")

    threads = [threading.Thread(target=make, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    outputs = [done.output for done, _ in results.values()]
    assert [done.code for done, _ in results.values()] == [0, 0], outputs
    assert sorted("request     made" in output for output in outputs) == [False, True]
    a, b = (picture.read_bytes() for _, picture in results.values())
    assert a == b
    assert not list((tmp_path / "memory").glob(".*"))


def test_what_is_stored_is_what_was_made_whoever_writes_the_output(tmp_path, monkeypatch):
    """Two requests in one folder have the same name for their picture."""
    from utils import images, pipeline_utils

    args = make_args("--device", "cpu", "--output-file", str(tmp_path / "x.png"))
    identity, root = {"component": "request"}, artifacts.open_cache(tmp_path / "memory")
    drawn = Image.new("RGB", (16, 16), "red")
    save = images.save_images

    def saved(*given) -> list[Path]:
        paths = save(*given)
        (tmp_path / "x.png").write_bytes(b"the other request's")
        return paths

    monkeypatch.setattr(images, "save_images", saved)
    monkeypatch.setattr(pipeline_utils, "load_pipeline", lambda args, without: None)
    monkeypatch.setattr(pipeline_utils, "optimize", lambda pipeline, args, parts: None)
    monkeypatch.setattr(pipeline_utils, "generate", lambda pipeline, args: [drawn])
    monkeypatch.setattr(pipeline_utils, "reused_steps", lambda pipeline, args: None)
    monkeypatch.setattr(embeddings.Remembered, "install", lambda *_: None)
    with artifacts.building(root, identity) as scratch:
        paths = cached.make(args, root, identity, scratch)
    assert paths == [tmp_path / "x.png"]
    assert cached.find_pictures(root, identity)[0] == [paths[0].read_bytes()]
    with Image.open(paths[0]) as picture:
        assert picture.getpixel((0, 0)) == (255, 0, 0)


def test_what_was_used_longest_ago_leaves_first(tmp_path, capsys):
    root = artifacts.open_cache(tmp_path / "memory")
    identities = [{"component": "request", "seed": k} for k in range(4)]
    for k, identity in enumerate(identities):
        artifacts.save(root, identity, {cached.FIRST: os.urandom(50_000)}, {})
        os.utime(root / f"{artifacts.name_of(identity)}.json", (1000 + k, 1000 + k))
    cached.evict(root, 300_000)
    assert all(cached.find_pictures(root, identity)[0] for identity in identities)
    for k, identity in enumerate(identities):
        os.utime(root / f"{artifacts.name_of(identity)}.json", (1000 + k, 1000 + k))
    assert cached.find_pictures(root, identities[0])[0]  # used now
    cached.evict(root, 120_000)
    left = [bool(cached.find_pictures(root, identity)[0]) for identity in identities]
    assert left == [True, False, False, True]
    assert not capsys.readouterr().out


def test_the_core_imports_nothing_of_the_extras():
    """So that benchmarks have no memory."""
    for file in (*ROOT.glob("*.py"), *(ROOT / "utils").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                names += [getattr(node, "module", None) or ""]
                assert not any(name.split(".")[0] == "extras" for name in names), file

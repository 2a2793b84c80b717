"""Calibrated step masks: what the search foretells, what the fit reaches, which files are read."""

import itertools
import json
import subprocess
import sys

import numpy
import pytest
import torch
from conftest import make_args

from utils import calibrate, card, fit_mask, mask_file, quality
from utils.errors import UserError
from utils.masked_forward import MaskedForward
from utils.pipeline_utils import load_pipeline, optimize, reused_steps

STEPS = 9
DEV = ("--ckpt", "tiny-dev", "--device", "cpu", "--max_sequence_length", "64")
SHORT = (*DEV, "--num_inference_steps", str(STEPS))


def trajectories(pictures=2, steps=8, size=40):
    """Velocities that do not depend on the latents, and the size of every step."""
    random = torch.Generator().manual_seed(0)
    slow = torch.randn(pictures, 3, size, generator=random, dtype=torch.float64)
    time = torch.linspace(0, 1, steps, dtype=torch.float64)
    factors = torch.stack([torch.ones(steps), time, (4 * time).sin()])
    noise = 0.05 * torch.randn(pictures, steps, size, generator=random, dtype=torch.float64)
    velocities = torch.einsum("ks,pkd->psd", factors.double(), slow) + noise
    return velocities, -numpy.linspace(0.05, 0.2, steps)


def test_the_foretold_error_is_the_one_on_the_way():
    velocities, step_sizes = trajectories()
    grams = torch.stack([fit_mask.gram_of(list(v)) for v in velocities]).numpy()
    mask = numpy.array([c == "1" for c in "11010010"])
    mean, off, known = grams.mean(0), torch.zeros(2, 40).double(), []
    squared = torch.zeros(2).double()
    for step, computed in enumerate(mask):
        if computed:
            squared, known = squared + off.square().sum(1), [*known, step]
            continue
        last = known[-2:]
        weights = fit_mask.solve(mean[numpy.ix_(last, last)], mean[last, step])
        found = sum(w * velocities[:, k] for w, k in zip(weights, last, strict=True))
        off += step_sizes[step] * (found - velocities[:, step])
    expected = float((squared + off.square().sum(1)).log().mean())
    assert fit_mask.off_by(mask, grams, step_sizes) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("computed", [2, 4])
def test_the_search_finds_what_trying_all_masks_finds(computed):
    velocities, step_sizes = trajectories()
    grams = torch.stack([fit_mask.gram_of(list(v)) for v in velocities]).numpy()
    errors = {}
    for chosen in itertools.combinations(range(1, 8), computed - 1):
        mask = numpy.isin(numpy.arange(8), (0, *chosen))
        errors[tuple(mask)] = fit_mask.off_by(mask, grams, step_sizes)
    found = fit_mask.search(grams, step_sizes, computed)
    assert found[0] and found.sum() == computed
    assert errors[tuple(found)] == min(errors.values()) < max(errors.values()) - 1


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """Write a file with five of nine steps. Returns: its path"""
    path = tmp_path_factory.mktemp("mask") / "mask.json"
    before = sys.argv
    sys.argv = ["calibrate.py", *SHORT, "--computed", "5", "--mask_file", str(path)]
    try:
        calibrate.main()
    finally:
        sys.argv = before
    return path


def result_of(*flags):
    args = make_args(*SHORT, *flags)
    pipeline = optimize(load_pipeline(args), args)
    return quality.run(pipeline, args), reused_steps(pipeline, args)


def test_a_calibrated_mask_beats_the_same_number_of_steps_without(calibrated):
    """On a prompt and a seed that the calibration has not seen."""
    full, _ = result_of()
    errors = {}
    for mask in (str(calibrated), "1,1,1,0,1,0,1,0,0", "1,0,1,0,1,0,1,0,1"):
        found, used = result_of("--step_mask", mask)
        assert len(used["computed"]) == 5
        errors[mask] = quality.compare(found, full)["latents_relative_l2"]
    assert errors[str(calibrated)] < 0.95 * min(list(errors.values())[1:]), errors
    assert "calibrated=" in card.render(make_args(*SHORT, "--step_mask", str(calibrated)))


def test_the_error_that_is_told_is_that_of_the_file(calibrated):
    found = mask_file.load(str(calibrated))
    words = [word for prompt in found.prompts for word in ("--prompt", prompt)]
    flags = (*words, "--seed", str(calibrate.SEED))
    full, _ = result_of(*flags)
    ours, _ = result_of(*flags, "--step_mask", str(calibrated))
    told = quality.compare(ours, full)["latents_relative_l2"]
    assert len(ours.images) == calibrate.PROMPTS == 4
    assert told == pytest.approx(found.latents_error, rel=0.1)  # the decoder's scale and shift
    assert found.checkpoint == "tiny-dev" and found.environment["versions"]


def test_an_edited_pictures_tokens_are_no_part_of_the_fit(tmp_path):
    flags = ("--ckpt", "tiny-kontext", "--image", "tiny_flux/source.png", "--device", "cpu")
    argv = [*flags, "--max_sequence_length", "64", "--num_inference_steps", "5", "--computed", "3"]
    args = calibrate.settle(argv, calibrate.parser())
    pipeline = optimize(load_pipeline(args), args)
    full, step_sizes = fit_mask.record(pipeline, args)
    assert full.latents[0].shape == full.velocities[0].shape == (4, 64, 64)
    mask, table, error = fit_mask.fit(pipeline, args, full, step_sizes, 3)
    assert mask.count("1") == 3 and len(table) == 2 and 0 < error < 0.1
    assert type(pipeline.masked) is MaskedForward  # nothing of the calibration stays


def test_files_are_read_as_written():
    found = mask_file.MaskFile("1101", {2: (0.1, 0.9)}, 0.01, "x", "sha256:0", 4096, None)
    assert found.order == 1 and mask_file.is_file("a.JSON") and not mask_file.is_file("1,0,1")
    assert mask_file.MaskFile("11", {}, 0.0, "x", "sha256:0", 4096, None).order == 0
    text = mask_file.dump(found).decode()
    assert json.loads(text)["weights"] == {"2": [0.1, 0.9]} and "format" in text


def test_a_file_equals_what_was_dumped(calibrated, tmp_path):
    found = mask_file.load(str(calibrated))
    (tmp_path / "again.json").write_bytes(mask_file.dump(found))
    assert mask_file.load(str(tmp_path / "again.json")) == found


def edited(path, folder, **fields):
    other = folder / "other.json"
    other.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return str(other)


@pytest.mark.parametrize(
    ("fields", "flags", "expected"),
    [
        ({}, ("--num_inference_steps", "8"), "calibrated for 9 steps, found 8"),
        ({}, ("--height", "96"), "calibrated for 16384 pixels"),
        ({}, ("--step_mask_gain", "0.5"), "weights of its own; leave out --step_mask_gain"),
        ({"identity": "sha256:1"}, (), "calibrated for other weights, those of tiny-dev"),
        ({"format": 2}, (), "expected a file of python -m utils.calibrate, format 1"),
        ({"mask": "111111111"}, (), "its weights are not those of its mask"),
        ({"mask": 7}, (), "damaged"),
        ({"weights": {"2": [1.0]}}, (), "its weights are not those of its mask"),
        ({"weights": [1.0]}, (), "damaged"),
        ({"mask": [*"111111111"], "weights": {}}, (), "damaged (its weights are not those of"),
        (
            {"mask": "111111110", "weights": {"8": [float("nan")]}},
            (),
            "a weight beyond 1000, or not",
        ),
        (
            {"mask": "111111110", "weights": {"8": [1e30]}},
            (),
            "a weight beyond 1000, or not finite",
        ),
        ({"guidance": "2"}, (), "latents_error, pixels or guidance is no number"),
        ({"identity": None}, (), "checkpoint or identity is no text"),
        ({"surprise": 1}, (), "damaged"),
    ],
)
def test_files_of_other_runs_are_refused_in_one_line(calibrated, tmp_path, fields, flags, expected):
    with pytest.raises(UserError, match="--step_mask") as refusal:
        make_args(*SHORT, "--step_mask", edited(calibrated, tmp_path, **fields), *flags)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_the_command_needs_no_torch_to_refuse_a_flag():
    code = "import sys, utils.calibrate as c; c.parser(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_no_file_and_no_json_are_one_line(tmp_path):
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    for name in ("missing.json", "broken.json", "deep.json"):
        with pytest.raises(UserError, match="cannot be read") as refusal:
            make_args(*SHORT, "--step_mask", str(tmp_path / name))
        assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--computed", "9"), "--computed 9: expected 1 to 8 of 9 steps"),
        (("--computed", "0"), "--computed 0: expected 1 to 8 of 9 steps"),
        (("--random_weights",), "--random_weights: a mask belongs to the weights"),
        (
            ("--output-file", "x.png"),
            "--output_file: the calibration keeps no picture; leave it out",
        ),
        (("--step_mask", "medium"), "the calibration sets the mask itself"),
        (("--ckpt", "tiny-schnell"), "distilled steps"),
        (("--scheduler", "unipc"), "--step_mask"),
        (("--mask_file", "no/such/folder/mask.json"), "--mask_file no/such/folder/mask.json: the"),
        (("--mask_file", "mask.txt"), "--mask_file mask.txt: expected a name ending in .json"),
    ],
)
def test_what_has_no_mask_is_refused_before_loading(flags, expected):
    with pytest.raises(UserError) as refusal:
        calibrate.settle([*SHORT, "--computed", "3", *flags], calibrate.parser())
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_a_table_gives_the_weights_themselves():
    values = iter([torch.tensor([1.0]), torch.tensor([3.0])])
    table = {2: (0.25, 0.5), 3: (-1.0, 1.0)}
    mask = (True, True, False, False)
    forward = MaskedForward(lambda: (next(values),), lambda n: mask, 1, table=table)
    with forward.call(4):
        assert [float(forward()[0]) for _ in mask] == [1.0, 3.0, 1.75, 2.0]

"""The curve of step caching: its points, its rows, its plot."""

import io
import json
import sys

import pytest
from PIL import Image

from utils import cache_points, cache_sweep, card, curve
from utils.diffusers_caches import FIRST_BLOCK, MAGNITUDE
from utils.errors import UserError
from utils.steps.step_mask import PRESETS, mask_of


def test_masks_by_warm_steps_and_period():
    def text(warm, period, steps):
        return "".join(str(int(c)) for c in cache_points.every(warm, period, steps))

    assert text(3, 2, 9) == "111010101"
    assert text(4, 3, 12) == "111100100101"
    assert text(2, 5, 4) == "1101"


def test_cache_dits_published_masks_are_points():
    masks = cache_points.published(28)
    assert {name: sum(mask) for name, mask in masks.items()} == {
        "cache-dit's slow": 18,
        "cache-dit's medium": 15,
        "cache-dit's fast": 11,
        "cache-dit's ultra": 8,
    }


def test_points_have_names_of_their_own_and_fit_the_steps():
    for steps in (5, 8, 28, 50):
        listed = cache_points.points(steps)
        assert len({point.name for point in listed}) == len(listed)
        assert {point.kind for point in listed} <= set(curve.STYLES)
        assert all(len(point.mask) == steps for point in listed if point.mask)
        masks = {point.mask for point in listed}
        assert all(mask_of(name, steps) in masks for name in PRESETS)
    kinds = cache_points.choose(listed, "dbcache, 4/3 o0 g1")
    assert len(kinds) == len(cache_points.THRESHOLDS) + 1
    with pytest.raises(UserError, match="unknown point 'dbcach'"):
        cache_points.choose(listed, "dbcach")


def test_two_prompts_make_rows_and_a_plot(monkeypatch, tmp_path, capsys):
    path = tmp_path / "curve.jsonl"
    names = "8/1 o1 g0.5,4/3 o1 g0.5,4/3 blocks o1,8 steps,threshold 0.5,"
    names += "first-block cache 0.04,first-block cache 0.5,magcache 0.5"
    monkeypatch.setattr(cache_points, "WARM", (4, 8))
    monkeypatch.setattr(cache_points, "PERIODS", (1, 3))
    call = ("--num_inference_steps", "9", "--max_sequence_length", "64", "--quality_prompts", "2")
    flags = ("--device", "cpu", *call, "--points", names, "--results", str(path))
    monkeypatch.setattr(sys, "argv", ["cache_sweep.py", *flags])
    monkeypatch.setattr(card, "commit", lambda: "0123456789ab")
    cache_sweep.main()
    rows = {row["name"]: row for row in map(json.loads, path.read_text().splitlines())}
    assert set(rows) == set(names.split(","))
    everything, mask = rows["8/1 o1 g0.5"], rows["4/3 o1 g0.5"]
    assert everything["computed"] == 9 and everything["quality"]["psnr_db_worst"] is None
    assert mask["computed"] == 6 and mask["mask"] == "111100101"
    assert 20 < mask["quality"]["psnr_db_worst"] <= mask["quality"]["psnr_db_mean"]
    assert rows["4/3 blocks o1"]["computed"] == 6 and rows["8 steps"]["computed"] == 8
    assert 4 <= rows["threshold 0.5"]["computed"] < 9
    whole, reused = rows["first-block cache 0.04"], rows["first-block cache 0.5"]
    assert whole["computed"] == 9 and whole["quality"]["psnr_db_worst"] is None
    for cached in (reused, rows["magcache 0.5"]):
        assert 2 <= cached["computed"] < 9 and cached["quality"]["psnr_db_worst"] > 20
    for row in rows.values():
        assert row["psnr_on_flux"] == "not measured" and len(row["call"]["prompt"]) == 2
        assert row["quality"]["checker_right"] is not None and row["environment"]["versions"]
    assert "not measured (--ckpt black-forest-labs/FLUX.1-dev)" in capsys.readouterr().out
    with Image.open(path.with_suffix(".png")) as plot:
        assert plot.size[0] == 1920
    assert curve.draw(list(rows.values()))[:8] == b"\x89PNG\r\n\x1a\n"

    lines, measured = path.read_text(), []  # as if interrupted before the last two points
    path.write_text("".join(lines.splitlines(keepends=True)[:-2]))
    measure = cache_sweep.Sweep.measure
    noting = lambda self, point: measured.append(point.name) or measure(self, point)  # noqa: E731
    monkeypatch.setattr(cache_sweep.Sweep, "measure", noting)
    cache_sweep.main()
    assert measured == list(rows)[-2:] and len(path.read_text().splitlines()) == len(rows)


def test_the_front_is_what_nothing_cheaper_beats():
    rows = [
        {"computed": computed, "quality": {"psnr_db_worst": worst}}
        for computed, worst in ((8, 30.0), (10, 29.0), (10, 35.0), (12, 34.0), (14, None))
    ]
    kept = [(row["computed"], row["quality"]["psnr_db_worst"]) for row in curve.front(rows)]
    assert kept == [(8, 30.0), (10, 35.0), (14, None)]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--ckpt", "tiny-schnell"), "Schnell's four steps are all different"),
        (
            ("--prompt", "a ring", "--output-file", "x.png"),
            "--prompt, --output_file: the sweep has",
        ),
        (("--step_mask", "fast"), "the sweep sets them itself"),
        (("--random_weights",), "their pictures mean nothing"),
        (("--points", "all"), "unknown point 'all'"),
        (("--fused_mlp", "--points", "magcache"), "leave out the step fused_mlp, or name other"),
    ],
)
def test_what_has_no_curve_is_refused_in_one_line(flags, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cache_sweep.py", "--device", "cpu", *flags])
    with pytest.raises(UserError) as refusal:
        cache_sweep.main()
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["tiny-dev", "tiny-kontext"])
def test_the_committed_curves_are_drawn_from_their_rows(name):
    path = cache_sweep.ROOT / "results" / "curves" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    committed, drawn = path.with_suffix(".png"), io.BytesIO(curve.draw(rows))
    with Image.open(committed) as found, Image.open(drawn) as expected:
        assert found.convert("RGB").tobytes() == expected.convert("RGB").tobytes()
    bound = rows[0]["quality"]["other_seed_psnr_db"] + curve.MARGIN_DB
    for preset in PRESETS.values():  # the curve that chose them has them, above the bound
        wanted = (preset.mask, preset.order, preset.gain)
        (row,) = [row for row in rows if (row["mask"], row["order"], row["gain"]) == wanted]
        assert row["quality"]["psnr_db_worst"] > bound


def test_a_calibrated_mask_keeps_more_than_a_fixed_one_of_as_many_steps():
    path = cache_sweep.ROOT / "results" / "curves" / "tiny-dev.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    worst = {row["name"]: row["quality"]["psnr_db_worst"] for row in rows}
    for computed in (8, 10, 12, 14, 16):
        fixed = [
            row["quality"]["psnr_db_worst"]
            for row in rows
            if row["kind"] == "mask" and row["computed"] == computed
        ]
        assert len(fixed) >= 4 and worst[f"calibrated {computed}"] > max(fixed), computed
    assert worst["calibrated 8"] > worst["cache-dit's fast o1 g0.5"]
    assert worst["calibrated 12"] > worst["6/3 o1 g0.5"]


@pytest.mark.parametrize("name", ["tiny-dev", "tiny-kontext"])
def test_a_calibrated_mask_keeps_more_than_diffusers_caches_with_no_fewer_steps(name):
    path = cache_sweep.ROOT / "results" / "curves" / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for kind in (FIRST_BLOCK, MAGNITUDE):
        for row in (row for row in rows if row["kind"] == kind and 6 <= row["computed"] <= 16):
            masks = [
                mask["quality"]["psnr_db_worst"]
                for mask in rows
                if mask["kind"] == "calibrated" and mask["computed"] <= row["computed"] + 0.25
            ]
            assert row["quality"]["psnr_db_worst"] < max(masks), row["name"]


def test_the_page_has_the_curves():
    """Worst pictures by computed steps: the best of each kind."""
    page, counts = (cache_sweep.ROOT / "docs/performance.md").read_text(), (6, 7, 8, 10, 12, 14, 16)
    kinds = {
        "calibrated": "calibrated mask",
        "mask": "best fixed mask",
        "fewer steps": "plain steps",
    }
    for name in ("tiny-dev", "tiny-kontext"):
        path = cache_sweep.ROOT / "results" / "curves" / f"{name}.jsonl"
        best = {}
        for row in map(json.loads, path.read_text().splitlines()):
            key = row["kind"], row["computed"]
            best[key] = max(best.get(key, 0.0), row["quality"]["psnr_db_worst"])
        for kind, words in kinds.items():
            cells = [f"{best[kind, n]:.1f}" if (kind, n) in best else "-" for n in counts]
            assert f"| {name}, {words} | {' | '.join(cells)} |" in page

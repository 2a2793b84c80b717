"""Solvers and noise levels: those that diffusers really solves FLUX.1's flow with."""

import json
import sys

import pytest
import torch
from conftest import make_args, optimized

from utils import card, quality, roofline, scheduler_sweep, schedulers
from utils.errors import UserError

SHORT = ("--max_sequence_length", "64")
DEV = ("--ckpt", "tiny-dev", *SHORT)
CHOICES = [
    ("--scheduler", "heun"),
    ("--scheduler", "dpm"),
    ("--scheduler", "unipc"),
    ("--sigmas", "karras"),
    ("--sigmas", "exponential"),
    ("--sigmas", "beta"),
    ("--sigmas", "1,0.8,0.5,0.3,0.1"),
    ("--sigmas", "1,0.8,0.5,0.3,0.1", "--scheduler", "heun"),
]


def latents(pipeline, args):
    from utils.pipeline_utils import generate

    return generate(pipeline, args, output_type="latent")


@pytest.fixture(scope="module")
def loaded():
    """Give tiny-dev and tiny-schnell in fp32, and their pictures by many steps of Euler."""
    from utils.pipeline_utils import load_pipeline

    known = {}
    for ckpt in ("tiny-dev", "tiny-schnell"):
        flags = ("--device", "cpu", "--disable_bf16", "--ckpt", ckpt, *SHORT)
        pipeline = load_pipeline(make_args(*flags))
        many = make_args(*flags, "--num_inference_steps", "120")
        known[ckpt] = pipeline, pipeline.scheduler, latents(pipeline, many)
    return known


def error(loaded, ckpt: str, *flags: str) -> float:
    """Give the distance from the converged picture."""
    pipeline, own, converged = loaded[ckpt]
    args = make_args("--device", "cpu", "--disable_bf16", "--ckpt", ckpt, *SHORT, *flags)
    pipeline.scheduler = own
    schedulers.install(pipeline, args)
    return quality.relative_l2(latents(pipeline, args), converged)


@pytest.mark.parametrize("ckpt", ["tiny-dev", "tiny-schnell"])
@pytest.mark.parametrize("flags", CHOICES[:6], ids=lambda flags: flags[1])
def test_more_steps_come_nearer_to_the_flow(loaded, ckpt, flags):
    few, more = (error(loaded, ckpt, *flags, "--num_inference_steps", n) for n in ("6", "24"))
    assert more < 0.7 * few and more < 0.15


@pytest.mark.parametrize("flags", CHOICES, ids="-".join)
def test_the_optimised_picture_is_plain_diffusers(flags, reference):
    steps = () if flags[0] == "--sigmas" and "," in flags[1] else ("--num_inference_steps", "5")
    pipeline, args = optimized(*DEV, *steps, *flags)
    assert args.num_inference_steps == 5
    found = quality.run(pipeline, args)
    assert quality.compare(found, reference(*DEV, *steps, *flags))["psnr_db_mean"] > 35
    default = quality.run(*optimized(*DEV, "--num_inference_steps", "5"))
    assert quality.relative_l2(found.latents, default.latents) > 0.01


def test_heun_is_heuns_method():
    """Against its definition, on a velocity that is known: dx/ds = x gives e^s."""
    from utils.heun import ShiftedHeun

    values = [1.0, 0.75, 0.5, 0.25]
    scheduler = ShiftedHeun(shift=1.0)
    scheduler.set_timesteps(sigmas=values, mu=None)
    assert scheduler.timesteps.tolist() == [1000, 750, 750, 500, 500, 250, 250]
    x = expected = torch.ones(1, 1, dtype=torch.float64)
    for timestep in scheduler.timesteps:
        x = scheduler.step(x, timestep, x).prev_sample
    for now, then in zip(values, [*values[1:], 0.0], strict=True):
        h = then - now
        expected = expected * (1 + h + (h * h / 2 if then else 0))  # the last step is Euler's
    torch.testing.assert_close(x, expected, rtol=1e-6, atol=0)


def test_heuns_steps_ask_the_device_for_nothing():
    """On a device without values nothing can be read."""
    from utils.heun import ShiftedHeun

    scheduler = ShiftedHeun(shift=1.0)
    scheduler.set_timesteps(3, "meta")
    scheduler.set_begin_index(0)  # as FluxPipeline does
    x = torch.empty(2, 4, dtype=torch.bfloat16, device="meta")
    assert scheduler.timesteps.device == x.device and len(scheduler.timesteps) == 5
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x, return_dict=False)[0]
    assert (x.device.type, x.dtype) == ("meta", torch.bfloat16)


def test_dev_shifts_heuns_sigmas_as_eulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    from utils.heun import ShiftedHeun

    config = {"use_dynamic_shifting": True, "shift": 3.0}
    euler = FlowMatchEulerDiscreteScheduler(**config)
    heun = ShiftedHeun.from_config(euler.config)
    for scheduler in (euler, heun):
        scheduler.set_timesteps(4, sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.5)
    assert torch.equal(heun.timesteps[[0, 1, 3, 5]], euler.timesteps)
    assert torch.equal(heun.timesteps[[2, 4, 6]], euler.timesteps[1:])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--sigmas", "karras", "--scheduler", "dpm"), "--sigmas karras: found --scheduler dpm"),
        (("--sigmas", "beta", "--scheduler", "heun"), "expected euler (diffusers' other solvers"),
        (("--sigmas", "1,0.5", "--scheduler", "unipc"), "passes unipc no sigmas"),
        (("--sigmas", "quadratic"), "expected default, karras, exponential, beta or numbers"),
        (("--sigmas", "0.5,0.7"), "expected numbers that fall"),
        (("--sigmas", "1,0.5,0"), "all above 0"),
        (("--sigmas", "1.5,0.5"), "that fall from at most 1"),
        (("--sigmas", "1,0.5", "--num_inference_steps", "3"), "--sigmas has 2"),
        (("--scheduler", "heun", "--modulation_once"), "runs the transformer twice a step"),
        (("--scheduler", "unipc", "--step_mask", "fast"), "keeps earlier outputs"),
        (
            ("--scheduler", "heun", "--cache_dit_config", "cache_config.yaml"),
            "the cache counts forwards as steps",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, expected):
    with pytest.raises(UserError) as refusal:
        make_args("--device", "cpu", "--ckpt", "tiny-dev", *flags)
    assert expected in str(refusal.value) and len(str(refusal.value).splitlines()) == 1


def test_heuns_forwards_are_told_and_counted():
    flags = ("--device", "cpu", *DEV, "--num_inference_steps", "10")
    euler, heun = make_args(*flags), make_args(*flags, "--scheduler", "heun")
    assert "heun, sigmas default, 19 evaluations" in card.render(heun)
    assert "scheduler  " not in card.render(euler) and "scheduler" not in card.call(euler)
    rows = [roofline.rows_of(roofline.work_of(args), None, {}) for args in (euler, heun)]
    step = rows[0]["denoising_step"]["flop"]
    assert rows[1]["call"]["flop"] - rows[0]["call"]["flop"] == 9 * step


def test_the_committed_table_is_that_of_its_rows():
    path = scheduler_sweep.ROOT / "results" / "schedulers" / "tiny-dev.json"
    found = json.loads(path.read_text())
    text = scheduler_sweep.DOCS.read_text()
    assert scheduler_sweep.table(found) in text
    assert {row["steps"] for row in found["rows"]} == set(scheduler_sweep.STEPS)
    rows = {(r["scheduler"], r["sigmas"], r["steps"]): r for r in found["rows"]}
    assert len(rows) == len(found["rows"]) == len(scheduler_sweep.points()) * 7
    assert found["environment"]["commit"] and found["command"].startswith("python -m utils.sched")


def test_the_sweep_makes_rows(monkeypatch, tmp_path):
    path = tmp_path / "rows.json"
    monkeypatch.setattr(scheduler_sweep, "STEPS", (2,))
    monkeypatch.setattr(scheduler_sweep, "CONVERGED", ("heun", "default", 5))
    flags = ("--device", "cpu", "--quality_prompts", "1", "--results", str(path))
    monkeypatch.setattr(sys, "argv", ["scheduler_sweep.py", *flags])
    scheduler_sweep.main()
    rows = json.loads(path.read_text())["rows"]
    assert [(row["scheduler"], row["sigmas"]) for row in rows] == scheduler_sweep.points()
    assert {row["evaluations"] for row in rows} == {2, 3}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--scheduler", "heun"), "the sweep is without"),
        (("--prompt", "a red ring"), "--prompt: the sweep has its own prompts and steps"),
        (("--step_mask", "fast"), "--step_mask: the sweep measures the solver alone"),
        (("--results", "no/such/rows.json"), "the folder no/such does not exist"),
    ],
)
def test_what_the_sweep_would_not_heed_is_refused(flags, expected, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["scheduler_sweep.py", "--device", "cpu", *flags])
    with pytest.raises(UserError, match=expected):
        scheduler_sweep.main()
    assert not list(tmp_path.iterdir())

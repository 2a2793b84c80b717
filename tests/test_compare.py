"""The comparison of two results files: what it finds, what it leaves alone, what it cannot tell."""

import itertools
import math
import random

import pytest
from report_pieces import old_row, row, spread, write

from utils import compare, compare_files
from utils.errors import UserError


def by_permutation(a: list[float], b: list[float]) -> float:
    """Give the same p-value the slow way: every split of the pooled ranks."""
    pooled = a + b
    ranks = [sum(x < v for x in pooled) + sum(x == v for x in pooled) / 2 for v in pooled]
    expected = len(a) * sum(ranks) / len(pooled)
    far = abs(sum(ranks[: len(a)]) - expected)
    splits = [sum(split) for split in itertools.combinations(ranks, len(a))]
    return sum(abs(found - expected) >= far - 1e-9 for found in splits) / len(splits)


def timings(generator: random.Random, median: float, n: int, deviation: float) -> list[float]:
    """Make up timed runs: log-normal, so skewed as real ones are."""
    return [median * math.exp(generator.gauss(0, deviation)) for _ in range(n)]


@pytest.mark.parametrize("digits", [6, 1, 0])  # of the values: none, some and many of them are tied
def test_p_values_equal_those_of_every_permutation(digits):
    generator = random.Random(digits)
    for n, m in ((2, 3), (3, 3), (4, 7), (7, 4), (6, 6)):
        a, b = ([round(generator.gauss(3, 1), digits) for _ in range(k)] for k in (n, m))
        assert compare.p_value(a, b) == pytest.approx(by_permutation(a, b), rel=1e-12)
        assert compare.p_value(a, b) == compare.p_value(b, a)


def test_known_p_values():
    assert compare.p_value([1, 2, 3], [4, 5, 6]) == pytest.approx(0.1)
    assert compare.p_value([1.0] * 5, [1.0] * 5) == 1
    low, high = list(range(40)), list(range(40, 80))
    assert compare.p_value(low, high) == pytest.approx(2 / math.comb(80, 40), rel=1e-9)


def test_the_approximation_continues_the_exact_test(monkeypatch):
    generator = random.Random(1)
    for shift in (0.0, 0.005, 0.01):
        a = [round(v, 3) for v in timings(generator, 1.0, 45, 0.02)]
        b = [round(v, 3) for v in timings(generator, 1.0 + shift, 45, 0.02)]
        exact = compare.p_value(a, b)
        with monkeypatch.context() as patch:
            patch.setattr(compare, "EXACT_UP_TO", 0)
            assert compare.p_value(a, b) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("deviation", [0.002, 0.02, 0.1])
@pytest.mark.parametrize(("n", "seeds"), [(5, 400), (10, 400), (40, 40)])
def test_equal_distributions_are_unchanged(n, seeds, deviation):
    """Stated: a false alarm in at most ALPHA = 5 % of comparisons."""
    generator = random.Random(f"{n} {deviation}")
    wrong = 0
    for _ in range(seeds):
        a, b = (timings(generator, 1.0, n, deviation) for _ in "ab")
        wrong += compare.judge(a, b).verdict != "unchanged"
    assert wrong <= seeds * compare.ALPHA


def test_the_rank_test_alone_holds_its_rate():
    generator = random.Random(2)
    pairs = ([timings(generator, 1.0, 10, 0.1) for _ in "ab"] for _ in range(2000))
    rate = sum(compare.p_value(*pair) <= 0.05 for pair in pairs) / 2000
    assert 0.03 < rate < 0.06  # 0.043 is the level that ten against ten can reach


def test_all_rows_of_a_file_together_hold_the_rate():
    generator = random.Random(3)
    alarms = 0
    for _ in range(60):
        files = []
        for _ in "ab":
            samples = [timings(generator, 1.0, 10, 0.05) for _ in range(12)]
            files.append(
                [row(f"r{k}", total_s=spread(1.0) | {"samples": s}) for k, s in enumerate(samples)]
            )
        alarms += any(finding.is_worse for finding in compare.compare_rows(*files))
    assert alarms <= 60 * compare.ALPHA


@pytest.mark.parametrize(("factor", "verdict"), [(1.05, "slower"), (1 / 1.05, "faster")])
def test_five_percent_are_found_where_the_spread_is_small(factor, verdict):
    generator = random.Random(4)
    found = [
        compare.judge(timings(generator, 1.0, 10, 0.01), timings(generator, factor, 10, 0.01))
        for _ in range(100)
    ]
    assert sum(change.verdict == verdict for change in found) >= 99
    assert found[0].shift == pytest.approx(factor - 1, abs=0.015)


def test_a_small_change_is_none_however_significant():
    generator = random.Random(5)
    change = compare.judge(timings(generator, 1.0, 40, 0.001), timings(generator, 1.01, 40, 0.001))
    assert change.p < 1e-9 and change.verdict == "unchanged"


def test_a_row_that_drifts_shows_no_change_of_that_size():
    generator = random.Random(6)
    drifting = [v * (1 + 0.02 * k) for k, v in enumerate(timings(generator, 1.0, 10, 0.002))]
    steady = timings(generator, 1.0, 10, 0.002)
    change = compare.judge(steady, drifting)
    assert change.p < 0.05 and change.shift > 0.05 and change.verdict == "unchanged"
    assert compare.judge(steady, [1.5 * v for v in drifting]).verdict == "slower"


def test_one_outlier_changes_nothing():
    a = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]
    assert compare.judge(a, [*a[:-1], 9.0]).verdict == "unchanged"


@pytest.mark.parametrize("n", [0, 1, 3])
def test_few_runs_cannot_tell(n, tmp_path, capsys):
    files = []
    for k, seconds in enumerate((1.0, 2.0)):
        times = spread(1.0) | {"n": n, "samples": [seconds + 0.001 * i for i in range(n)]}
        files.append(write(tmp_path / f"{k}.jsonl", [row(total_s=times)]))
    assert compare_files.main(*files) == 0
    said = capsys.readouterr().out
    assert f"cannot tell from {n} and {n} runs: 4 of each are needed" in said


def found_in(a: dict | list, b: dict | list) -> compare.Finding:
    findings = compare.compare_rows(*([x] if isinstance(x, dict) else x for x in (a, b)))
    assert len(findings) == 1
    return findings[0]


def test_rows_match_across_commits_and_machines():
    b = row(seconds=1.3)
    b["environment"] = b["environment"] | {"commit": "other", "device": "NVIDIA L40S"}
    assert found_in(row(), b).verdict == "slower"
    b["steps"] = {"fa3": {"state": "on", "settings": {"backend": "fa2", "why": "Ada"}}}
    found = found_in(row(), b)
    assert found.verdict == "slower" and found.notes == ("fa3.backend: fa3 -> fa2",)
    assert found_in(old_row(), old_row() | {"lossless": True}).verdict == "unchanged"


def test_settings_that_are_lists_are_compared_by_what_is_in_them():
    a, b = (row(steps={"lora": {"state": "on", "settings": {"files": x}}}) for x in ("a", ["b"]))
    assert found_in(b, b).notes == ()
    assert found_in(a, b).notes == ("lora.files: a -> ['b']",)


def test_variables_of_the_environment_are_told_as_settings_are():
    a, b = row(), row()
    b["environment"] = a["environment"] | {"variables": {"TORCHINDUCTOR_X": "1"}}
    (finding,) = compare.compare_rows([a], [b])
    assert "TORCHINDUCTOR_X: off -> 1" in finding.notes


def test_the_same_settings_are_paired_first_and_the_newest_stands():
    other = row(steps={"fa3": {"state": "on", "settings": {"backend": "fa2"}}})
    found = compare.compare_rows([row(seconds=5.0), other, row()], [row(), other])
    assert [f.verdict for f in found] == ["unchanged", "unchanged"]


def test_other_calls_names_and_series_do_not_match():
    b = row()
    b["call"] = b["call"] | {"height": 512}
    for other in (b, row("+ fa3"), row(series="leave_one_out")):
        verdicts = [finding.verdict for finding in compare.compare_rows([row()], [other])]
        assert verdicts == ["only in a", "only in b"]


def test_failures_are_findings():
    failed = row(failed="out of memory", total_s=None)
    found = found_in(row(), failed)
    assert found.verdict == "failed" and found.is_worse and found.notes == ("out of memory",)
    assert found_in(failed, row()).verdict == "works again"
    early = {k: failed[k] for k in ("format", "row", "series", "command", "failed")}
    assert found_in(row(), early).verdict == "failed"  # it does not know its call
    assert found_in(row(), [row(), early]).verdict == "failed"
    both = found_in(failed, failed)
    assert both.verdict == "fails in both" and not both.is_worse


def scored(lossless: bool = True, **scores) -> dict:
    quality = row()["quality"] | scores
    return row(lossless=lossless, quality=quality)


@pytest.mark.parametrize(
    ("a", "b", "verdict"),
    [
        (scored(), scored(), "unchanged"),
        (scored(), scored(fp32_relative_l2=0.0060), "unchanged"),
        (scored(), scored(fp32_relative_l2=0.0075), "worse"),
        (scored(), scored(psnr_db_worst=40.0), "unchanged"),  # rounds differently, as near to fp32
        (scored(False), scored(False, psnr_db_worst=42.5), "worse"),
        (scored(False), scored(False, psnr_db_worst=46.0), "better"),
        (scored(False, checker_right=1.0), scored(False, checker_right=0.875), "worse"),
        (scored(), scored(False), "worse"),
        (scored(False), scored(), "better"),
        (scored(False), scored(psnr_db_worst=42.5), "worse"),  # the fp32 bound is for two lossless
        (scored(), scored(prompts=2), "not comparable"),
        (scored(), row(quality=None), "-"),
        (
            scored(fp32_relative_l2=None, psnr_db_worst=None, identical_images=8),
            scored(fp32_relative_l2=None),
            "worse",
        ),
    ],
)
def test_quality_changes_are_told(a, b, verdict):
    assert found_in(a, b).quality == verdict


def test_the_exit_code_and_what_is_printed(tmp_path, capsys):
    a = write(tmp_path / "a.jsonl", [row(), row("+ fa3", 0.8), row("gone")])
    b = write(tmp_path / "b.jsonl", [row(seconds=0.9), row("+ fa3", 0.88), "{damaged", row("new")])
    assert compare_files.main(a, b) == 1
    said = capsys.readouterr()
    assert said.err.startswith(f"{b}:3: skipped: not JSON") and said.err.count("\n") == 1
    lines = said.out.splitlines()
    assert lines[0] == f"a  {a}: NVIDIA H200, torch 2.13.0+cu130, commit 0123456789ab"
    assert [line.split()[-1] for line in lines[3:7]] == ["eager", "fa3", "gone", "new"]
    assert lines[4].startswith("! ") and "+10.0 %" in lines[4] and " slower " in lines[4]
    assert lines[7].startswith("1 faster, 1 slower, 1 only in a, 1 only in b")
    assert compare_files.main(a, a) == 0


def test_single_runs_are_the_same_wherever_their_files_go(tmp_path, capsys):
    files = []
    for words in ("--results before.jsonl", "--results='my rows.jsonl' --trace-file t.json.gz"):
        one = row() | {"command": f"python run_benchmark.py --seed 3 {words} --disable_quant"}
        del one["row"]
        files.append(write(tmp_path / f"{len(files)}.jsonl", [one]))
    assert compare_files.main(*files) == 0
    assert "run_benchmark.py --seed 3 --disable_quant" in capsys.readouterr().out


def test_files_without_a_common_row_are_bad_input(tmp_path):
    a = write(tmp_path / "a.jsonl", [row()])
    b = write(tmp_path / "b.jsonl", [row("other"), row("+ fa3"), row("+ fa3", 2.0)])
    with pytest.raises(UserError, match="no row in common") as refusal:
        compare_files.main(a, b)
    said, call = str(refusal.value), "black-forest-labs/FLUX.1-schnell, 1024x1024, 4 steps, 1 image"
    assert said.count("\n") == 0 and f"{a} has eager ({call}, 256 text tokens); " in said
    assert f"{b} has other ({call}, 256 text tokens), + fa3 ({call}" in said
    assert said.count("+ fa3") == 1
    with pytest.raises(UserError, match=r"--compare .*none\.jsonl: No such file"):
        compare_files.main(a, tmp_path / "none.jsonl")


def test_single_rows_of_different_flags_are_compared_and_the_flags_told(tmp_path, capsys):
    files = []
    for seconds, words in (
        (1.0, "--seed 3 --disable-quant --results a.jsonl --prompt 'a circle' --prompt x"),
        (2.0, "--prompt='a circle' --seed 4 --results b.jsonl --prompt x --fused_mlp"),
    ):
        one = row(None, seconds, command=f"python run_benchmark.py {words}")
        one["call"] = one["call"] | {"seed": len(files)}
        files.append(write(tmp_path / f"{len(files)}.jsonl", [one]))
    assert compare_files.main(*files) == 1
    lines = capsys.readouterr().out.splitlines()
    assert " slower " in lines[3] and lines[3].endswith("x")  # a's command
    assert [line.strip() for line in lines[4:8]] == [
        "b is run_benchmark.py --prompt='a circle' --seed 4 --prompt x --fused_mlp",
        "--seed: 3 -> 4",
        "--disable_quant: given -> not given",
        "--fused_mlp: not given -> given",
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("# A heading\n\nand text\n", "no JSON lines"),
        ("", "is empty"),
        ("\n \n", "is empty"),
        ('{"format": 2, "row": "cut o', "no row that could be read"),
    ],
)
def test_a_file_without_rows_is_one_line(tmp_path, content, expected):
    file = tmp_path / "x.jsonl"
    file.write_text(content)
    with pytest.raises(UserError) as refusal:
        compare_files.main(write(tmp_path / "a.jsonl", [row()]), file)
    assert str(refusal.value).startswith(f"--compare {file}: {expected}")
    assert str(refusal.value).count("\n") == 0

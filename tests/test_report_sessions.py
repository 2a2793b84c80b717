"""What is rendered of rows of several sessions: no ratio across commits or numbers of threads."""

import pytest
from report_pieces import ladder, row
from test_report import cells, lines_of

from utils import report, report_plot
from utils.report_details import facts
from utils.report_series import series_of
from utils.report_summary import summary


def elsewhere(one: dict, **environment) -> dict:
    """Move a row to another session."""
    return one | {"environment": one["environment"] | environment}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"commit": "fedcba987654"}, "No ratio is given across commits."),
        ({"threads": 1}, "No ratio is given across numbers of threads."),
        ({"variables": {"TRITON_X": "a b"}}, "across variables of the environment."),
    ],
)
def test_no_ratio_is_given_across_sessions(environment, said):
    rows = [elsewhere(one, threads=2, variables={}) for one in ladder()]
    rows[0] = elsewhere(rows[0], **environment)  # + compile
    rows[-1] = elsewhere(rows[-1], **environment)  # without fused_projections
    text = report.markdown("x.jsonl", rows)
    speedup = {cells(line)[0]: cells(line)[2] for line in lines_of(text, "| row | seconds | speed")}
    assert (speedup["eager"], speedup["+ fa3"], speedup["+ compile"]) == ("1.00x", "1.25x", "-")
    worth = [cells(line)[2] for line in lines_of(text, "| row | seconds | worth")[2:]]
    assert worth == ["-", "+0.100 s, 1.29x", "-"]
    assert text.count(said) == 2
    notes = {bar.label: bar.note for bar in report_plot.bars(series_of(rows)[0])}
    assert ("+ compile: measured with the variables TRITON_X='a b'." in text) == (
        "variables" in environment
    )
    assert notes["+ fa3"].endswith("1.25x") and notes["+ compile"].endswith(" s")


def test_a_row_without_its_number_of_threads_is_of_its_commit():
    old = ladder()
    assert "1.25x" in report.markdown("x.jsonl", [elsewhere(old[1], threads=2), *old[2:]])
    rounds = [elsewhere(row(round=k), threads=threads) for k, threads in enumerate((2, 1, 1))]
    assert series_of(rounds)[0].rows[0]["total_s"]["n"] == 20  # the first is of another session


def test_threads_and_load_stand_among_the_facts_where_rows_have_them():
    old = [row(), row("+ fa3")]
    assert not {"threads", "load when a row began"} & dict(facts(old)).keys()
    new = [elsewhere(one, threads=2, load_average=0.2 + k) for k, one in enumerate(old)]
    found = dict(facts([*old, *new]))
    assert (found["threads"], found["load when a row began"]) == ("2", "0.2-1.2")
    assert dict(facts(new[:1]))["load when a row began"] == "0.2"


def test_the_summary_names_the_fastest_row_of_ladders_of_one_session():
    eager, compiled = row("eager", 2.0), row("+ compile", 1.0)
    alien = elsewhere(row("+ more", 0.5), commit="b" * 12)
    assert not summary({"x.jsonl": [eager, compiled, alien]}).rows
    table = summary({"x.jsonl": [eager, compiled]})
    (line,) = table.rows
    assert line[2].endswith("n 10)") and line[3].startswith("+ compile: ")
    assert line[4] == "2.00x" and len(line) == len(table.header)
    assert not summary({"x.jsonl": [eager | {"failed": "no memory"}]}).rows

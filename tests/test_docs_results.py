"""The page of results: its figures come from the files, every goal is found in them, misses are not hidden."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SPEC = importlib.util.spec_from_file_location("results_page", ROOT / "docs" / "results.py")
results_page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(results_page)
pytestmark = pytest.mark.skipif(not results_page.RESULTS.is_dir(), reason="the sdist holds no results")


def row(label="8 x 16 -> 8, gelu", family="layer", eager=2.0, mm=0.5):
    times = {"mlpkit": {"cpu": {"median": 2e-6, "minimum": 1e-6}}}
    ratios = {name: {"cpu": {"median": value}} for name, value in {"eager": eager, "mm": mm}.items()}
    facts = {"family": family, "label": label, "what": "forward", "dtype": "fp32", "baseline": "eager", "clock": "cpu"}
    return facts | {"seconds": times, "ratio": ratios, "floor": {"share": 0.5}}


def test_a_goal_is_met_missed_or_not_measured(monkeypatch):
    goal = results_page.Goal("cpu", "layer", "8 x 16", "forward", "fp32", "eager", 2.5)
    monkeypatch.setattr(results_page, "GOALS", [goal, goal._replace(least=1.5), goal._replace(label="9 x 16")])
    lines = results_page.goals_table({"cpu": {"cases": [row()]}}).splitlines()[2:]
    assert [line.split(" | ")[-3:] for line in lines] == [
        ["2.50x", "2.00x", "**missed** |"],
        ["1.50x", "2.00x", "met |"],
    ]


def test_bars_tell_slower_from_faster_and_names_are_escaped():
    svg = results_page.chart([row(label="a < b", eager=4.0), row(eager=0.8)])
    assert "a &lt; b" in svg
    assert (svg.count('class="faster"'), svg.count('class="slower"')) == (1, 1)
    assert "4.00x" in svg
    assert "0.80x" in svg


def test_the_table_has_a_column_for_every_rival_and_a_gap_where_one_was_not_measured():
    other = row(label="other")
    del other["ratio"]["mm"]
    lines = results_page.table([row(), other]).splitlines()
    assert "| eager | mm | our time, us | of the floor |" in lines[0]
    assert lines[2].endswith("| 2.00x | 0.50x | 2.0 | 50 % |")
    assert lines[3].endswith("| 2.00x |  | 2.0 | 50 % |")


@pytest.mark.parametrize("name", results_page.FILES)
def test_the_newest_file_states_its_conditions_and_is_no_quick_run(name):
    path = results_page.newest(name)
    results = json.loads(path.read_text())
    assert not results["environment"]["quick"]
    text = results_page.conditions(results, path)
    for words in (results["environment"]["cpu"], results["environment"]["date"][:10], path.name, "rounds"):
        assert words in text


def test_every_goal_names_a_row_that_some_run_has_measured():
    every = {
        name: {"cases": [case for path in results_page.RESULTS.glob(f"{name}-[0-9]*.json") for case in _cases(path)]}
        for name in results_page.FILES
    }
    found = {goal for goal, _ in results_page.goals(every)}
    unmeasured = [goal for goal in results_page.GOALS if goal not in found]
    assert not [goal for goal in unmeasured if "w = 256" not in goal.label]


def _cases(path):
    return json.loads(path.read_text())["cases"]

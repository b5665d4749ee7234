"""Tables of very many rows: a sample, held-out rows, the fit on all; how little memory the way there takes."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from mlpkit.tune import large, table, tune
from mlpkit.tune.folds import make_folds
from mlpkit.tune.problem import read_problem
from mlpkit.tune.table import read_csv


def frame(rows=900, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 3))
    names = dict(zip("abc", X.T))
    return pd.DataFrame(names | {"y": np.where(X[:, 0] * X[:, 1] > 0.5, "rare", "usual"), "g": np.arange(rows) // 5})


@pytest.fixture
def small(monkeypatch):
    for name, count in (("MOST_ROWS", 500), ("SAMPLE", 300), ("HELD", 120)):
        monkeypatch.setattr(large, name, count)


@pytest.mark.parametrize("beside", [{}, {"groups": "g"}, {"time": "g"}])
def test_what_is_searched_and_what_is_held_out_never_overlap(small, beside):
    problem = read_problem(frame(), "y", "auto", 5, **beside)
    # The rows' numbers stand in a column, so that one can tell which were drawn.
    problem.data["a"] = np.arange(problem.rows)
    searched, whole = large.sampled(problem, 3)
    drawn = searched.data["a"].astype(int)
    assert searched.rows == len(set(drawn)) == 300
    assert not set(drawn) & set(whole.held)
    np.testing.assert_array_equal(searched.target.values, problem.target.values[drawn])
    if "groups" in beside:
        assert not set(problem.groups[drawn]) & set(problem.groups[whole.held])
    if "time" in beside:
        assert problem.order[drawn].max() <= problem.order[whole.held].min()
    else:
        share = problem.target.values.mean()
        for rows in (drawn, whole.held):
            assert problem.target.values[rows].mean() == pytest.approx(share, abs=0.02 if not beside else 0.1)
    folds = make_folds(searched.target.values, 5, 0, stratify=True)
    assert max(int(fold.test.max()) for fold in folds) < 300


@pytest.mark.parametrize("budget", ["12 trials", "6s"])
def test_a_large_table_is_searched_on_a_sample_and_fitted_on_all(small, budget, tmp_path):
    train, fresh = frame(4000), frame(2000, seed=1)
    run = tune(train.drop(columns="g"), "y", budget=budget, random_state=0, progress=False, out=tmp_path / "run")
    assert (run.data["rows"], run.data["searched"], run.data["held_out"]) == (4000, 300, 120)
    assert len(run.fold_of_row()) == 300
    assert any("300 of 4,000 rows" in note for note in run.data["notes"])
    truth = run.estimator.score(fresh, fresh["y"])
    assert truth > 0.85
    assert run.estimate.low - 0.05 <= truth <= run.estimate.high + 0.05
    assert run.estimate.score - run.winner.mean == pytest.approx(run.estimate.more_rows)


def test_numbers_work_too_and_more_rows_than_the_sample_teach_more(small):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(6000, 4))
    y = np.sin(2 * X[:, 0]) * X[:, 1] + 0.1 * rng.normal(size=6000)
    run = tune(X[:5000], y[:5000], budget="12 trials", random_state=0, progress=False)
    assert run.estimator.score(X[5000:], y[5000:]) > run.winner.mean


def test_a_time_without_end_is_not_needed_for_a_large_table(small):
    run = tune(frame(700).drop(columns="g"), "y", budget=0.01, random_state=0, progress=False)
    assert len(run.trials) == 1
    assert math.isfinite(run.estimate.score)


def test_a_file_read_in_pieces_is_the_file_read_at_once(monkeypatch, tmp_path):
    source = frame(1000)
    source["late"] = [""] * 900 + ["text"] * 100
    source["whole"] = [*range(999), None]
    source.to_csv(tmp_path / "t.csv", index=False)
    at_once = read_csv(tmp_path / "t.csv")
    monkeypatch.setattr(table, "LARGE_FILE", 1000)
    monkeypatch.setattr(table, "ROWS_AT_ONCE", 130)
    pd.testing.assert_frame_equal(read_csv(tmp_path / "t.csv"), at_once)


def test_equal_large_tables_have_equal_fingerprints(monkeypatch, tmp_path):
    source = frame(600)
    source["n"] = [None, *range(599)]
    source.to_csv(tmp_path / "t.csv", index=False)
    monkeypatch.setattr(table, "MANY_ROWS", 100)
    one, two = (table.fingerprint(item.drop(columns="y"), item["y"]) for item in (source, read_csv(tmp_path / "t.csv")))
    assert one == two
    source.loc[5, "a"] += 1e-9
    assert table.fingerprint(source.drop(columns="y"), source["y"]) != one

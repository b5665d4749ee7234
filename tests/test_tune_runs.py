"""The whole search: resuming, folds by group and time, the page, the commands. Nothing is trained but refits."""

from __future__ import annotations

import csv
import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
from test_report import Page
from tune_fakes import FakeTrainer, table

from mlpkit import cli
from mlpkit.errors import ArgumentError, DataError, ShapeError
from mlpkit.tune import Space, trainer, tune
from mlpkit.tune.folds import make_folds
from mlpkit.tune.journal import Journal

EVIL = "<script>alert(1)</script>"


def quality(spec):
    return 0.9 - 0.1 * abs(math.log10(spec.lr / 3e-3)) if spec.hidden else 0.6


@pytest.fixture
def fake(monkeypatch):
    faked = FakeTrainer(quality, hits=True)
    monkeypatch.setattr(trainer, "train_members", faked)
    return faked


def small(**changes):
    return {"strategy": "quasirandom", "budget": "40 trials", "random_state": 3, "progress": False, **changes}


# Resuming


def numbers(run):
    return [(trial.number, trial.params, trial.scores, trial.state, trial.reason) for trial in run.trials]


@pytest.mark.parametrize("strategy", ["auto", "bayes", "coarse_to_fine", "constructive"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_killed_run_goes_on_to_the_same_table(fake, tmp_path, monkeypatch, strategy, cut):
    whole = tune(table(100), "label", **small(strategy=strategy))
    calls, honest = [], trainer.train_members

    def dies(*arguments, **settings):
        calls.append(1)
        if len(calls) > (1 if strategy == "constructive" else 4):
            raise KeyboardInterrupt
        return honest(*arguments, **settings)

    monkeypatch.setattr(trainer, "train_members", dies)
    with pytest.raises(KeyboardInterrupt):
        tune(table(100), "label", out=tmp_path / "run", **small(strategy=strategy))
    journal = tmp_path / ".run.journal"
    if cut:
        journal.write_bytes(journal.read_bytes()[:-20])  # Killed in the middle of a line.
    monkeypatch.setattr(trainer, "train_members", honest)
    fake.calls.clear()
    again = tune(table(100), "label", out=tmp_path / "run", **small(strategy=strategy, random_state=None))
    assert numbers(again) == numbers(whole)
    assert again.settings["seed"] == 3
    assert again.estimate == whole.estimate
    total = sum(len(trial.outcomes) > 0 for trial in whole.trials)
    assert fake.calls
    assert fake.calls[0] < total
    assert [item.name for item in tmp_path.iterdir()] == ["run"]


def test_another_table_or_space_starts_anew(fake, tmp_path):
    path = tmp_path / ".run.journal"
    Journal(path, {"sha256": "other"})
    run = tune(table(100), "label", out=tmp_path / "run", **small(budget="3 trials"))
    assert len(run.trials) == 3


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / "j").write_text("{}\nnonsense\n")
    with pytest.raises(DataError, match="is damaged"):
        Journal(tmp_path / "j", {})


# Folds


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_never_on_both_sides(seed):
    groups = np.random.default_rng(seed).integers(0, 17, 120).astype(str)
    folds = make_folds(np.zeros(120), 4, seed, stratify=False, groups=groups)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(120))
    for fold in folds:
        parts = [set(groups[rows]) for rows in (fold.train, fold.validation, fold.test)]
        assert all(parts)
        assert not parts[0] & parts[1]
        assert not (parts[0] | parts[1]) & parts[2]


def test_the_past_alone_is_learnt_from():
    order = np.random.default_rng(0).permutation(90)
    folds = make_folds(np.zeros(90), 5, 0, stratify=False, order=order)
    for fold in folds:
        assert order[fold.train].max() < order[fold.validation].min()
        assert order[fold.validation].max() < order[fold.test].min()
    assert len(np.unique(np.concatenate([fold.test for fold in folds]))) == 75


def test_columns_of_groups_and_time_are_no_inputs(fake):
    frame = table(120).assign(day=pd.date_range("2020-01-01", periods=120).astype(str), who=np.arange(120) % 12)
    by_time = tune(frame, "label", time="day", ignore=["who"], **small(budget="2 trials"))
    assert by_time.estimator.feature_names_in_ == ["a", "b"]
    assert by_time.fold_of_row()[:20] == [-1] * 20
    by_group = tune(frame, "label", groups="who", ignore=["day"], **small(budget="2 trials"))
    assert by_group.estimator.feature_names_in_ == ["a", "b"]
    fold = np.array(by_group.fold_of_row())
    assert all(len(set(fold[frame["who"] == who])) == 1 for who in range(12))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"groups": "whom"}, ArgumentError, "groups: no column 'whom'"),
        ({"groups": [1, 2]}, ShapeError, "groups has 2 values"),
        ({"groups": [1] * 60}, DataError, "groups holds 1 groups"),
        ({"time": ["?"] * 60}, DataError, "time must hold numbers or dates"),
        ({"time": "a", "groups": "b"}, ArgumentError, "cannot both"),
        ({"sample_weight": [1.0]}, ShapeError, "sample_weight has shape"),
        ({"sample_weight": [-1.0] * 60}, DataError, "sample_weight must hold"),
    ],
)
def test_what_stands_beside_the_table_is_checked(fake, change, error, words):
    with pytest.raises(error, match=words):
        tune(table(60), "label", **small(**change))


def test_a_test_table_is_scored_once_and_shown(fake, tmp_path):
    frame, later = table(80), table(40, 1)
    run = tune(frame, "label", test=(later.drop(columns="label"), later["label"]), **small(budget="2 trials"))
    assert run.test_score == run.estimator.score(later.drop(columns="label"), later["label"])
    assert run.to_dict()["test_score"] == pytest.approx(run.test_score, rel=1e-6)


def test_a_log_target_is_scored_in_the_targets_own_units():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=150)})
    frame["y"] = np.exp(frame["a"] * 2 + 0.1 * rng.normal(size=150))
    plain = {"strategy": "grid", "budget": "1 trials", "random_state": 0, "progress": False, "cv": 2}
    line = tune(frame, "y", space=Space(layers=0, log_target=False), **plain)
    log = tune(frame, "y", space=Space(layers=0, log_target=True), **plain)
    assert log.winner.mean > line.winner.mean + 0.1
    assert log.estimator.log_target
    assert log.estimator.score(frame[["a"]], frame["y"]) > 0.8


# Page and files


@pytest.fixture
def searched(fake, tmp_path):
    frame = table(120)
    frame[EVIL] = frame["a"] + frame["b"]
    return tune(frame, "label", out=tmp_path / "run", **small(budget="60 trials")), tmp_path / "run"


def test_the_page_has_every_section_and_escapes_names(searched):
    run, out = searched
    text = (out / "report.html").read_text()
    page = Page(text)
    for title in ("Ladder", "Findings", "Search", "Slices", "Contours", "Importance", "Calibration", "Reproducibility"):
        assert title in page.text
    assert EVIL not in text
    assert EVIL in page.text
    assert len(text) < 7_000_000
    assert "Why it stopped" in page.text
    assert str(round(run.estimate.score, 3)) in page.text


def test_figures_of_the_search_are_lawful_plotly(searched):
    import plotly.graph_objects as go
    from test_tune import _plain_colours

    from mlpkit.tune import search_plots, trust_plots
    from mlpkit.tune.importance import importance

    run, _ = searched
    space = Space(run.settings["space"])
    figures = [
        search_plots.parallel(run, space, space.free()), *search_plots.slices(run, space, space.free()),
        *search_plots.contours(run, space), search_plots.importances(importance(run.trials, space)),
        trust_plots.calibration(*run.truth(), 1.0), trust_plots.selective(*run.truth(), 1.0),
    ]  # fmt: skip
    assert len(figures) > 10
    for figure in figures:
        go.Figure(_plain_colours(figure.plot))


def test_the_csv_and_json_hold_every_trial(searched):
    run, out = searched
    rows = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert len(rows) == len(report["trials"]) == len(run.trials)
    assert {row["state"] for row in rows} == {trial.state for trial in run.trials}
    assert all(row["reason"] for row in rows)


# Commands


@pytest.fixture
def mlpkit(monkeypatch, tmp_path, capsys, fake):
    table(80).assign(key=range(80)).to_csv(tmp_path / "t.csv", index=False)
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mlpkit", *arguments])
        try:
            cli.main()
        except SystemExit as end:
            return end.code or 0, *capsys.readouterr()
        return 0, *capsys.readouterr()

    return call


TUNE = ("tune", "t.csv", "--target", "label", "--seed", "0", "--quiet", "--ignore", "key")


def test_the_commands_work_together(mlpkit, tmp_path):
    (tmp_path / "space.yaml").write_text("lr: {low: 1e-4, high: 1e-2}\nlayers: [0, 1]\n")
    search = ("--strategy", "random", "--budget", "20trials", "--space", "space.yaml")
    code, out, err = mlpkit(*TUNE, *search, "--out", "one", "--test", "t.csv")
    assert (code, err) == (0, "")
    assert "to expect on new rows" in out
    assert "on the test table" in out
    assert mlpkit(*TUNE, "--budget", "3trials", "--out", "two")[0] == 0
    code, out, _ = mlpkit("compare", "one", "two")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["one", "two"]
    assert "accuracy" in mlpkit("report", "one")[1]
    _, out, _ = mlpkit("predict", "one", "t.csv", "--id", "key")
    assert out.splitlines()[0].startswith("key,label,")
    assert out.splitlines()[80].startswith("79,")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("report", "nowhere"), "nowhere is no run directory"),
        (("compare", "nowhere"), "nowhere is no run directory"),
        ((*TUNE, "--space", "none.yaml"), "no such file: none.yaml"),
        ((*TUNE, "--groups", "kex"), "did you mean 'key'"),
        ((*TUNE, "--budget", "later"), "budget is 'later'"),
    ],
)
def test_a_mistake_is_one_sentence(mlpkit, arguments, words):
    code, out, err = mlpkit(*arguments)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1

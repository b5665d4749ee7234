"""``mlpkit.tune.tune`` from end to end on small generated tables: what it finds, writes, repeats and refuses."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from test_report import Page

import mlpkit.nn
from mlpkit.errors import ArgumentError, DataError
from mlpkit.tune import TunedModel, search, trainer


def tune(X, y, **settings):
    """The ladder alone: what the whole search adds is tested where no network is trained."""
    return search.tune(X, y, **{"strategy": "constructive", **settings})


def mixed_table(rows=96, seed=0):
    """Numbers, gaps, a category with gaps; the class depends on a product: no linear model gets it."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"u": rng.normal(size=rows), "v": rng.normal(size=rows), "kind": rng.choice(["a", "b"], rows)})
    frame["label"] = np.where(frame["u"] * frame["v"] > 0, "yes", "no")
    frame.loc[::17, "u"] = np.nan
    frame.loc[::13, "kind"] = None
    return frame


def line_table(rows=60, seed=0):
    """A number that is linear in two columns, with noise."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"p": rng.normal(size=rows), "q": rng.normal(50, 10, size=rows)})
    frame["y"] = 1000 + 30 * frame["p"] - 4 * frame["q"] + rng.normal(0, 20, rows)
    return frame


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    out = tmp_path_factory.mktemp("classes") / "run"
    return tune(mixed_table(), "label", cv=3, random_state=1, out=out, progress=False), out


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    out = tmp_path_factory.mktemp("numbers") / "run"
    return tune(line_table(), "y", cv=3, random_state=1, out=out, progress=False), out


def numbers_of(report):
    """report.json without the clock."""
    return {
        key: [{**trial, "seconds": 0, "folds": [{**fold, "seconds": 0} for fold in trial["folds"]]} for trial in value]
        if key == "trials"
        else value
        for key, value in report.items()
        if key != "seconds"
    }


# What it finds


def test_product_of_two_columns_needs_a_hidden_layer(classes):
    result, _ = classes
    assert len(result.winner.hidden) >= 1
    assert result.winner.mean > 0.8 > result.climb.linear.mean
    assert "won" in result.verdicts[0].text
    assert [verdict.kind for verdict in result.verdicts[:3]] == ["depth", "fit", "neighbours"]


def test_linear_relation_is_left_to_the_linear_model(numbers):
    result, _ = numbers
    assert result.winner.hidden == ()
    assert result.verdicts[0].text.startswith("Linear is enough: R2 0.")
    assert result.winner.mean > 0.5


def test_ladder_tries_every_rung_on_the_same_folds(classes):
    result, _ = classes
    pivot = result.climb.best[1].hidden[0]
    wanted = [(), (16,), (32,), (64,), (128,), (pivot, pivot // 2), (pivot, pivot // 4)]
    assert [trial.hidden for trial in result.trials] == wanted
    assert {len(trial.scores) for trial in result.trials} == {3}
    for trial in result.trials:
        # A score of k correct rows out of the fold's size: every candidate is scored on the fold's own rows.
        for fold, score in zip(result.folds, trial.scores):
            assert score * len(fold.test) == pytest.approx(round(score * len(fold.test)))


def test_model_is_an_mlp_of_the_winners_shape(classes):
    result, _ = classes
    assert isinstance(result.model, mlpkit.nn.MLP)
    assert sum(value.numel() for value in result.model.parameters()) == result.winner.parameters
    assert not result.model.training


def test_study_lists_the_candidates(classes):
    result, _ = classes
    assert len(result.study.trials) == len(result.trials)
    assert result.study.best_value == pytest.approx(max(trial.mean for trial in result.trials))


# The estimator


def test_estimator_predicts_labels_and_probabilities_from_the_raw_table(classes):
    result, _ = classes
    fresh = mixed_table(200, seed=9)
    chances = result.estimator.predict_proba(fresh)
    labels = result.estimator.predict(fresh)
    assert list(result.estimator.classes_) == ["no", "yes"]
    np.testing.assert_allclose(chances.sum(1), 1.0)
    np.testing.assert_array_equal(labels, result.estimator.classes_[chances.argmax(1)])
    assert result.estimator.score(fresh, fresh["label"]) > 0.75


def test_regression_predicts_in_the_targets_own_units(numbers):
    result, _ = numbers
    fresh = line_table(200, seed=9)
    predicted = result.estimator.predict(fresh[["q", "p"]])  # Order of columns does not matter.
    assert abs(np.mean(predicted - fresh["y"])) < 10
    assert result.estimator.score(fresh, fresh["y"]) > 0.7
    with pytest.raises(ArgumentError, match="regression"):
        result.estimator.predict_proba(fresh)


def test_unseen_category_and_new_gaps_are_predicted(classes):
    result, _ = classes
    odd = pd.DataFrame({"u": [np.nan, 1.0], "v": [0.5, np.nan], "kind": ["never seen", None]})
    assert np.isfinite(result.estimator.predict_proba(odd)).all()


def test_text_in_a_column_of_numbers_names_column_and_row(classes):
    result, _ = classes
    bad = mixed_table(5)
    bad["v"] = ["1", "2", "three", "4", "5"]
    with pytest.raises(DataError, match="'v' must hold numbers, but data row 3 holds 'three'"):
        result.estimator.predict(bad)


def test_missing_column_suggests_the_nearest(classes):
    result, _ = classes
    with pytest.raises(DataError, match="lacks column 'kind'; did you mean 'Kinds'"):
        result.estimator.predict(mixed_table(5).rename(columns={"kind": "Kinds"}))


def test_empty_table_has_no_predictions(classes):
    result, _ = classes
    assert result.estimator.predict(mixed_table(5).iloc[:0]).shape == (0,)
    assert result.estimator.predict_proba(mixed_table(5).iloc[:0]).shape == (0, 2)


# What it writes


@pytest.mark.parametrize("which", ["classes", "numbers"])
def test_saved_model_predicts_bit_for_bit_what_the_run_does(which, request):
    result, out = request.getfixturevalue(which)
    loaded = TunedModel.load(out)
    fresh = mixed_table(50, 3) if which == "classes" else line_table(50, 3)
    np.testing.assert_array_equal(loaded.predict(fresh), result.estimator.predict(fresh))
    assert loaded.to_dict() == result.estimator.to_dict()


def test_run_directory_holds_five_files_and_nothing_else(classes):
    _, out = classes
    assert sorted(item.name for item in out.iterdir()) == [
        "model.json",
        "model.safetensors",
        "report.html",
        "report.json",
        "trials.csv",
    ]
    assert [item.name for item in out.parent.iterdir()] == ["run"]


def test_report_json_holds_all_numbers_as_strict_json(classes):
    result, out = classes
    report = json.loads((out / "report.json").read_text(), parse_constant=pytest.fail)
    assert report == result.to_dict()
    assert report["winner"] == result.winner.name
    assert len(report["fold_of_row"]) == 96
    assert set(report["fold_of_row"]) == {0, 1, 2}
    assert report["settings"]["seed"] == 1
    assert report["environment"]["versions"]["torch"] == torch.__version__
    assert [len(trial["folds"]) for trial in report["trials"]] == [3] * 7
    assert report["trials"][0]["folds"][0]["validation_loss"]


def test_report_page_works_offline_and_shows_verdicts_and_sections(classes):
    result, out = classes
    text = (out / "report.html").read_text()
    page = Page(text)
    assert len(text) < 7_000_000
    for verdict in result.verdicts:
        assert verdict.text in page.text
    for title in ("Ladder", "Leaderboard", "Learning", "Folds", "Data", "Reproducibility"):
        assert title in page.text
    for name, attributes in page.tags:
        for key in ("src", "href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), (name, key, value)
    assert len([item for item in page.find("div") if item.get("role") == "img" and item.get("aria-label")]) == 6


def test_figures_are_lawful_plotly(classes):
    import plotly.graph_objects as go

    from mlpkit.tune import plots

    result, _ = classes
    for figure in (plots.ladder(result), plots.curves(result), plots.folds(result)):
        go.Figure(_plain_colours(figure.plot))


def _plain_colours(value):
    if isinstance(value, dict):
        return {key: _plain_colours(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain_colours(item) for item in value]
    return "#aabbcc" if isinstance(value, str) and value.startswith("var(--") else value


def test_same_seed_gives_the_same_numbers_and_another_seed_others(numbers):
    result, _ = numbers
    again = tune(line_table(), "y", cv=3, random_state=1, progress=False)
    assert numbers_of(again.to_dict()) == numbers_of(result.to_dict())
    for one, two in zip(again.model.state_dict().values(), result.model.state_dict().values()):
        assert torch.equal(one, two)
    other = tune(line_table(), "y", cv=3, random_state=2, budget=0.001, progress=False)
    assert other.fold_of_row() != result.fold_of_row()


def test_global_generators_and_threads_are_left_alone():
    torch_state, numpy_state, threads = torch.random.get_rng_state(), np.random.get_state()[1], torch.get_num_threads()
    tune(line_table(24), "y", cv=2, budget=0.001, progress=False)
    assert torch.equal(torch_state, torch.random.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()
    assert torch.get_num_threads() == threads


def test_members_train_on_as_many_threads_as_torch_has_and_give_the_same_numbers(monkeypatch):
    seen, honest = [], trainer.train_members
    monkeypatch.setattr(trainer, "train_members", lambda *a, **b: (seen.append(b["threads"]), honest(*a, **b))[1])
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            runs.append(tune(line_table(60), "y", cv=3, random_state=1, budget="16 trials", progress=False))
            assert set(seen) == {threads}
            seen.clear()
    finally:
        torch.set_num_threads(before)
    assert numbers_of(runs[0].to_dict()) == numbers_of(runs[1].to_dict())
    one, two = (run.model.state_dict().values() for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_drawn_seed_is_recorded_and_repeats_the_run():
    first = tune(line_table(24), "y", cv=2, budget=0.001, progress=False)
    second = tune(line_table(24), "y", cv=2, budget=0.001, random_state=first.settings["seed"], progress=False)
    third = tune(line_table(24), "y", cv=2, budget=0.001, progress=False)
    assert third.settings["seed"] != first.settings["seed"]
    assert [trial.scores for trial in first.trials] == [trial.scores for trial in second.trials]


def test_arrays_and_frames_give_the_same_scores():
    frame = line_table()
    settings = {"cv": 3, "random_state": 1, "budget": 0.001, "progress": False}
    named = tune(frame[["p", "q"]], frame["y"], **settings)
    bare = tune(frame[["p", "q"]].to_numpy(), frame["y"].tolist(), **settings)
    assert [trial.scores for trial in bare.trials] == [trial.scores for trial in named.trials]
    assert bare.estimator.feature_names_in_ == ["x0", "x1"]


# Budget


def test_spent_budget_leaves_the_linear_model_and_says_what_was_not_tried():
    result = tune(line_table(40), "y", cv=2, budget=0.001, random_state=0, progress=False)
    assert [trial.name for trial in result.trials] == ["linear"]
    texts = " ".join(verdict.text for verdict in result.verdicts)
    assert "Only the linear model was tried" in texts
    assert "The time budget ended before one hidden layer of 16" in texts
    assert np.isfinite(result.estimator.predict(line_table(5))).all()
    result.to_dict()


def test_candidate_cut_by_the_clock_is_listed_but_never_wins(monkeypatch, tmp_path):
    honest = trainer.train_members

    def slow(specs, folds, out_features, *, deadline, **rest):
        # The clock runs out on the widest layer.
        return honest(specs, folds, out_features, deadline=-1.0 if specs[0].hidden == (128,) else deadline, **rest)

    monkeypatch.setattr(trainer, "train_members", slow)
    result = tune(line_table(40), "y", cv=2, random_state=0, out=tmp_path / "run", progress=False)
    (cut,) = [trial for trial in result.trials if trial.state == "out of time" and not trial.params.get("dropout")]
    assert cut.name == "128"
    assert cut is not result.winner
    assert "one hidden layer of 128" in result.verdicts[-1].text
    assert "out of time" in Page((tmp_path / "run" / "report.html").read_text()).text

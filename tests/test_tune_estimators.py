"""The scikit-learn estimators: its own checks, tables with gaps and categories, weights, export and files."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.utils.estimator_checks import parametrize_with_checks

import mlpkit
from mlpkit.errors import ArgumentError
from mlpkit.tune import TunedModel

# The search is cut short in trials and epochs, not in kind: folds, verdicts and the fit on all rows are all there.
QUICK = {"budget": "1 trials", "cv": 2, "space": {"epochs": 30, "lr": 0.05, "batch_size": 64}}
CHECKED = [
    mlpkit.MLPClassifier((32,), learning_rate_init=0.02, max_iter=60),
    mlpkit.MLPRegressor((32,), learning_rate_init=0.02, max_iter=60),
    mlpkit.TunedMLPClassifier(**QUICK),
    mlpkit.TunedMLPRegressor(**QUICK),
]


@pytest.mark.filterwarnings("default")
@parametrize_with_checks(CHECKED)
def test_scikit_learns_checks(estimator, check):
    check(estimator)


def mixed(rows=200, seed=0):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"u": rng.normal(size=rows), "kind": rng.choice(["a", "b"], rows)})
    label = np.where((frame["u"] > 0) == (frame["kind"] == "a"), "yes", "no")
    frame.loc[::17, "u"] = np.nan
    frame.loc[::13, "kind"] = None
    return frame, label


@pytest.fixture(scope="module")
def fitted():
    return mlpkit.MLPClassifier((32,), learning_rate_init=0.01, random_state=0).fit(*mixed())


def test_a_table_with_gaps_and_categories_is_learnt(fitted):
    frame, label = mixed(seed=1)
    assert fitted.score(frame, label) > 0.85
    chances = fitted.predict_proba(frame)
    assert chances.dtype == np.float64
    np.testing.assert_allclose(chances.sum(1), 1.0)
    assert list(fitted.classes_) == ["no", "yes"]


def test_the_export_is_plain_pytorch_and_computes_the_same(fitted):
    frame, _ = mixed(20)
    module = fitted.export()
    assert all(type(part).__module__.startswith("torch.nn") for part in module)
    columns = {"u": frame["u"].to_numpy(float), "kind": frame["kind"].to_numpy(object)}
    x = torch.from_numpy(fitted.model_.encoder.transform(columns)).double()
    np.testing.assert_allclose(module(x).softmax(1).detach().numpy(), fitted.model_.model(x).softmax(1).detach())


def test_files_hold_no_code_and_predict_the_same(fitted, tmp_path):
    fitted.save(tmp_path / "m")
    assert sorted(item.name for item in (tmp_path / "m").iterdir()) == ["model.json", "model.safetensors"]
    frame, _ = mixed(50, 2)
    loaded = TunedModel.load(tmp_path / "m")
    np.testing.assert_array_equal(loaded.predict(frame), fitted.predict(frame))
    np.testing.assert_allclose(loaded.predict_proba(frame), fitted.predict_proba(frame), atol=1e-5)


def test_pickle_and_clone_work(fitted):
    frame, _ = mixed(30, 3)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(frame), fitted.predict(frame))
    assert clone(fitted).get_params() == fitted.get_params()


@pytest.mark.parametrize("solver", ["adam", "adamw", "sgd", "rmsprop"])
def test_weights_count_like_repeated_rows_bit_for_bit(solver):
    rng = np.random.default_rng(0)
    X, weight = rng.normal(size=(40, 3)), rng.integers(0, 4, 40)
    y = X[:, 0] * 2 + rng.normal(size=40)
    settings = {"hidden_layer_sizes": (8,), "solver": solver, "max_iter": 20, "random_state": 0, "batch_size": 16}
    weighted = mlpkit.MLPRegressor(**settings).fit(X, y, sample_weight=weight)
    repeated = mlpkit.MLPRegressor(**settings).fit(np.repeat(X, weight, 0), np.repeat(y, weight))
    np.testing.assert_array_equal(weighted.predict(X), repeated.predict(X))


def test_early_stopping_stops():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(120, 4))
    y = X[:, 0] + rng.normal(size=120)
    stopped = mlpkit.MLPRegressor((64,), learning_rate_init=0.01, early_stopping=True, random_state=0).fit(X, y)
    assert 1 <= stopped.n_iter_ < 200


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"solver": "lbfgs"}, "solver is 'lbfgs'"),
        ({"max_iter": 0}, "max_iter is 0"),
        ({"activation": "maxout"}, "maxout"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_bad_parameters_are_named(change, words):
    with pytest.raises(ArgumentError, match=words):
        mlpkit.MLPClassifier(**change).fit(*mixed(40))


def test_the_search_is_an_estimator_with_verdicts():
    frame, label = mixed(120)
    tuned = mlpkit.TunedMLPClassifier("constructive", "2 trials", cv=2, random_state=0).fit(frame, label)
    assert len(tuned.run_.trials) <= 2
    assert tuned.verdicts_[0].text
    assert len(tuned.cv_results_["params"]) == len(tuned.cv_results_["mean_test_score"])
    assert set(tuned.predict(frame)) <= {"no", "yes"}
    assert tuned.best_score_ == tuned.run_.winner.mean

"""Verdicts on hyperparameters, borders, shapes and leaks, the corrected score, importance: planted truths."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from tune_fakes import searching

from mlpkit.tune import findings
from mlpkit.tune.columns import single_columns
from mlpkit.tune.final import estimate
from mlpkit.tune.fit_verdict import curve, fit
from mlpkit.tune.folds import make_folds
from mlpkit.tune.honest import corrected
from mlpkit.tune.importance import importance
from mlpkit.tune.ladder import Trial, from_trials
from mlpkit.tune.problem import read_problem
from mlpkit.tune.space import Space
from mlpkit.tune.strategies import in_batches, sobol
from mlpkit.tune.trainer import Outcome


def searched(monkeypatch, quality, space, count=96, noise=0.004, **fake):
    search, _ = searching(monkeypatch, quality, space=space, noise=noise, **fake)
    _ = search.linear
    in_batches(search, sobol(search.space, [n for n in search.space.free() if n in space.given], [0]), "x", count)
    return search


def steep(spec):
    return 0.9 - 0.25 * min(abs(math.log10(spec.lr / 1e-3)), 2)


def flat(spec):
    return 0.9


SPACE = Space(layers=1, width=64, lr=(1e-5, 1e-1), batch_size=[16, 32, 64, 128])


def by_part(search):
    found = findings.hyperparameters(search.trials, search.space, search.best)
    return {verdict.numbers["part"]: verdict for verdict in found}


def test_a_narrow_optimum_is_volatile_and_a_flat_part_robust(monkeypatch):
    verdicts = by_part(searched(monkeypatch, steep, SPACE))
    assert verdicts["lr"].value == "volatile"
    assert "SE" in verdicts["lr"].text
    assert verdicts["batch_size"].value == "robust"


def test_what_does_not_matter_is_robust(monkeypatch):
    assert {verdict.value for verdict in by_part(searched(monkeypatch, flat, SPACE)).values()} == {"robust"}


def test_few_trials_are_inconclusive_and_say_how_many_more_would_tell(monkeypatch):
    verdict = by_part(searched(monkeypatch, steep, SPACE, count=6))["lr"]
    assert verdict.value == "inconclusive"
    assert "more would tell" in verdict.text


def test_an_optimum_beyond_the_border_raises_an_alarm_and_one_inside_none(monkeypatch):
    def beyond(spec):
        return 0.5 + 0.05 * math.log10(spec.lr)

    (alarm,) = findings.borders(*_trials(searched(monkeypatch, beyond, SPACE)))
    assert (alarm.value, alarm.tone) == ("lr", "notice")
    assert alarm.numbers["end"] == pytest.approx(0.1)
    assert findings.borders(*_trials(searched(monkeypatch, steep, SPACE))) == []


def test_no_dropout_at_all_is_no_border_to_widen(monkeypatch):
    def none(spec):
        return 0.9 - spec.dropout[-1] / 2 if spec.hidden else 0.5

    space = Space(layers=1, width=64, dropout=(0.0, 0.9))
    assert findings.borders(*_trials(searched(monkeypatch, none, space))) == []


def _trials(search):
    return search.trials, search.space


def test_wide_or_tapered_is_told_by_the_better_of_each(monkeypatch):
    space = Space(layers=2, width=[32, 64], shape=["wide", "tapered"], expand=False)
    for quality, value in ((lambda spec: 0.9 - 0.1 * (len(set(spec.hidden)) > 1), "wide"), (flat, "either")):
        search = searched(monkeypatch, quality, space, count=8)
        assert findings.shape(from_trials(search.trials)).value == value


def test_dropout_or_decay_is_told_by_the_better_of_each(monkeypatch):
    space = Space(layers=1, width=64, dropout=(0.0, 0.8), weight_decay=(1e-4, 1e-2))

    def dropped(spec):
        return 0.7 + 0.2 * (spec.dropout[-1] > 0.5 and spec.weight_decay < 8e-4) if spec.hidden else 0.5

    search = searched(monkeypatch, dropped, space, count=64)
    assert findings.regularisation(from_trials(search.trials)).value == "dropout"
    assert findings.regularisation(from_trials(searched(monkeypatch, flat, space).trials)).value == "either"


# Leaks


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_column_that_knows_the_target_is_suspected_and_an_honest_one_is_not(task):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(400, 3)), columns=list("abc"))
    y = (frame["a"] + rng.normal(size=400)) if task == "regression" else (frame["a"] > rng.normal(size=400)) * 1
    folds = make_folds(np.asarray(y), 5, 0, stratify=task == "classification")
    honest = single_columns(read_problem(frame, y, task, 5), folds[:1])
    assert findings.leakage(honest, "score") is None
    frame["copy"] = y * 3 + 1
    leaky = findings.leakage(single_columns(read_problem(frame, y, task, 5), folds[:1]), "score")
    assert (leaky.value, leaky.tone) == ("suspected", "bad")
    assert "'copy'" in leaky.text


# The corrected score


def test_the_luck_of_the_best_of_many_is_taken_off():
    errors = []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = (rng.random((60, 300)) < 0.7).astype(float)  # Sixty candidates, all of them 0.7 in truth.
        winner = int(rows.mean(1).argmax())
        found = corrected(rows, [1] * 60, winner, rows[winner].reshape(5, 60).mean(1), seed)
        assert found.raw > 0.73
        assert found.low < found.score < found.high
        errors.append((found.score - 0.7, found.raw - 0.7))
    left, luck = np.mean(errors, axis=0)
    assert abs(left) < 0.45 * luck


def test_a_single_candidate_owes_nothing_to_choice():
    rng = np.random.default_rng(0)
    rows = (rng.random((1, 300)) < 0.7).astype(float)
    found = corrected(rows, [0], 0, rows[0].reshape(5, 60).mean(1), 0)
    assert found.optimism == pytest.approx(0.0, abs=1e-12)


def test_the_interval_covers_a_fresh_test():
    inside = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = (rng.random((10, 200)) < 0.8).astype(float)
        winner = int(rows.mean(1).argmax())
        found = corrected(rows, [0] + [1] * 9, winner, rows[winner].reshape(5, 40).mean(1), seed)
        inside += found.low <= 0.8 <= found.high
    assert 50 <= inside <= 60


def test_a_search_is_corrected_by_its_rows(monkeypatch):
    search = searched(monkeypatch, flat, SPACE, count=32, noise=0.0, hits=True, rows=200)
    found = estimate(search, from_trials(search.trials))
    assert found.raw >= found.score
    assert abs(found.score - 0.9) < 0.04


# Rungs


def test_a_rung_stops_who_is_behind_and_says_why(monkeypatch):
    def quality(spec):
        return 0.95 if spec.lr > 1e-3 else 0.55

    search = searched(monkeypatch, quality, SPACE, count=32, hits=True, rows=300, noise=0.0)
    states = {trial.state for trial in search.trials if trial.params.get("lr", 1) > 1e-3}
    pruned = [trial for trial in search.trials if trial.state == "pruned"]
    assert states == {"complete"}
    assert pruned
    assert all(len(trial.outcomes) == 2 for trial in pruned)
    assert all("after 2 of 5 folds" in trial.reason for trial in pruned)
    assert search.best.params["lr"] > 1e-3


def test_why_a_trial_stopped_is_recorded(monkeypatch):
    search = searched(monkeypatch, lambda spec: math.nan if spec.lr > 0.01 else 0.8, SPACE, count=16)
    reasons = {trial.state: trial.reason for trial in search.trials}
    assert reasons["diverged"].startswith("the loss became non-finite on fold")
    assert reasons["complete"] == "patience"


# Importance


def test_importance_names_what_matters_and_its_interval(monkeypatch):
    search = searched(monkeypatch, steep, SPACE)
    found = {item.name: item for item in importance(search.trials, search.space)}
    assert found["lr"].low > 0.0
    assert found["lr"].value > 5 * abs(found["batch_size"].value)
    assert found["batch_size"].low < 0.1


# The fit


def outcomes_of(scores, losses, stopped="patience", train=None):
    best = int(np.argmin(losses))
    return [Outcome(score, train or score, best, stopped, 0.0, losses, losses) for score in scores]


def fitted(losses, *, stopped="patience", halved=(), train=None):
    high = [0.90, 0.91, 0.89, 0.90, 0.90]
    linear = Trial((), 5, outcomes_of([0.6] * 5, [1.0, 0.9, 0.9]), "complete")
    deep = Trial((16,), 50, outcomes_of(high, losses, stopped, train), "complete", {"layers": 1})
    deep.halved = outcomes_of(halved, losses) if len(halved) else []
    return fit(from_trials([linear, deep]), "accuracy", 0.5)


FLAT = [1.0, 0.5, 0.4, 0.4, 0.4, 0.4]


def test_half_of_the_rows_tell_whether_more_would_help():
    verdict = fitted(FLAT, halved=[0.80, 0.82, 0.79, 0.81, 0.80])
    assert (verdict.value, verdict.tone) == ("data-limited", "notice")
    assert verdict.numbers["gain_of_rows"] == pytest.approx(0.096)
    assert fitted(FLAT, halved=[0.90, 0.905, 0.89, 0.90, 0.90]).value == "fine"
    assert fitted(FLAT).value == "fine"


def test_a_loss_that_still_falls_at_the_last_epoch_is_called_underfit():
    falling = [1.0 - 0.1 * epoch for epoch in range(9)]
    verdict = fitted(falling, stopped="epochs")
    assert verdict.value == "underfit"
    assert "at the last of 9 epochs" in verdict.text
    assert fitted(falling, stopped="patience").value == "fine"
    assert fitted([1.0, 0.4, *[0.4 - 1e-4 * epoch for epoch in range(20)]], stopped="epochs").value == "fine"


@pytest.mark.parametrize(
    ("losses", "stopped", "words"),
    [
        (FLAT, "patience", "levels off"),
        ([1.0, 0.8, 0.6, 0.4, 0.2], "epochs", "still falling"),
    ],
)
def test_each_learning_curve_is_told_in_words(losses, stopped, words):
    assert words in curve(Trial((16,), 5, outcomes_of([0.9] * 5, losses, stopped), "complete"))

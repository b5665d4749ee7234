"""Averages of finalists, temperatures, intervals and what a single prediction can be trusted: planted truths."""

from __future__ import annotations

import json
import math
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from tune_fakes import FakeTrainer, searching, table

import mlpkit
from mlpkit import cli
from mlpkit.errors import ArgumentError, MissingExtraError
from mlpkit.nn import MLP
from mlpkit.tune import TunedModel, trainer, tune
from mlpkit.tune.calibration import calibration_error, fit_temperature, softmax
from mlpkit.tune.ensemble import Average, choose
from mlpkit.tune.ladder import from_trials

WIDTHS = [{"layers": 1, "width": width} for width in (16, 32, 64, 128)]


def quality(spec):
    return 0.8 if spec.hidden else 0.55


# Temperature


def overconfident(rows=4000, by=3.0, seed=0):
    """Logits that are ``by`` times too large for how often they are right."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, 3))
    chances = softmax(logits)
    truth = (rng.random(rows)[:, None] > chances.cumsum(1)).sum(1)
    return logits * by, truth


def test_the_temperature_undoes_a_planted_one_and_calibrates():
    logits, truth = overconfident()
    t = fit_temperature(logits, truth)
    assert t == pytest.approx(3.0, rel=0.1)
    assert calibration_error(softmax(logits, t), truth) < 0.3 * calibration_error(softmax(logits), truth)


def test_the_temperature_has_the_least_log_loss():
    logits, truth = overconfident(300, by=0.7)

    def loss(t):
        return -np.log(softmax(logits, t)[np.arange(300), truth]).mean()

    t = fit_temperature(logits, truth)
    assert loss(t) < min(loss(t * 1.05), loss(t / 1.05))


def test_rows_that_are_all_right_do_not_ask_for_certainty():
    logits, truth = np.eye(2)[[0, 1] * 20], np.array([0, 1] * 20)
    t = fit_temperature(logits, truth)
    assert 0.1 < t < 1.0
    assert 0.95 < softmax(logits, t).max() < 0.995


def test_weights_of_rows_count_like_repeats():
    logits, truth = overconfident(50)
    weight = np.arange(50) % 3
    repeated = fit_temperature(np.repeat(logits, weight, 0), np.repeat(truth, weight))
    # The doubt of a row depends on how many there are.
    assert fit_temperature(logits, truth, weight.astype(float)) == pytest.approx(repeated, rel=0.02)


# The average


def test_networks_that_err_apart_are_averaged(monkeypatch):
    search, _ = searching(monkeypatch, quality, rows=300, hits=True)
    search.evaluate(WIDTHS, "x", prune=False)
    committee = choose(search, from_trials(search.trials))
    assert committee.better
    assert len(committee.trials) > 1
    assert committee.score > 0.82
    assert committee.step.gain > 0.0


class Copies(FakeTrainer):
    """All networks give what the first gives."""

    def outcome(self, spec, fold, number):
        return super().outcome(self.specs[-1] if not spec.hidden else self.like, fold, number)


def test_networks_that_agree_are_not_averaged(monkeypatch):
    search, _ = searching(monkeypatch, quality, rows=300)
    copies = Copies(quality, hits=True)
    copies.like = search.spec(WIDTHS[0])[0]
    monkeypatch.setattr(trainer, "train_members", copies)
    search.evaluate(WIDTHS, "x", prune=False)
    committee = choose(search, from_trials(search.trials))
    assert not committee.better
    assert committee.step.gain == pytest.approx(0.0, abs=1e-9)


def test_linear_is_never_averaged_and_neither_is_what_was_not_kept(monkeypatch):
    search, _ = searching(monkeypatch, lambda spec: 0.8, rows=300, hits=True)
    search.evaluate(WIDTHS, "x", prune=False)
    assert from_trials(search.trials).winner_rung == 0
    assert choose(search, from_trials(search.trials)) is None
    search, _ = searching(monkeypatch, quality, rows=300, hits=False)
    search.evaluate(WIDTHS, "x", prune=False)
    assert choose(search, from_trials(search.trials)) is None


@pytest.mark.parametrize("classes", [True, False])
def test_an_average_is_the_mean_of_chances_or_numbers(classes):
    models = [MLP(4, (8,), 3), MLP(4, (5, 5), 3)]
    x = torch.randn(7, 4)
    both = Average(models, [1, 3], classes=classes).eval()
    parts = [model.eval()(x) for model in models]
    if classes:
        wanted = 0.25 * parts[0].softmax(1) + 0.75 * parts[1].softmax(1)
        torch.testing.assert_close(both(x).softmax(1), wanted)
    else:
        torch.testing.assert_close(both(x), 0.25 * parts[0] + 0.75 * parts[1])
    plain = both.to_sequential().eval()
    assert {type(part).__module__.split(".")[0] for part in plain.mean.models[0]} == {"torch"}
    torch.testing.assert_close(plain(x), both(x))


# From end to end


@pytest.fixture
def averaged(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "train_members", FakeTrainer(quality, hits=True))
    frame = table(240)
    run = tune(
        frame, "label", strategy="random", ensemble=True, budget="24 trials", random_state=0, progress=False,
        space={"epochs": 5, "dropout": 0.5, "scaling": "standard"}, out=tmp_path / "run",
    )  # fmt: skip
    return run, frame, tmp_path / "run"


def test_a_run_predicts_with_the_average_saves_it_and_says_so(averaged):
    run, frame, out = averaged
    assert len(run.estimator.members) > 1
    verdict = next(item for item in run.verdicts if item.kind == "ensemble")
    assert verdict.value == "average"
    assert verdict.text in (out / "report.html").read_text()
    loaded = TunedModel.load(out)
    np.testing.assert_array_equal(loaded.predict_proba(frame), run.estimator.predict_proba(frame))
    assert loaded.members == run.estimator.members
    assert loaded.temperature == run.estimator.temperature != 1.0
    told = json.loads((out / "report.json").read_text())["committee"]
    assert told["used"]
    assert len(told["trials"]) == len(told["weights"]) == len(loaded.members)
    assert run.estimate.score > run.winner.mean - run.estimate.optimism


def test_networks_of_several_encodings_are_averaged_each_on_its_own_inputs(monkeypatch, tmp_path):
    monkeypatch.setattr(trainer, "train_members", FakeTrainer(quality, hits=True))
    frame = table(240)
    space = {"epochs": 5, "scaling": ["standard", "robust"], "periodic": [0.0, 0.3], "layers": [1, 2]}
    run = tune(
        frame, "label", strategy="random", ensemble=True, budget="24 trials", random_state=0, progress=False,
        space=space, out=tmp_path / "run",
    )  # fmt: skip
    model = run.estimator
    parts = {member.inputs for member in model.members}
    assert len(parts) > 1
    assert max(end for _, end in parts) == len(model.encoder.feature_names) == model.inputs(frame).shape[1]
    loaded = TunedModel.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.predict_proba(frame), model.predict_proba(frame))
    module, inputs = model.export(), model.inputs(frame)
    torch.testing.assert_close(module(inputs), run.model(inputs))
    assert model.uncertainty(frame)["disagreement"].between(0, 1).all()


def test_the_winner_from_other_seeds_is_averaged(monkeypatch):
    search, _ = searching(monkeypatch, quality, rows=300, hits=True)
    search.evaluate(WIDTHS, "x", prune=False)
    climb = from_trials(search.trials)
    search.retrain(climb.winner, 4)
    assert len(climb.winner.again) == 4
    committee = choose(search, climb)
    assert committee.better
    winners = [seed for trial, seed in zip(committee.trials, committee.seeds) if trial is climb.winner]
    assert sorted(winners) == [0, 1, 2, 3, 4]
    assert len({weight for trial, weight in zip(committee.trials, committee.weights) if trial is climb.winner}) == 1


def test_the_export_of_an_average_computes_the_same(averaged):
    run, frame, _ = averaged
    module, inputs = run.estimator.export(), run.estimator.inputs(frame)
    torch.testing.assert_close(module(inputs), run.model(inputs))


def test_an_average_is_left_out_on_request(monkeypatch):
    monkeypatch.setattr(trainer, "train_members", FakeTrainer(quality, hits=True))
    run = tune(
        table(240), "label", ensemble=False, budget="9 trials", random_state=0, progress=False
    )  # fmt: skip
    assert run.committee is None
    assert run.estimator.members == ()


# Uncertainty


def test_disagreement_is_between_nothing_and_all_and_repeats_itself(averaged):
    run, frame, _ = averaged
    first = run.estimator.uncertainty(frame)
    assert list(first.columns) == ["uncertainty", "disagreement"]
    assert first.to_numpy().min() >= 0.0
    assert first.to_numpy().max() <= 1.0
    pd.testing.assert_frame_equal(first, run.estimator.uncertainty(frame))
    chances = run.estimator.predict_proba(frame)
    entropy = -(chances * np.log(chances)).sum(1) / math.log(2)
    np.testing.assert_allclose(first["uncertainty"], entropy)
    assert len(run.estimator.uncertainty(frame.iloc[:0])) == 0


def line(rows, seed):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(rows, 3))
    return X, 100.0 + 7.0 * X[:, 0] + rng.normal(0, 3.0, rows)


def test_intervals_hold_what_they_promise_in_the_targets_units():
    X, y = line(200, 0)
    space = {"epochs": 40, "lr": 0.03}
    run = tune(
        X, y, strategy="grid", space={**space, "layers": 0}, budget="1 trials", random_state=0, progress=False
    )  # fmt: skip
    fresh, truth = line(4000, 1)
    found = run.estimator.uncertainty(fresh)
    assert list(found.columns) == ["low", "high"]  # One network without dropout has no spread.
    held = ((found["low"] <= truth) & (truth <= found["high"])).mean()
    assert 0.84 < held < 0.96
    assert found["high"].iloc[0] - found["low"].iloc[0] == pytest.approx(2 * 1.645 * 3.0, rel=0.25)


def test_masks_of_dropout_give_a_spread_that_grows_away_from_the_rows():
    X, y = line(120, 0)
    model = mlpkit.MLPRegressor((32,), dropout=0.3, max_iter=60, learning_rate_init=0.01, random_state=0).fit(X, y)
    near, far = model.uncertainty(X, samples=40)["spread"], model.uncertainty(5.0 * X, samples=40)["spread"]
    assert (near > 0.0).all()
    assert far.median() > 2.0 * near.median()


@pytest.mark.parametrize("samples", [1, 0, True, 2.5])
def test_too_few_samples_are_refused(averaged, samples):
    run, frame, _ = averaged
    with pytest.raises(ArgumentError, match="uncertainty: samples is"):
        run.estimator.uncertainty(frame, samples=samples)


def test_the_command_adds_columns(averaged, monkeypatch, capsys, tmp_path):
    _, frame, out = averaged
    frame.drop(columns="label").to_csv(tmp_path / "new.csv", index=False)
    monkeypatch.setattr(sys, "argv", ["mlpkit", "predict", str(out), str(tmp_path / "new.csv"), "--uncertainty"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    header = capsys.readouterr().out.splitlines()[0]
    assert header == "label,probability of no,probability of yes,uncertainty,disagreement"


# ONNX


@pytest.mark.filterwarnings("ignore")  # Those of the exporter about itself.
def test_an_onnx_file_computes_the_same(averaged, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    run, frame, _ = averaged
    run.estimator.export_onnx(tmp_path / "model.onnx")
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    inputs = run.estimator.inputs(frame)
    (found,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), run.model(inputs), rtol=1e-4, atol=1e-5)


def test_onnx_without_its_extra_is_one_sentence(averaged, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    run, _, _ = averaged
    with pytest.raises(MissingExtraError, match="onnxscript"):
        run.estimator.export_onnx(tmp_path / "model.onnx")

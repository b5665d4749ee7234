"""The parts of tune on their own: folds, encoder, statistics, ladder, verdicts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch

from mlpkit.tune import stats
from mlpkit.tune.encoder import MAX_LEVELS, Encoder
from mlpkit.tune.folds import make_folds
from mlpkit.tune.ladder import Trial, climb
from mlpkit.tune.problem import encode_fold, read_problem
from mlpkit.tune.space import Space
from mlpkit.tune.strategies import shape_params
from mlpkit.tune.study import to_study
from mlpkit.tune.table import Column, clean
from mlpkit.tune.trainer import Outcome
from mlpkit.tune.verdicts import judge


def column(values, kind="numeric"):
    data = {"a": np.array(values, dtype=np.float64 if kind == "numeric" else object)}
    return data, [Column("a", kind)], np.arange(len(values))


def trial(hidden, scores, train=0.9, rise=0.0, state="complete"):
    outcomes = [
        Outcome(score, train, 1, "patience", 0.1, [1.0, 0.5, 0.4], [1.0, 0.5, 0.5 + rise * (1 + 0.1 * number)])
        for number, score in enumerate(scores)
    ]
    return Trial(hidden, 10 + sum(hidden), outcomes, state)


def climb_with(scores, **changes):
    """A climb whose candidates have the given fold scores; those not named are not tried."""
    return climb(lambda hidden: trial(hidden, scores[hidden], **changes) if hidden in scores else None)


LOW = [0.80, 0.82, 0.81, 0.79, 0.83]
HIGH = [0.90, 0.91, 0.92, 0.89, 0.93]
ALL = [(), (16,), (32,), (64,), (128,), (16, 8), (16, 4)]


# Folds


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize("rows", [20, 151])
def test_every_row_is_tested_once_and_no_part_overlaps(rows, stratify):
    target = np.arange(rows) % 3
    folds = make_folds(target, 5, seed=3, stratify=stratify)
    assert sorted(np.concatenate([fold.test for fold in folds])) == list(range(rows))
    for fold in folds:
        assert sorted(np.concatenate([fold.train, fold.validation, fold.test])) == list(range(rows))
        assert len(fold.validation) >= 1
        assert rows // 5 <= len(fold.test) <= rows // 5 + 1


def test_stratified_folds_share_out_every_class():
    target = np.repeat([0, 1, 2], [80, 15, 5])
    for fold in make_folds(target, 5, seed=0, stratify=True):
        assert list(np.bincount(target[fold.test])) == [16, 3, 1]
        assert set(target[fold.train]) == {0, 1, 2}


def test_folds_depend_on_the_seed_alone():
    target = np.arange(50) % 2

    def tests(seed):
        return [fold.test.tolist() for fold in make_folds(target, 5, seed, stratify=True)]

    assert tests(1) == tests(1)
    assert tests(1) != tests(2)


# Encoder


def test_numbers_are_imputed_with_the_median_standardised_and_flagged():
    data, columns, rows = column([1.0, 3.0, np.nan, 8.0])
    x = Encoder.fit(data, columns, rows).transform(data)
    filled = np.array([1.0, 3.0, 3.0, 8.0])
    np.testing.assert_allclose(x[:, 0], (filled - filled.mean()) / filled.std(), rtol=1e-6)
    np.testing.assert_array_equal(x[:, 1], [0, 0, 1, 0])


def test_gap_that_training_never_saw_is_imputed_without_an_indicator():
    data, columns, rows = column([1.0, 3.0, 5.0])
    encoder = Encoder.fit(data, columns, rows)
    x = encoder.transform({"a": np.array([np.nan])})
    np.testing.assert_array_equal(x, [[0.0]])


def test_unseen_category_is_all_zeros_and_missing_is_a_category_of_its_own():
    data, columns, rows = column(["red", "blue", None], "categorical")
    encoder = Encoder.fit(data, columns, rows)
    assert encoder.feature_names == ["a = blue", "a = red", "a = missing"]
    x = encoder.transform({"a": np.array(["red", "green", None], dtype=object)})
    np.testing.assert_array_equal(x, [[0, 1, 0], [0, 0, 0], [0, 0, 1]])


def test_only_the_frequent_categories_get_an_input():
    values = [f"k{number}" for number in range(40)] + [f"k{number}" for number in range(5, 40)]
    data, columns, rows = column(values, "categorical")
    names = Encoder.fit(data, columns, rows).feature_names
    assert len(names) == MAX_LEVELS
    assert "a = k0" not in names


@pytest.mark.parametrize("values", [[1e200, -1e200, 3e200], [5.0, 5.0, 5.0], [0.0, 1e-320, 0.0], [1.0, 1.0, 1e12]])
def test_extreme_numbers_stay_finite(values):
    data, columns, rows = column(values)
    encoder = Encoder.fit(data, columns, rows)
    assert np.isfinite(encoder.transform(data)).all()
    assert np.isfinite(encoder.transform({"a": np.array([1e300, -1e300, np.nan])})).all()


def test_waves_of_a_number_are_inputs_too():
    data, columns, rows = column([*np.linspace(-2, 2, 20), math.nan])
    plain = Encoder.fit(data, columns, rows).transform(data)
    encoder = Encoder.fit(data, columns, rows, periodic=0.5)
    inputs, frequencies = encoder.transform(data), encoder.codes[0].frequencies
    assert inputs.shape[1] == plain.shape[1] + 2 * len(frequencies) == len(encoder.feature_names)
    np.testing.assert_array_equal(inputs[:, :2], plain)
    for at, frequency in enumerate(frequencies):
        turned = 2 * np.pi * frequency * plain[:, 0].astype(np.float64)
        np.testing.assert_allclose(inputs[:, 2 + 2 * at], np.sin(turned), atol=1e-6)
        np.testing.assert_allclose(inputs[:, 3 + 2 * at], np.cos(turned), atol=1e-6)
    assert Encoder.from_dict(encoder.to_dict()) == encoder
    assert not Encoder.fit(*column([0.0, 1.0, 0.0, 1.0]), periodic=0.5).codes[0].frequencies


def test_encoder_survives_the_way_through_json():
    data, columns, rows = column(["x", "y", None], "categorical")
    data["b"] = np.array([1.0, np.nan, 3.0])
    encoder = Encoder.fit(data, [*columns, Column("b", "numeric")], rows)
    assert Encoder.from_dict(encoder.to_dict()) == encoder


def test_whole_numbers_name_one_category_whether_or_not_the_file_has_gaps():
    columns = [Column("a", "categorical")]
    whole, gaps = clean(pd.DataFrame({"a": [1, 2]}), columns), clean(pd.DataFrame({"a": [1.0, None]}), columns)
    assert whole["a"][0] == gaps["a"][0] == "1"


def test_test_and_validation_rows_teach_the_encoder_and_the_target_scale_nothing():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"a": rng.normal(size=60), "b": rng.choice(["u", "v"], 60)})
    target = rng.normal(size=60)
    fold = make_folds(target, 5, 0, stratify=False)[0]
    before = encode_fold(read_problem(frame, target, "regression", 5), fold)
    outside = np.concatenate([fold.validation, fold.test])
    frame.loc[outside, "a"] = 1e6
    frame.loc[outside[0], "a"] = np.nan
    frame.loc[outside, "b"] = "w"
    target[outside] = 1e6
    after = encode_fold(read_problem(frame, target, "regression", 5), fold)
    assert torch.equal(before.train.x, after.train.x)
    assert torch.equal(before.train.y, after.train.y)
    assert not torch.equal(before.test.x, after.test.x)


# Statistics


def test_standard_error_is_that_of_the_mean():
    assert stats.standard_error([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(math.sqrt(2.5 / 5))


def test_comparison_pairs_the_folds_and_widens_for_shared_rows():
    step = stats.compare([0.9, 0.9, 0.9, 0.9], [0.8, 0.7, 0.8, 0.7])
    assert step.gain == pytest.approx(0.15)
    assert step.se == pytest.approx(np.std([0.1, 0.2, 0.1, 0.2], ddof=1) * math.sqrt(1 / 4 + 1 / 3))


def test_equal_differences_do_not_make_a_gain_look_certain():
    step = stats.compare([0.6, 0.8, 0.7], [0.59, 0.79, 0.69])
    assert step.se == pytest.approx(stats.standard_error([0.6, 0.8, 0.7]))
    assert not step.earned


def test_equal_perfect_scores_earn_nothing():
    assert not stats.compare([1.0, 1.0], [1.0, 1.0]).earned
    assert stats.compare([1.0, 1.0], [0.5, 0.5]).earned


# Ladder


def test_linear_stays_when_no_rung_is_better_by_more_than_one_se():
    scores = {(): HIGH, (16,): LOW, (32,): HIGH, (32, 16): HIGH, (32, 8): LOW}
    result = climb_with(scores)
    assert result.winner.hidden == ()


def test_best_width_is_the_pivot_of_the_funnel():
    asked = []

    def run(hidden):
        asked.append(hidden)
        return trial(hidden, HIGH if hidden == (64,) else LOW)

    result = climb(run)
    assert asked == [(), (16,), (32,), (64,), (128,), (64, 32), (64, 16)]
    assert result.winner.hidden == (64,)


def test_second_layer_wins_when_it_earns_its_place_against_one():
    top = [score + 0.08 for score in HIGH]
    result = climb_with({(): LOW, (16,): HIGH, (16, 8): LOW, (16, 4): top})
    assert result.winner.hidden == (16, 4)


def test_among_equal_scores_the_smaller_network_stays():
    result = climb_with({(): LOW, (16,): HIGH, (32,): HIGH, (64,): HIGH, (128,): HIGH})
    assert result.best[1].hidden == (16,)


def test_diverged_candidate_never_wins():
    def run(hidden):
        if hidden == (128,):
            return trial(hidden, [1.0, math.nan], state="diverged")
        return trial(hidden, LOW)

    result = climb(run)
    assert result.winner.hidden == ()
    (verdict,) = [item for item in judge(result, "accuracy", 0.5) if item.kind == "diverged"]
    assert "one hidden layer of 128" in verdict.text


# Verdicts


def verdicts_of(scores, floor=0.5, **changes):
    return {item.kind: item for item in judge(climb_with(scores, **changes), "accuracy", floor)}


def test_verdict_says_linear_is_enough_with_the_rival_and_its_gain_in_se():
    near = [score + 0.002 for score in LOW]
    verdict = verdicts_of({**dict.fromkeys(ALL, LOW), (16,): near})["depth"]
    assert verdict.text.startswith(
        "Linear is enough: accuracy 0.810 without a hidden layer; one hidden layer of 16 gains"
    )
    assert verdict.numbers["gain"] == pytest.approx(0.002)
    assert "SE" in verdict.text


def test_verdict_names_the_rung_that_won_and_its_gain_in_se():
    verdict = verdicts_of({**dict.fromkeys(ALL, LOW), (16,): HIGH, (16, 8): HIGH})["depth"]
    assert verdict.text.startswith("One hidden layer of 16 won: accuracy 0.910 against 0.810 for linear")
    assert verdict.numbers["gain_in_se"] == pytest.approx(stats.compare(HIGH, LOW).ratio)
    assert "A second layer" in verdict.text


def test_widest_layer_clearly_ahead_of_the_next_is_called_underfit():
    middle = [score + 0.05 for score in LOW]
    verdict = verdicts_of({(): LOW, (64,): middle, (128,): HIGH})["fit"]
    assert (verdict.value, verdict.tone) == ("underfit", "notice")


def test_rising_validation_loss_with_a_wide_gap_is_called_overfit():
    scores = {(): LOW, (16,): HIGH}
    assert verdicts_of(scores, train=0.99, rise=0.5)["fit"].value == "overfit"  # It gives back all of its fall.
    assert verdicts_of(scores, train=0.99, rise=0.05)["fit"].value == "fine"  # A tenth, and linear's gap is as wide.
    result = climb_with(scores, rise=0.05)
    for outcome in result.best[0].outcomes:
        outcome.train_score = outcome.score
    for outcome in result.best[1].outcomes:
        outcome.train_score = 1.0
    (verdict,) = [item for item in judge(result, "accuracy", 0.5) if item.kind == "fit"]
    assert verdict.value == "overfit"
    assert "SE" in verdict.text


def test_score_of_a_constant_guess_is_called_no_signal():
    verdict = verdicts_of({(): LOW, (16,): LOW}, floor=0.81)["fit"]
    assert (verdict.value, verdict.tone) == ("no signal", "bad")
    assert "0.810" in verdict.text


def test_neighbours_of_two_layers_are_the_other_funnels():
    top = [score + 0.08 for score in HIGH]
    verdict = verdicts_of({(): LOW, (16,): HIGH, (16, 8): top, (16, 4): top})["neighbours"]
    assert list(verdict.numbers) == ["16-8"]


def test_neighbours_agree_or_not_with_their_numbers():
    assert verdicts_of({(): LOW, (16,): HIGH, (32,): HIGH})["neighbours"].value == "robust"
    sensitive = verdicts_of({(): LOW, (32,): HIGH, (16,): LOW, (64,): LOW})["neighbours"]
    assert sensitive.value == "sensitive"
    assert "16" in sensitive.text
    assert "64" in sensitive.text
    assert verdicts_of({(): LOW})["neighbours"].value == "inconclusive"


def test_budget_verdict_lists_what_was_left_out():
    verdict = verdicts_of({(): LOW, (16,): HIGH})["budget"]
    assert "one hidden layer of 32" in verdict.text
    assert "two hidden layers of 16 and 8" in verdict.text
    depth = verdicts_of({(): LOW, (16,): HIGH})["depth"]
    assert depth.text.startswith("Of what the budget allowed, one hidden layer of 16 won")


# Study


def test_study_holds_every_candidate_with_its_fold_scores():
    result = climb_with({(): LOW, (16,): HIGH, (16, 8): LOW})
    for item in result.trials:
        item.params = shape_params(item.hidden)
    study = to_study(result, "accuracy", 4, Space())
    assert [item.params for item in study.trials] == [
        {"layers": 0},
        {"layers": 1, "width": 16},
        {"layers": 2, "width": 16, "shape": "tapered", "expand": False},
    ]
    assert study.best_params == {"layers": 1, "width": 16}
    assert list(study.best_trial.intermediate_values.values()) == HIGH

"""The search space: defaults, overrides, shapes, conditions, its way through YAML and Optuna, and its errors."""

from __future__ import annotations

import numpy as np
import optuna
import pytest

from mlpkit.errors import ArgumentError, DataError
from mlpkit.tune.distributions import from_distributions, suggest, to_distributions, to_optuna
from mlpkit.tune.space import DEFAULTS, Choice, Encoding, Range, Space, widths
from mlpkit.tune.spec import Spec

BASE = Spec((), lr=1e-3, weight_decay=0.0, batch_size=32, seed=7)


def draws(space, count=300, seed=0):
    rng = np.random.default_rng(seed)
    return [space.at(dict(zip(space.parts, rng.random(len(space.parts))))) for _ in range(count)]


# Parts


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_part_can_be_fixed_and_keeps_the_others(name):
    value = DEFAULTS[name].from_unit(0.7)
    space = Space({name: value})
    assert space.parts[name] == Choice((value,))
    assert {other: part for other, part in space.parts.items() if other != name} == {
        other: part for other, part in DEFAULTS.items() if other != name
    }


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ((1e-4, 1e-2), Range(1e-4, 1e-2, log=True)),
        ({"low": 0.1, "high": 0.2, "log": False}, Range(0.1, 0.2)),
        ([1e-3, 1e-2], Choice((1e-3, 1e-2))),
        ("3e-4", Choice((3e-4,))),
        (Range(0.1, 0.5), Range(0.1, 0.5)),
    ],
)
def test_a_part_is_a_value_a_list_a_pair_a_mapping_or_a_part(given, part):
    assert Space(lr=given).parts["lr"] == part


@pytest.mark.parametrize("part", [*DEFAULTS.values(), Range(3, 90, log=True, whole=True)], ids=str)
def test_unit_scale_covers_the_part_and_comes_back(part):
    for u in np.linspace(0, 1, 23):
        value = part.from_unit(float(u))
        assert part.holds(value)
        assert part.from_unit(part.to_unit(value)) == pytest.approx(value)


def test_one_minus_beta_is_even_on_a_logarithmic_scale():
    part = Range(0.9, 0.9999, log=True, complement=True)
    assert part.from_unit(0.5) == pytest.approx(1 - np.sqrt(0.1 * 0.0001))


def test_a_range_shrinks_and_widens_on_its_own_scale():
    part = Range(1e-4, 1e-2, log=True).within(0.5, 1.5)
    assert (part.low, part.high) == (pytest.approx(1e-3), pytest.approx(1e-1))
    assert Choice((16, 32, 64, 128)).within(0.3, 0.6) == Choice((32, 64))
    assert Choice(("a", "b")).within(0.9, 1.0) == Choice(("a", "b"))


# Shapes


@pytest.mark.parametrize(
    ("params", "hidden"),
    [
        ({"layers": 0}, ()),
        ({"layers": 1, "width": 64}, (64,)),
        ({"layers": 3, "width": 64, "shape": "wide"}, (64, 64, 64)),
        ({"layers": 3, "width": 64, "shape": "tapered"}, (64, 32, 16)),
        ({"layers": 3, "width": 64, "shape": "funnel"}, (64, 16, 4)),
        ({"layers": 2, "width": 128, "shape": "wide", "expand": True}, (128, 256)),
        ({"layers": 3, "width": 128, "shape": "tapered", "expand": True}, (128, 256, 128)),
        ({"layers": 3, "width": 2, "shape": "funnel"}, (2, 2, 2)),
    ],
)
def test_shapes(params, hidden):
    assert widths(params) == hidden


def test_once_a_network_tapers_it_never_widens_again():
    for params in draws(Space(layers=[2, 3, 6])):
        hidden = widths(params)
        tail = hidden[1:] if params["expand"] else hidden
        assert list(tail) == sorted(tail, reverse=True)


def test_dropout_grows_from_the_input_to_the_last_layer():
    spec, _ = Space().spec({"layers": 3, "width": 8, "dropout": 0.6}, BASE)
    assert spec.dropout == pytest.approx((0.2, 0.4, 0.6))


# Conditions


def test_only_what_matters_is_drawn():
    for params in draws(Space()):
        assert ("width" in params) == (params["layers"] > 0)
        assert ("shape" in params) == (params["layers"] > 1)
        assert ("momentum" in params) == (params["optimizer"] in ("sgd", "rmsprop"))
        assert ("beta2" in params) == (params["optimizer"] in ("adam", "adamw"))
        assert ("lr_decay" in params) == (params["schedule"] in ("cosine", "exponential"))
        assert ("label_smoothing" in params) == (params["loss"] == "cross_entropy")


def test_a_candidate_becomes_a_member_and_an_encoding():
    params = {"layers": 1, "width": 16, "lr": 0.01, "optimizer": "sgd", "momentum": 0.8, "scaling": "robust"}
    spec, encoding = Space().spec(params, BASE)
    assert (spec.hidden, spec.lr, spec.optimizer, spec.momentum, spec.seed) == ((16,), 0.01, "sgd", 0.8, 7)
    assert encoding == Encoding("robust")


def test_the_task_decides_on_losses_and_the_log_target():
    classes, numbers = Space().for_task("classification"), Space().for_task("regression", positive_target=True)
    assert classes.parts["loss"].values == ("cross_entropy", "squared")
    assert classes.parts["log_target"].fixed
    assert numbers.parts["loss"].values == ("mse", "huber", "l1")
    assert not numbers.parts["log_target"].fixed
    with pytest.raises(ArgumentError, match="'loss' has no loss for a regression"):
        Space(loss="squared").for_task("regression")
    with pytest.raises(ArgumentError, match="'log_target' is true"):
        Space(log_target=True).for_task("regression")


# YAML and Optuna


def test_a_space_survives_yaml(tmp_path):
    import yaml

    space = Space(lr=(1e-4, 1e-2), layers=[0, 1], norm=None, beta1=0.9, momentum={"low": 0.8, "high": 0.9})
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space.to_plain()))
    assert Space.from_yaml(tmp_path / "space.yaml") == space
    (tmp_path / "hand.yaml").write_text("lr: {low: 1e-4, high: 1e-2}\nnorm: none\n")
    assert Space.from_yaml(tmp_path / "hand.yaml") == Space(lr=(1e-4, 1e-2), norm=None)


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "lr: [1, 2", "\tlr: 1"])
def test_a_file_that_is_no_space_is_named(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(DataError, match=r"bad\.yaml"):
        Space.from_yaml(tmp_path / "bad.yaml")


def test_a_space_survives_optunas_distributions():
    space = Space(lr=(1e-4, 1e-2), layers=[0, 1])
    again = from_distributions(to_distributions(space))
    for name, part in space.parts.items():
        for u in (0.0, 0.3, 1.0):
            assert again.parts[name].from_unit(u) == pytest.approx(part.from_unit(u))


def test_optuna_draws_what_the_space_allows_and_enqueued_values_come_back():
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    space = Space()
    for wanted in draws(space, 20):
        assert space.holds(suggest(space, study.ask()))
        study.enqueue_trial(to_optuna(space, wanted))
        assert suggest(space, study.ask()) == pytest.approx(wanted)


# Errors


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"learning_rate": 0.1}, "no part 'learning_rate'"),
        ({"Width": [16]}, "did you mean 'width'"),
        ({"lr": (0.1, 0.01)}, "'lr' has low 0.1 above high 0.01"),
        ({"lr": (0.0, 0.01)}, "'lr' is on a logarithmic scale and needs low above 0"),
        ({"lr": {"low": 1e-3}}, "'lr' needs low and high"),
        ({"lr": {"low": 1e-3, "high": 1, "base": 2}}, "'lr' does not know 'base'"),
        ({"lr": {"low": "small", "high": 1}}, "'lr' has low 'small'"),
        ({"lr": "fast"}, "'lr' holds 'fast'; it must be a number"),
        ({"lr": -1}, "'lr' holds -1"),
        ({"layers": []}, "'layers' has no value"),
        ({"layers": [0, 20]}, "'layers' holds 20; it must be a number from 0 to 8"),
        ({"width": [16.5]}, "'width' must hold whole numbers"),
        ({"width": Range(8, 64)}, "'width' must hold whole numbers"),
        ({"optimizer": "lion"}, "'optimizer' holds 'lion'; it must be among sgd, adam, adamw, rmsprop"),
        ({"optimizer": Range(0, 1)}, "'optimizer' is a range"),
        ({"dropout": 1.0}, "'dropout' holds 1.0"),
        ({"activation": object()}, "'activation' holds"),
        ({"expand": 1}, "'expand' holds 1"),
        ({"beta2": (0.9, 1.0)}, "'beta2'"),
    ],
)
def test_a_wrong_part_is_named_with_what_it_must_be(parts, words):
    with pytest.raises(ArgumentError, match="Space: ") as caught:
        Space(parts)
    assert words in str(caught.value)

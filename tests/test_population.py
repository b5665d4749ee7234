"""Populations: members are as if alone, errors name what is wrong, and what is learnt comes out again."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from population_cases import (
    assert_same_bits,
    classes_table,
    every_kind,
    numbers_table,
    order,
    population,
    state,
)

import mlpkit
from mlpkit.errors import ArgumentError, DataError, DeviceError, DtypeError, MlpkitError, ShapeError
from mlpkit.population import Member, Population
from mlpkit.population.data import held_back

# As if alone


def test_a_member_is_the_same_alone_among_many_and_in_any_order():
    table = classes_table(columns=34)  # as many as make some first layers read their rows in place
    folds = [torch.arange(0, 50), torch.arange(20, 70), None]
    members = every_kind()
    members = [Member(**(vars(m) | {"rows": folds[i % 3]})) for i, m in enumerate(members)]
    together = population(members, table, threads=2)
    together.fit()
    shuffled = torch.randperm(len(members), generator=torch.Generator().manual_seed(1)).tolist()
    mixed = population([members[i] for i in shuffled], table)
    mixed.fit()
    for place, index in enumerate(shuffled):
        assert_same_bits(state(mixed, place), state(together, index), f"member {index}, shuffled")
    for index, member in enumerate(members):
        alone = population([member], table).fit()
        assert_same_bits(state(alone, 0), state(together, index), f"member {index}, alone")
    assert len({float(together._native.state(i).sum()) for i in together.members}) == len(members)


def test_training_in_increments_is_training_at_once():
    table = numbers_table()
    members = every_kind(epochs=4)
    whole = population(members, table, validation=numbers_table(seed=3)).fit()
    parts = population(members, table, validation=numbers_table(seed=3))
    steps = [parts.train(1), parts.train(2), parts.train(5), parts.train(1)]
    assert steps[-1] == 0
    for index in whole.members:
        assert_same_bits(state(parts, index), state(whole, index), f"member {index}")


@pytest.mark.parametrize("poison", [math.inf, math.nan])
def test_what_is_not_finite_in_one_member_changes_no_bit_of_another(poison):
    X, y = classes_table()
    dirty = X.clone()
    dirty[66] = poison
    clean_rows = torch.arange(60)
    members = [Member(**(vars(m) | {"rows": clean_rows})) for m in every_kind(epochs=2)]
    hurt = [
        Member(hidden=(9,), rows=torch.arange(50, 70), batch_size=20, seed=1),
        Member(hidden=(9,), rows=clean_rows, optimizer="sgd", lr=1e30, batch_size=10, seed=2, epochs=9),
        Member(hidden=(9,), rows=torch.arange(70), batch_size=10, seed=3, epochs=3),
    ]
    alone = population(members, (X, y)).fit()
    mixed = population([*hurt, *members], (dirty, y), threads=2).fit()
    for index in alone.members:
        assert_same_bits(state(mixed, index + len(hurt)), state(alone, index), f"member {index}")
    scores = mixed.scores
    assert scores[0].status == "diverged"
    assert scores[0].cause.startswith("the loss is")
    assert scores[0].stopped_step == 0
    assert scores[0].skipped == 1
    assert scores[1].status == "diverged"
    assert scores[1].skipped == 8
    assert scores[2].status == "epochs"
    assert scores[2].skipped == 3  # the one bad row's batch of every epoch
    for index in range(3):
        assert torch.isfinite(mixed._native.state(index)).all()


def test_the_order_of_rows_is_that_of_the_page():
    X = torch.arange(40.0)[:, None]
    y = torch.zeros(40)
    rows = torch.arange(3, 40)
    # With batches of one row and a rate of 0 the loss of each step is that row's: w is 1, so its square.
    trained = population([Member(rows=rows, batch_size=37, optimizer="sgd", lr=1e-3, epochs=1, seed=77)], (X, y))
    found = order(77, 0, 37)
    assert sorted(found) == list(range(37))
    assert found != list(range(37))
    trained.fit()
    one_by_one = population(
        [Member(rows=rows[found], batch_size=1, optimizer="sgd", lr=1e-6, epochs=1, seed=5)], (X, y)
    ).fit()
    assert one_by_one.scores[0].steps == 37
    first = population([Member(rows=rows, batch_size=19, optimizer="sgd", lr=0.0, epochs=1, seed=77)], (X, y))
    first._native.tensors(0, False)["layers.0.weight"].fill_(1.0)
    first.train(1)
    expected = (X[rows][found, 0].double() ** 2).mean()
    assert first.scores[0].train_loss[0] == pytest.approx(float(expected), rel=1e-6)


# Edges


@pytest.mark.parametrize("norm", [None, "batch", "layer"])
@pytest.mark.parametrize("hidden", [(), (1,), (1000,), (1, 1, 1), (16, 1, 30)])
@pytest.mark.parametrize(("rows", "columns", "batch"), [(2, 1, 64), (33, 3, 8), (31, 1, 31), (40, 33, 1000)])
def test_edge_sizes_train_and_come_out(norm, hidden, rows, columns, batch):
    table = numbers_table(rows, columns, 2)
    member = Member(hidden=hidden, norm=norm, batch_size=batch, epochs=2, lr=1e-3, dropout=0.1)
    trained = population([member], table).fit()
    steps = 2 * math.ceil(rows / batch)
    if norm == "batch" and hidden and rows % batch == 1:
        steps -= 2
    assert trained.scores[0].steps == steps
    assert trained.scores[0].skipped == 0
    x = table[0]
    assert torch.allclose(trained.predict(x)[0], trained.export(0)(x), rtol=1e-4, atol=1e-5)


def test_one_row_and_a_batch_beyond_the_data():
    table = numbers_table(1, 4, 3)
    trained = population([Member(hidden=(8,), batch_size=512, epochs=300, lr=1e-2)], table).fit()
    assert trained.scores[0].steps == 300
    assert trained.scores[0].train_loss[-1] < 1e-4
    with pytest.raises(ArgumentError, match="batches of two rows"):
        population([Member(hidden=(8,), norm="batch")], table)


def test_more_members_mean_the_memory_of_the_page():
    table = classes_table(rows=64, columns=64, classes=10)
    members = [Member(hidden=(16,), seed=seed) for seed in range(300)]
    trained = population(members, table)
    floats = [trained._native.state(index).numel() for index in trained.members]
    parameters = 64 * 16 + 16 + 16 * 10 + 10
    slack = 15 * 4
    assert all(3 * parameters <= count <= 3 * (parameters + slack) for count in floats)
    validated = population(members[:1], table, validation=table)._native.state(0).numel()
    assert 4 * parameters <= validated <= 4 * (parameters + slack)
    assert 10_000 * 4 * validated < 4 * 2**30


# Between increments


def test_drop_add_and_set_leave_the_others_alone():
    table = numbers_table()
    members = [Member(hidden=(7 + i,), epochs=6, seed=i, dropout=0.2) for i in range(4)]
    plain = population(members, table).fit()
    trained = population(members, table)
    trained.train(2)
    trained.drop([1])
    trained.set([2], lr=1e-4, dropout=0.5, epochs=8)
    (new,) = trained.add([Member(hidden=(5,), epochs=6, seed=9)])
    assert new == 4
    assert trained.alive == [0, 2, 3, 4]
    trained.fit()
    for index in (0, 3):
        assert_same_bits(state(trained, index), state(plain, index), f"member {index}")
    scores = trained.scores
    assert scores[1].status == "dropped"
    assert scores[1].epochs == 2
    assert scores[2].epochs == 8
    assert scores[2].marks[0].epoch == 2
    assert scores[2].marks[0].changes == {"lr": 1e-4, "dropout": 0.5, "epochs": 8}
    assert scores[2].lr[1] == pytest.approx(1e-3)
    assert scores[2].lr[2] == pytest.approx(1e-4)
    assert scores[4].epochs == 6
    trained.set(0, epochs=7)
    assert trained.train(1) == 2


def test_patience_stops_and_the_best_epoch_is_kept():
    X, y = numbers_table(60, 5)
    other = numbers_table(60, 5, seed=8)  # of another rule: learning the one unlearns the other
    member = Member(hidden=(64,), lr=3e-2, epochs=200, patience=5, min_delta=1e-3)
    trained = population([member], (X, y), validation=other).fit()
    scores = trained.scores[0]
    assert scores.status == "patience"
    assert scores.epochs < 200
    assert scores.best == min(scores.validation_loss)
    assert scores.best_epoch == scores.validation_loss.index(scores.best)

    def loss(weights):
        return float((trained.predict(other[0], weights=weights)[0] - other[1]).double().square().mean())

    assert loss("best") == pytest.approx(scores.best, rel=1e-5)
    assert loss("last") == pytest.approx(scores.validation_loss[-1], rel=1e-5)
    trained.set(0, patience=7)
    assert trained.alive == [0]


def test_an_interrupt_ends_with_the_epoch_and_loses_nothing(monkeypatch):
    from mlpkit.population import progress

    members = [Member(hidden=(64, 64), epochs=400, seed=seed) for seed in range(4)]
    table = classes_table(256)
    whole = population(members, table).fit()
    with monkeypatch.context() as patch:

        def interrupted(self, *now):
            raise KeyboardInterrupt

        patch.setattr(progress.Watch, "update", interrupted)
        trained = population(members, table)
        with pytest.raises(KeyboardInterrupt):
            trained.fit()
    assert 0 < sum(score.epochs for score in trained.scores.values()) < 1600
    trained.fit()
    for index in whole.members:
        assert_same_bits(state(trained, index), state(whole, index), f"member {index}")


# Scores


def test_metrics_are_those_of_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    X, y = numbers_table(90, 4, 3)
    other, truth = numbers_table(75, 4, 3, seed=4)
    weights = torch.rand(75, generator=torch.Generator().manual_seed(2))
    names = {
        "r2": metrics.r2_score,
        "mae": metrics.mean_absolute_error,
        "rmse": lambda *a, **k: metrics.mean_squared_error(*a, **k) ** 0.5,
    }
    for name, function in names.items():
        for given in (None, weights):
            validation = (other, truth) if given is None else (other, truth, given)
            trained = population([Member(hidden=(8,), epochs=3)], (X, y), metric=name, validation=validation).fit()
            y_hat = trained.predict(other, weights="last")[0].double().numpy()
            wanted = function(truth.double().numpy(), y_hat, sample_weight=None if given is None else given.numpy())
            assert trained.scores[0].metric[-1] == pytest.approx(wanted, rel=1e-5)
    X, y = classes_table(90)
    other, truth = classes_table(75, seed=4)
    trained = population(
        [Member(hidden=(8,), epochs=3)], (X, y), metric="accuracy", validation=(other, truth, weights)
    ).fit()
    y_hat = trained.predict(other, weights="last")[0].argmax(1)
    wanted = metrics.accuracy_score(truth, y_hat, sample_weight=weights)
    assert trained.scores[0].metric[-1] == pytest.approx(wanted, rel=1e-6)


def test_folds_are_validated_on_the_rest():
    table = classes_table(60)
    fold = torch.arange(60) % 3 != 0
    trained = population([Member(hidden=(8,), rows=fold, epochs=2)], table, metric="accuracy", validation="rest").fit()
    own = population([Member(hidden=(8,), rows=fold, validation_rows=~fold, epochs=2)], table, metric="accuracy").fit()
    assert trained.scores == own.scores
    y_hat = trained.predict(table[0][~fold], weights="last")[0].argmax(1)
    assert trained.scores[0].metric[-1] == pytest.approx(float((y_hat == table[1][~fold]).double().mean()))
    assert trained.ranking() == [0]


def test_weights_of_rows_are_like_repeated_rows():
    X, y = classes_table(40)
    counts = torch.arange(40) % 3
    repeated = torch.repeat_interleave(torch.arange(40), counts)
    member = {"hidden": (9,), "optimizer": "sgd", "lr": 0.1, "batch_size": 100, "epochs": 4, "label_smoothing": 0.1}
    weighted = population([Member(**member)], (X, y), sample_weight=counts).fit()
    again = population([Member(**member, rows=repeated)], (X, y)).fit()
    x = torch.randn(50, 6)
    assert torch.allclose(weighted.predict(x), again.predict(x), rtol=1e-4, atol=1e-5)
    assert weighted.scores[0].train_loss == pytest.approx(again.scores[0].train_loss, rel=1e-5)
    assert not torch.allclose(weighted.predict(x), population([Member(**member)], (X, y)).fit().predict(x), atol=1e-3)


def test_a_logarithmic_target_comes_back_as_itself():
    X, y = numbers_table(200, 3)
    positive = y[:, 0].mul(2).exp()
    member = Member(hidden=(32,), epochs=60, lr=1e-2)
    logs = population([member], (X, positive), log_target=True).fit()
    same = population([member], (X, positive.double().log())).fit()
    assert torch.equal(logs.predict(X), same.predict(X).exp())
    assert torch.equal(logs.export(0)(X).exp(), same.export(0)(X).exp())
    assert float((logs.predict(X)[0, :, 0] / positive).log().abs().mean()) < 0.2
    with pytest.raises(DataError, match="wants numbers above 0"):
        population([member], (X, y), log_target=True)


def test_read_only_tables_are_taken_without_a_warning():
    X, y = np.random.default_rng(0).normal(size=(30, 3)), np.arange(30) % 2
    X.flags.writeable = y.flags.writeable = False
    Population([Member(epochs=1)], X, y, loss="cross_entropy", progress=False).fit()


def test_double_input_is_rounded_and_tables_of_numpy_are_taken():
    X, y = classes_table(50)
    member = Member(hidden=(8,), epochs=2)
    single = population([member], (X, y)).fit()
    double = population([member], (X.double(), y)).fit()
    numpy = Population([member], X.double().numpy(), y.numpy().astype(np.int32), loss="cross_entropy", progress=False)
    numpy.fit()
    for other in (double, numpy):
        assert_same_bits(state(single, 0), state(other, 0), "input")


# Refusals


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden", (0,), r"hidden\[0\] is 0; it must be an int from 1"),
        ("hidden", "64", "hidden is '64'; it must be up to 63 widths"),
        ("activation", "swish", "activation is 'swish'; it must be one of identity, relu"),
        ("dropout", 1.5, r"dropout is 1.5; it must be at least 0 and at most 1"),
        ("dropout", (0.1, 0.2), r"dropout is \(0.1, 0.2\); it must be a probability, or one for each hidden layer \(1"),
        ("norm", "group", "norm is 'group'; it must be one of batch, layer, None"),
        ("init", "zeros", "init is 'zeros'"),
        ("optimizer", "lion", "optimizer is 'lion'; it must be one of sgd, adam"),
        ("lr", -1.0, "lr is -1.0; it must be at least 0"),
        ("lr", math.nan, "lr is nan; it must be a finite number"),
        ("schedule", "linear", "schedule is 'linear'"),
        ("momentum", 0.9, "momentum is 0.9; it must be 0 for adam"),
        ("nesterov", True, "nesterov is True"),
        ("betas", (0.9, 1.0), "betas is 1.0; it must be at least 0 and below 1"),
        ("eps", 0.0, "eps is 0.0; it must be above 0"),
        ("clip_norm", 0.0, "clip_norm is 0.0"),
        ("batch_size", 0, "batch_size is 0"),
        ("epochs", 2.5, "epochs is 2.5"),
        ("patience", 0, "patience is 0"),
        ("precision", "fp16", "precision is 'fp16'; it must be fp32 or bf16"),
        ("seed", -1, "seed is -1"),
    ],
)
def test_a_member_names_what_is_wrong(field, value, message):
    with pytest.raises(ArgumentError, match="Member: " + message):
        Member(**({"hidden": (4,)} | {field: value}))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loss": "hinge"}, ArgumentError, "loss is 'hinge'; it must be one of cross_entropy"),
        ({"metric": "r2"}, ArgumentError, "metric is 'r2'; with cross_entropy it must be one of loss, accuracy"),
        ({"device": "cuda"}, DeviceError, "device is cuda; (mlpkit was built without CUDA|the CUDA kernels wait)"),
        ({"threads": 0}, ArgumentError, "threads is 0"),
        ({"y": np.array(["a", "b"] * 35)}, DtypeError, r"encode labels by numpy.unique\(y, return_inverse=True\)"),
        ({"y": torch.zeros(70)}, DtypeError, "cross_entropy takes integers"),
        ({"y": torch.full((70,), -1)}, DataError, "they must count from 0"),
        ({"y": torch.zeros(69, dtype=torch.int64)}, ShapeError, "X has 70 rows, y has 69"),
        ({"X": np.array([["a"]] * 70)}, DtypeError, "X has dtype <U1; it must be numbers"),
        ({"X": torch.zeros(70)}, ShapeError, r"X has shape \(70,\)"),
        ({"validation": 1.5}, ArgumentError, "validation is 1.5; as a share"),
        ({"validation": "fold"}, ArgumentError, "validation is 'fold'"),
        ({"validation": "rest"}, ArgumentError, "a member is trained on all rows"),
        ({"members": [Member(patience=3)]}, ArgumentError, "patience is 3, but nothing is validated"),
        ({"members": [Member(rows=[70])]}, DataError, "rows goes from 70 to 70; X has rows 0 to 69"),
        ({"members": [Member(rows=[0.5])]}, DataError, "it must be row numbers"),
        ({"members": ["mlp"]}, ArgumentError, "members holds str"),
        ({"sample_weight": torch.ones(3)}, ShapeError, r"sample_weight has shape \(3,\)"),
        ({"sample_weight": -torch.ones(70)}, DataError, "sample_weight must be finite"),
        ({"log_target": True}, ArgumentError, "log_target goes with mse"),
        ({"out_features": 2}, ArgumentError, "out_features is 2; y has classes up to 2"),
    ],
)
def test_a_population_names_what_is_wrong(change, error, message):
    X, y = classes_table()
    settings = {"members": [Member()], "X": X, "y": y, "loss": "cross_entropy", "progress": False} | change
    with pytest.raises(error, match=message) as caught:
        Population(settings.pop("members"), settings.pop("X"), settings.pop("y"), **settings)
    assert isinstance(caught.value, MlpkitError)


def test_what_cannot_change_or_is_not_there_is_refused():
    trained = population([Member(hidden=(4,))], classes_table())
    with pytest.raises(ArgumentError, match="'hidden' cannot change; these can: lr"):
        trained.set(0, hidden=(5,))
    with pytest.raises(ArgumentError, match="lr is -1"):
        trained.set(0, lr=-1.0)
    with pytest.raises(ArgumentError, match="there is no member 1"):
        trained.drop(1)
    with pytest.raises(ArgumentError, match="epochs is 0"):
        trained.train(0)
    with pytest.raises(ShapeError, match="X has 5 columns; the members take 6"):
        trained.predict(torch.zeros(2, 5))
    with pytest.raises(ArgumentError, match="weights is 'first'"):
        trained.export(0, weights="first")
    with pytest.raises(ArgumentError, match="the loss is mse; use predict"):
        population([Member()], numbers_table()).predict_proba(torch.zeros(2, 6))


def test_the_package_knows_populations():
    assert mlpkit.population.Population is Population


def test_building_and_exporting_draws_nothing_from_torchs_generator():
    before = torch.get_rng_state()
    trained = population([Member(hidden=(4,), dropout=0.5, epochs=1)], classes_table()).fit()
    trained.export(0)
    assert torch.equal(before, torch.get_rng_state())


# Deadlines and shares


def test_a_share_is_held_back_alike_from_equal_rows_and_not_trained_on():
    X, y = classes_table(100)
    rows = torch.arange(10, 90)
    members = [Member(hidden=(4,), epochs=2, seed=s, rows=r) for s, r in enumerate((rows, rows.clone(), None))]
    trained = population(members, (X, y), validation=0.25).fit()
    assert all(math.isfinite(score.validation_loss[-1]) for score in trained.scores.values())
    train, held = held_back(rows.int(), 0.25)
    assert (len(train), len(held)) == (60, 20)
    assert torch.equal(torch.cat([train, held]).sort().values, rows.int())
    by_hand = [replace(member, rows=train, validation_rows=held) for member in members[:2]]
    again = population(by_hand, (X, y)).fit()
    for index in (0, 1):
        assert_same_bits(state(trained, index), state(again, index), index)


def test_stop_ends_every_member_after_its_epoch_and_lets_no_more_begin():
    members = [Member(hidden=(64, 64), batch_size=1, epochs=10**6, seed=seed) for seed in range(3)]
    trained = population(members, classes_table(500))
    trained.train(10**6, stop=lambda: True, longest_first=False)
    epochs = [score.epochs for score in trained.scores.values()]
    assert epochs[0] >= 1
    assert epochs[1:] == [0, 0]
    assert trained.alive == [0, 1, 2]
    assert trained.scores[0].seconds > 0.0


def test_a_population_prints_as_a_leaderboard():
    torch.manual_seed(0)
    X = torch.randn(60, 4)
    y = (X[:, 0] > 0).long()
    members = [Member(hidden=hidden, lr=lr, epochs=3) for hidden in ((), (8, 4)) for lr in (1e-1, 1e-9, 1e-5)]
    population = Population(members * 2, X, y, loss="cross_entropy", metric="accuracy", validation=0.25, progress=False)
    assert repr(population) == "Population(12 members: 12 alive)"
    population.fit()
    assert repr(population) == "Population(12 members: 12 epochs)"
    head, first, *others, last = str(population).splitlines()
    best = population.ranking()[0]
    assert head.split() == ["id", "hidden", "activation", "lr", "accuracy", "epochs", "status"]
    assert first.split()[0] == str(best)
    assert first.split()[4] == f"{population.scores[best].best:.4g}"
    assert len(others) == 9
    assert last == "and 2 more"
    assert any(" 8-4 " in line for line in others) or " 8-4 " in first

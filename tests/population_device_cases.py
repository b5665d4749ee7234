"""What a device must do with a population, the emulated one as the real one. Each check takes the population's settings
and makes all its members there."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from population_cases import assert_same_bits, classes_table, every_kind, numbers_table, population, state

from mlpkit.errors import DeviceError
from mlpkit.population import Member, Population

ACTIVATIONS = ("identity", "relu", "leaky_relu", "prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
LOSSES = (
    ("cross_entropy", "accuracy"), ("cross_entropy", None), ("brier", "accuracy"), ("bce", "accuracy"),
    ("mse", "r2"), ("l1", "mae"), ("huber", "rmse"), ("log_mse", None),
)  # fmt: skip


def mixed(epochs=2):
    """Members of every optimizer, activation, dropout and precision, unequal in all else."""
    members = [member for member in every_kind(epochs=epochs, activation="relu") if member.norm is None]
    kinds = itertools.cycle(ACTIVATIONS)
    return [replace(member, activation=next(kinds), clip_norm=(None, 0.1)[i % 2]) for i, member in enumerate(members)]


def check_company_and_order(**device):
    table, members = classes_table(90), mixed()
    settings = {"validation": 0.2, "metric": "accuracy"} | device
    among = population(members, table, **settings).fit()
    shuffled = population(members[::-1], table, **settings).fit()
    for index in range(0, len(members), 3):
        alone = population([members[index]], table, **settings).fit()
        assert_same_bits(state(alone, 0), state(among, index), f"member {index} alone")
        assert_same_bits(state(shuffled, len(members) - 1 - index), state(among, index), f"member {index} shuffled")


def check_increments_and_files(directory, **device):
    table, members = numbers_table(outputs=2), mixed(epochs=5)[::2]
    settings = {"validation": 0.2, "metric": "r2"} | device
    at_once = population(members, table, **settings).fit()
    parts = population(members, table, **settings)
    parts.train(1)
    parts.train(2)
    parts.save(directory)
    resumed = Population.load(directory, *table, threads=1, progress=False, validation=0.2, **device)
    parts.fit(), resumed.fit()
    for index in range(len(members)):
        assert_same_bits(state(parts, index), state(at_once, index), f"member {index} in increments")
        assert_same_bits(state(resumed, index), state(at_once, index), f"member {index} resumed")


def check_faults_stay_at_home(**device):
    X, y = numbers_table(outputs=2)
    members = mixed(epochs=3)
    settings = {"validation": 0.2} | device
    healthy = population(members, (X, y), **settings).fit()
    # Weights that are NaN, parameters so large that everything overflows, a rate that does it later.
    ill = [replace(members[i], seed=900 + i, lr=1e30 if i % 3 == 2 else members[i].lr) for i in range(6)]
    mixed_up = population([one for pair in zip(members, ill * 4, strict=False) for one in pair], (X, y), **settings)
    for place in range(len(ill)):
        for tensor in mixed_up._native.tensors(2 * place + 1, False).values():
            if place % 3 < 2:
                tensor.fill_((math.nan, 3e38)[place % 3])
    mixed_up.fit()
    for index in range(len(members)):
        assert_same_bits(state(mixed_up, 2 * index), state(healthy, index), f"member {index}")
    found = [mixed_up.scores[2 * place + 1] for place in range(len(ill))]
    assert all(score.status == "diverged" and score.cause for score in found)
    assert found[0].skipped == found[0].steps
    assert found[0].stopped_step == 0


def check_masks(**device):
    rows, width = 48, 40
    # Of unit rows, the gradient of a weight is that of one row by one unit: 0 where it was dropped and nowhere else.
    X, y = torch.eye(rows), torch.randn(rows, 1, generator=torch.Generator().manual_seed(1)) + 9.0
    member = Member(
        hidden=(width, 24),
        activation="identity",
        dropout=(0.5, 0.3),
        optimizer="sgd",
        lr=1.0,
        batch_size=rows,
        epochs=3,
    )
    found = []
    for settings in ({}, device):
        trained = population([member], (X, y), **settings)
        for _ in range(member.epochs):
            before = trained._native.tensors(0, False)["layers.0.weight"].clone()
            trained.train(1)
            found.append(trained._native.tensors(0, False)["layers.0.weight"] != before)
    for here, there in zip(found[:3], found[3:], strict=True):
        assert 0.3 < float(here.double().mean()) < 0.7
        assert torch.equal(here, there)


def check_scores(kind, **device):
    """Curves, best epochs and reasons to stop are those of the CPU."""
    loss, metric = kind
    if loss in ("cross_entropy", "brier"):
        X, y = classes_table(420, classes=5)
    else:
        X, y = numbers_table(420, outputs=1 if loss == "bce" else 3)
        y = y.sigmoid().round() if loss == "bce" else y.exp() + 0.1 if loss == "log_mse" else y
    weights = torch.rand(len(X), generator=torch.Generator().manual_seed(5)) * (torch.arange(len(X)) % 9 > 0)
    member = Member(hidden=(20,), activation="tanh", lr=2e-2, batch_size=50, epochs=6, patience=2, warmup=1.0,
                    schedule="cosine", label_smoothing=0.1 * (loss == "cross_entropy"))  # fmt: skip
    if loss == "log_mse":
        member = replace(member, hidden=(), optimizer="sgd", lr=1e-4)
    members = [member, replace(member, lr=member.lr / 50, seed=3, patience=None), replace(member, lr=1e39, seed=4)]
    found = []
    for settings in ({}, device):
        given = {"loss": loss, "metric": metric, "validation": 0.3, "sample_weight": weights} | settings
        trained = population(members, (X, y), **given)
        if loss == "log_mse":
            for index in range(len(members)):
                trained._native.tensors(index, False)["layers.0.bias"].fill_(30.0)
        found.append(trained.fit())
    for index in range(len(members)):
        ours, wanted = found[1].scores[index], found[0].scores[index]
        facts = ("status", "cause", "stopped_step", "best_epoch", "steps", "skipped", "lr")
        assert [getattr(ours, name) for name in facts] == [getattr(wanted, name) for name in facts]
        for curve in ("train_loss", "validation_loss", "metric"):
            assert getattr(ours, curve) == pytest.approx(getattr(wanted, curve), rel=1e-4, abs=1e-6, nan_ok=True)
        if members[index].lr > 1:
            continue  # its weights are near the end of float32
        both = [one.predict(X[:37], ids=index) for one in found]
        assert both[1].flatten().tolist() == pytest.approx(both[0].flatten().tolist(), rel=1e-3, abs=1e-4)


def check_sizes(**device):
    """Sizes that fill no tile, many rows, batches beyond a pass: what the CPU makes of them, nearly."""
    for (rows, columns, batch), hidden in itertools.product(
        [(2, 1, 64), (33, 3, 8), (31, 17, 31), (700, 5, 300)], [(), (1,), (1, 1, 1), (16, 33, 30), (130,)]
    ):
        table = numbers_table(rows, columns, outputs=2)
        member = Member(
            hidden=hidden, batch_size=batch, epochs=2, dropout=0.1, optimizer="sgd", lr=1e-1, clip_norm=0.05
        )
        one, other = (population([member], table, **settings).fit() for settings in ({}, device))
        ours, wanted = (trained.predict(table[0]).flatten().tolist() for trained in (other, one))
        assert ours == pytest.approx(wanted, rel=1e-4, abs=1e-5), (rows, columns, batch, hidden)


def check_refusals(**device):
    table = classes_table()
    for settings, named in (
        ({"hidden": (8,), "norm": "batch"}, "norm"),
        ({"hidden": (8,) * 9}, "hidden"),
        ({"hidden": (4000, 4000)}, "hidden"),
    ):
        with pytest.raises(DeviceError, match=f"Member: {named} "):
            population([Member(**settings)], table, **device)
    with pytest.raises(DeviceError, match="Population: device is cuda:77; there is no such"):
        population([Member()], table, device="cuda:77")
    with pytest.raises(DeviceError, match="Population: device is meta"):
        population([Member()], table, device="meta")

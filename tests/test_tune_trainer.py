"""The trainer behind the search: exact scores, the best epoch, clocks, weights, generators left alone."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from mlpkit.tune import trainer
from mlpkit.tune.trainer import FoldData, Spec, Split


def fold_data(seed=0, rows=80, regression=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 3, generator=generator)
    y = x.sum(1, keepdim=True) if regression else (x[:, 0] * x[:, 1] > 0).long()
    parts = (slice(0, rows // 2), slice(rows // 2, 3 * rows // 4), slice(3 * rows // 4, rows))
    return FoldData(*(Split(x[part], y[part]) for part in parts))


def flat(network):
    return torch.cat([value.flatten() for value in network.state_dict().values()])


SPEC = Spec((8,), lr=5e-2, weight_decay=0.1, batch_size=16, seed=5)


def test_weights_that_are_scored_are_those_of_the_best_validation_epoch():
    (outcome,) = trainer.train_members([SPEC], [fold_data()], 2)[0]
    assert outcome.stopped == "patience"
    assert outcome.best_epoch == int(np.argmin(outcome.validation_loss))
    assert len(outcome.validation_loss) > outcome.best_epoch + 1  # It went on, and came back.
    assert len(outcome.train_loss) == len(outcome.validation_loss)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": "sgd", "lr": 0.1}, {"optimizer": "adam"}, {"optimizer": "rmsprop", "momentum": 0.5, "lr": 0.01},
        {"norm": "batch"}, {"norm": "layer"}, {"dropout": (0.2,)}, {"schedule": "cosine", "epochs": 40},
        {"loss": "squared"}, {"label_smoothing": 0.1}, {"l1": 1e-3}, {"activation": "gelu", "init": "he_normal"},
    ],
    ids=str,
)  # fmt: skip
def test_every_field_of_a_spec_trains_and_changes_what_comes_out(change):
    (plain,), (other,) = (
        trainer.train_members([replace(SPEC, patience=40, **more)], [fold_data(rows=160)], 2)[0]
        for more in ({}, change)
    )
    assert other.train_loss[-1] < other.train_loss[0]
    assert other.train_loss != plain.train_loss


@pytest.mark.parametrize("loss", ["mse", "huber", "l1"])
def test_losses_of_numbers_learn_a_line(loss):
    spec = replace(SPEC, hidden=(), loss=loss)
    (outcome,) = trainer.train_members([spec], [fold_data(rows=160, regression=True)], 0)[0]
    assert outcome.score > 0.95


def test_a_row_of_weight_zero_teaches_nothing():
    data = fold_data(regression=True)
    weight = torch.ones(len(data.train.x))
    weight[0] = 0.0
    wild = data.train.y.clone()
    wild[0] = 1e6
    train = [Split(data.train.x, y, weight) for y in (data.train.y, wild)]
    one, two = (trainer.train_members([SPEC], [replace(data, train=item)], 0)[0][0] for item in train)
    assert one.validation_loss == two.validation_loss


def test_the_test_rows_outputs_come_with_the_score():
    data = fold_data()
    (outcome,) = trainer.train_members([SPEC], [data], 2)[0]
    assert outcome.output.shape == (len(data.test.x), 2)
    assert trainer.score_of(outcome.output, data.test.y) == outcome.score


def test_a_fold_trained_later_is_the_fold_trained_at_once():
    folds = [fold_data(0), fold_data(1)]
    at_once = trainer.train_members([SPEC], folds, 2)[0][1]
    (later,) = trainer.train_members([SPEC], folds[1:], 2, first_fold=1)[0]
    assert later.validation_loss == at_once.validation_loss


def test_test_rows_do_not_steer_training():
    data = fold_data()
    changed = FoldData(data.train, data.validation, Split(data.test.x * 100, 1 - data.test.y))
    (one,), (two,) = (trainer.train_members([SPEC], [item], 2)[0] for item in (data, changed))
    assert one.train_loss == two.train_loss
    assert one.best_epoch == two.best_epoch
    assert one.score != two.score


def test_member_alone_equals_the_member_among_others():
    folds = [fold_data(0), fold_data(1)]
    other = Spec((4, 2), lr=1e-3, weight_decay=0.0, batch_size=8, seed=9)
    alone = trainer.train_members([SPEC], folds, 2)[0]
    among = trainer.train_members([other, SPEC], folds, 2)[1]
    assert [item.validation_loss for item in alone] == [item.validation_loss for item in among]


def test_training_leaves_torchs_generator_alone():
    before = torch.random.get_rng_state()
    trainer.train_members([SPEC], [fold_data()], 2)
    trainer.refit([SPEC], fold_data().train, 2, [1])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("part", ["train", "validation"])
def test_non_finite_loss_is_diverged_and_has_no_score(part):
    data = fold_data(regression=True)
    getattr(data, part).y[0] = math.inf
    (outcome,) = trainer.train_members([SPEC], [data, data], 0)[0]
    assert outcome.stopped == "diverged"
    assert not outcome.finished


def test_fold_that_meets_the_deadline_has_no_score_unless_it_may_keep_its_best():
    past = time.perf_counter() - 1.0
    (cut,) = trainer.train_members([SPEC], [fold_data(), fold_data()], 2, deadline=past)[0]
    assert (cut.stopped, cut.finished) == ("clock", False)
    kept = trainer.train_members([SPEC], [fold_data()] * 2, 2, deadline=past, keep_at_deadline=True)[0]
    assert [(item.stopped, item.finished) for item in kept] == [("clock", True)] * 2


def test_scores_are_accuracy_and_r2():
    assert trainer.score_of(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 1])) == 0.5
    y = torch.tensor([[1.0], [2.0], [3.0]])
    assert trainer.score_of(y, y) == 1.0
    assert trainer.score_of(torch.full((3, 1), 2.0), y) == 0.0
    assert trainer.score_of(torch.zeros(3, 1), torch.ones(3, 1)) == 0.0


def test_refit_trains_for_exactly_the_epochs_it_is_told():
    data = fold_data().train
    one, two, again = (flat(*trainer.refit([SPEC], data, 2, [epochs])) for epochs in (1, 2, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, two)


def test_networks_that_are_refitted_together_are_those_refitted_alone():
    data = fold_data().train
    specs = [SPEC, replace(SPEC, loss="squared", seed=6), replace(SPEC, schedule="cosine", epochs=9)]
    together = trainer.refit(specs, data, 2, [7, 3, 5], threads=2)
    for spec, epochs, network in zip(specs, [7, 3, 5], together):
        assert not network.training
        assert torch.equal(flat(network), flat(*trainer.refit([spec], data, 2, [epochs], threads=1)))


@pytest.mark.parametrize("regression", [False, True])
def test_no_number_depends_on_threads(regression):
    folds = [fold_data(seed, regression=regression) for seed in range(3)]
    specs = [SPEC, replace(SPEC, hidden=(16, 8), dropout=(0.1, 0.2)), replace(SPEC, hidden=())]
    one, three = (trainer.train_members(specs, folds, 0 if regression else 2, threads=count) for count in (1, 3))
    for own, other in zip((item for row in one for item in row), (item for row in three for item in row)):
        assert (own.score, own.train_score, own.validation_loss) == (
            other.score,
            other.train_score,
            other.validation_loss,
        )
        assert torch.equal(own.output, other.output)

"""A member's step against nn.MLP and torch.optim: five steps, each from copied state, by the precision rule."""

from __future__ import annotations

import math

import pytest
import torch
from population_cases import classes_table, numbers_table, population
from population_steps import (
    CASES,
    assert_bf16_errs_no_more_than_autocast,
    assert_five_steps_err_no_more_than_torchs,
)
from torch.nn import functional as F

from mlpkit.population import Member


@pytest.mark.parametrize("name", CASES)
def test_five_steps_from_copied_state_err_no_more_than_torchs(name):
    assert_five_steps_err_no_more_than_torchs(name)


def test_bf16_errs_no_more_than_autocast():
    assert_bf16_errs_no_more_than_autocast()


SCHEDULES = {
    "cosine": ({"floor": 0.1}, lambda o, n, e: torch.optim.lr_scheduler.CosineAnnealingLR(o, n, 0.1 * 0.2)),
    "step": ({"gamma": 0.5, "every": 2}, lambda o, n, e: torch.optim.lr_scheduler.StepLR(o, 2 * e, 0.5)),
    "exponential": ({"gamma": 0.7}, lambda o, n, e: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 0.7 ** (t // e))),
    "one_cycle": (
        {},
        lambda o, n, e: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=n, cycle_momentum=False),
    ),
    "coslog4": (
        {},
        lambda o, n, e: torch.optim.lr_scheduler.LambdaLR(
            o, lambda t: 0.5 - 0.5 * math.cos(2 * math.pi * math.log2(1 + 15 * t / n))
        ),
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_torchs(name):
    settings, make = SCHEDULES[name]
    epochs, steps = 7, 3
    member = Member(lr=0.2, batch_size=10, epochs=epochs, schedule=name, optimizer="sgd", **settings)
    trained = population([member], numbers_table(30)).fit()
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
    scheduler = make(optimizer, epochs * steps, steps)
    wanted = []
    for step in range(epochs * steps):
        if step % steps == steps - 1:
            wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert trained.scores[0].lr == pytest.approx(wanted, rel=1e-9)


def test_a_warm_up_rises_in_equal_steps_before_the_schedule():
    member = Member(lr=0.2, batch_size=10, epochs=4, warmup=2, schedule="cosine", optimizer="sgd")
    found = population([member], numbers_table(30)).fit().scores[0].lr
    after = [0.2 * (1 + math.cos(math.pi * step / 6)) / 2 for step in (2, 5)]
    assert found == pytest.approx([0.1, 0.2, *after], rel=1e-9)


def test_fifty_epochs_end_where_torchs_end():
    X, y = classes_table(300, 8, 4)
    train, rest = torch.arange(200), torch.arange(200, 300)
    members = [
        Member(
            hidden=(32, 16), dropout=0.1, lr=3e-3, batch_size=32, epochs=50, seed=s, rows=train, validation_rows=rest
        )
        for s in range(5)
    ]
    ours = population(members, (X, y), metric="accuracy").fit()
    theirs = []
    for seed in range(5):
        model = population(members[seed : seed + 1], (X, y)).export(0).to_sequential().train()
        generator = torch.Generator().manual_seed(seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for _ in range(50):
                rows = train[torch.randperm(200, generator=generator)]
                for batch in rows.split(32):
                    optimizer.zero_grad()
                    F.cross_entropy(model(X[batch]), y[batch]).backward()
                    optimizer.step()
        theirs.append(float((model.eval()(X[rest]).argmax(1) == y[rest]).double().mean()))
    found = torch.tensor([score.metric[-1] for score in ours.scores.values()])
    wanted = torch.tensor(theirs)
    noise = math.sqrt(float(found.var() + wanted.var()) / 5)
    assert abs(float(found.mean() - wanted.mean())) < 3 * noise + 0.01
    assert float(found.mean()) > 0.5

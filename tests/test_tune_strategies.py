"""Every strategy on planted optima, and the budgets they keep. No network is trained here: see ``tune_fakes``."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tune_fakes import searching

from mlpkit.errors import ArgumentError
from mlpkit.tune.auto import auto
from mlpkit.tune.budget import Budget, Clock, read_budget
from mlpkit.tune.evaluate import Search
from mlpkit.tune.journal import Journal
from mlpkit.tune.ladder import from_trials
from mlpkit.tune.space import Range, Space
from mlpkit.tune.strategies import STRATEGIES, coarse_to_fine, constructive, grid, narrowed, sequential, sobol
from mlpkit.tune.trainer import Outcome

EVERY = {**STRATEGIES, "auto": auto}


def planted(spec):
    """Best at one layer of 64 with lr 3e-3 and dropout 0.2; 0.9 there."""
    if not spec.hidden:
        return 0.5 - 0.01 * abs(math.log10(spec.lr / 3e-3))
    rate = spec.dropout[-1] if isinstance(spec.dropout, tuple) else spec.dropout
    return (
        0.9
        - 0.05 * (len(spec.hidden) - 1)
        - 0.02 * abs(math.log2(spec.hidden[0] / 64))
        - 0.06 * abs(math.log10(spec.lr / 3e-3))
        - 0.1 * abs(rate - 0.2)
    )


SEARCHED = {
    "activation": "relu", "norm": None, "init": "xavier_uniform", "optimizer": "adamw", "schedule": "constant",
    "l1": 0.0, "epochs": 100, "loss": "cross_entropy", "label_smoothing": 0.0, "scaling": "standard", "expand": False,
    "batch_size": 32, "weight_decay": 1e-3, "beta1": 0.9, "beta2": 0.999,
}  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_every_strategy_finds_the_planted_optimum(monkeypatch, name):
    space = None if name == "auto" else Space(SEARCHED, lr=(1e-5, 1e-1), width=[16, 32, 64, 128], layers=[0, 1, 2])
    if name == "grid":
        space = Space({**SEARCHED, "dropout": 0.2}, lr=[1e-4, 1e-3, 3e-3, 1e-2], width=[16, 64], layers=[0, 1, 2])
    search, _ = searching(monkeypatch, planted, space=space, noise=0.001)
    _ = search.linear
    EVERY[name](search)
    best = search.best
    assert len(best.hidden) == 1
    assert best.hidden[0] in (32, 64, 128)
    # constructive searches no learning rate; that of the base costs 0.02.
    assert best.mean > {"constructive": 0.85, "random": 0.84, "quasirandom": 0.84}.get(name, 0.86)
    assert from_trials(search.trials).winner_rung == 1


@pytest.mark.parametrize("name", EVERY)
def test_every_strategy_repeats_itself_with_its_seed(monkeypatch, name):
    runs = []
    for _ in range(2):
        search, _ = searching(monkeypatch, planted, budget="30 trials", seed=5)
        EVERY[name](search)
        runs.append([(trial.params, trial.scores) for trial in search.trials])
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("trials", [1, 3, 25])
def test_a_budget_of_trials_is_kept(monkeypatch, name, trials):
    search, fake = searching(monkeypatch, planted, budget=f"{trials} trials")
    _ = search.linear
    EVERY[name](search)
    assert len(search.trials) <= trials
    assert search.trials[0].hidden == ()
    trained = len({(spec.hidden, spec.lr, spec.dropout, spec.activation) for spec in fake.specs})
    assert trained <= trials


@pytest.mark.parametrize("name", EVERY)
def test_a_budget_of_seconds_is_kept(monkeypatch, name):
    search, _ = searching(monkeypatch, planted, budget="100 s", seconds=1.0)
    # The clock goes on by what the trials say they cost.
    monkeypatch.setattr(search.clock, "now", lambda: sum(trial.seconds for trial in search.trials))
    _ = search.linear
    EVERY[name](search)
    # A batch that has begun is cut by the trainer, which is a fake here.
    assert search.clock.now() <= 100 + 5 * 16


def test_linear_problems_end_the_default_strategy_early(monkeypatch):
    search, _ = searching(monkeypatch, lambda spec: 0.8)
    auto(search)
    assert len(search.trials) < 40
    assert from_trials(search.trials).winner_rung == 0


def test_the_default_strategy_goes_on_until_nothing_more_is_gained(monkeypatch):
    search, _ = searching(monkeypatch, planted, budget="2000 trials")
    auto(search)
    assert 80 < len(search.trials) < 400
    assert search.converged > 0
    assert search.best.mean > 0.87
    short, _ = searching(monkeypatch, planted, budget="60 trials")
    auto(short)
    assert len(short.trials) == 60
    assert not short.converged


def test_a_candidate_that_the_budget_could_not_finish_is_not_begun(monkeypatch):
    search, fake = searching(monkeypatch, planted, budget="20s", seconds=1.0)
    monkeypatch.setattr(Search, "_rate", 1.0)
    monkeypatch.setattr(search.clock, "now", lambda: sum(trial.seconds for trial in search.trials))
    search.evaluate([{"layers": 1, "width": 16}], "x", prune=False)
    before = len(fake.specs)
    assert search.evaluate([{"layers": 2, "width": 256, "shape": "wide", "expand": False}], "x") == [None]
    assert len(fake.specs) == before
    assert search.untried


def test_what_is_held_back_is_left_for_later(monkeypatch):
    search, _ = searching(monkeypatch, planted, budget="100s", seconds=1.0)
    monkeypatch.setattr(Search, "_rate", 1.0)
    monkeypatch.setattr(search.clock, "now", lambda: 60.0)
    search.evaluate([{"layers": 1, "width": 16}], "x", prune=False)
    assert not search.done
    search.hold(12.0, 0.5)
    assert search.done
    search.hold(0.0, 0.0)
    assert not search.done


def test_luck_among_many_candidates_earns_no_layer(monkeypatch):
    deep = 0
    for seed in range(20):
        search, _ = searching(monkeypatch, lambda spec: 0.8, noise=0.02, seed=seed)
        auto(search)
        deep += from_trials(search.trials).winner_rung > 0
    assert deep <= 3


# The ladder


def test_a_rung_that_overfits_is_tried_wider_with_dropout(monkeypatch):
    search, _ = searching(monkeypatch, planted, rise=0.5)
    constructive(search)
    dropped = [(trial.hidden, trial.params["dropout"]) for trial in search.trials if "dropout" in trial.params]
    assert ((128,), 0.5) in dropped
    assert ((128,), 0.1) in dropped


def test_the_ladder_keeps_to_a_narrowed_space(monkeypatch):
    search, _ = searching(monkeypatch, planted, space=Space(width=[8, 24], layers=[0, 1]))
    constructive(search)
    assert [trial.hidden for trial in search.trials] == [(), (8,), (24,)]


def test_what_the_user_fixed_holds_for_every_candidate(monkeypatch):
    search, fake = searching(monkeypatch, planted, space=Space(optimizer="sgd", lr=0.02), budget="40 trials")
    auto(search)
    assert {spec.optimizer for spec in fake.specs} == {"sgd"}
    assert {spec.lr for spec in fake.specs} == {0.02}


# Grid, sequence, rounds


def test_the_grid_is_every_combination_once(monkeypatch):
    space = Space(layers=[0, 1], width=[16, 32], lr=[0.1, 0.01])
    search, _ = searching(monkeypatch, planted, space=space)
    grid(search)
    points = {(trial.hidden, trial.params.get("lr")) for trial in search.trials if trial.stage == "grid"}
    assert points == {(hidden, lr) for hidden in ((), (16,), (32,)) for lr in (0.1, 0.01)}


def test_sequential_changes_one_factor_at_a_time(monkeypatch):
    search, _ = searching(monkeypatch, planted, rise=0.5)
    sequential(search)
    stages = list(dict.fromkeys(trial.stage for trial in search.trials))
    assert stages == ["linear", "learning rate", "width", "shape", "dropout", "decay", "batch size"]


def test_rounds_shrink_to_the_optimum_and_follow_it_over_the_border(monkeypatch):
    space = Space({**SEARCHED, "dropout": 0.0}, layers=1, width=64, lr=Range(1e-5, 1e-3, log=True))
    search, fake = searching(monkeypatch, planted, space=space)
    coarse_to_fine(search, rounds=4, size=16)
    assert max(spec.lr for spec in fake.specs) > 1.5e-3
    last = [trial.params["lr"] for trial in search.trials if trial.stage == "round 4"]
    assert max(last) / min(last) < 50


def test_narrowing_keeps_what_the_part_may_be(monkeypatch):
    search, _ = searching(monkeypatch, lambda spec: 0.5 + (spec.dropout[-1] if spec.hidden else 0) / 3)
    space = Space(SEARCHED, layers=1, width=64, lr=1e-3)
    trials = search.evaluate([{**space.at({}), "dropout": rate} for rate in (0.1, 0.3, 0.88, 0.89, 0.9)], "x")
    assert narrowed(space, trials).parts["dropout"].high <= 0.99


def test_quasi_random_points_are_more_even_than_random_ones():
    space = Space()
    points = sobol(space, ["lr"], [0])
    units = [space.parts["lr"].to_unit(next(points)["lr"]) for _ in range(64)]
    assert (np.bincount((np.array(units) * 16).astype(int), minlength=16) == 4).all()


# Budgets


@pytest.mark.parametrize(
    ("given", "budget"),
    [
        (90, Budget(90.0, "seconds")),
        ("90s", Budget(90.0, "seconds")),
        ("2 min", Budget(120.0, "seconds")),
        ("60 cpu-s", Budget(60.0, "cpu-seconds")),
        ("200 trials", Budget(200.0, "trials")),
        ("1.5h", Budget(5400.0, "seconds")),
    ],
)
def test_budgets_are_read(given, budget):
    assert read_budget(given) == budget
    assert read_budget(str(budget)) == budget


@pytest.mark.parametrize("given", [0, -1, math.nan, "fast", "10 lightyears", "2.5 trials", True, None, "-3s", ".s"])
def test_a_budget_that_is_none_is_refused(given):
    with pytest.raises(ArgumentError, match="budget is"):
        read_budget(given)


def test_cpu_seconds_do_not_pass_while_waiting():
    sources = {"wall": iter([10.0, 13.0]).__next__, "cpu": iter([2.0, 2.25]).__next__}
    clock, wall = Clock(read_budget("5 cpu-s"), **sources), Clock(read_budget("5 s"), **sources)
    assert clock.now() == 0.25
    assert wall.now() == 3.0


class _Remembers(Journal):
    """Knows every outcome: each fold took a second of one thread."""

    def find(self, work):
        return [Outcome(0.8, 0.8, 1, "patience", 1.0, [1.0, 0.5, 0.4], [1.0, 0.5, 0.5]) for _ in range(5)]


@pytest.mark.parametrize(("budget", "spent"), [("100s", 2.5), ("100 cpu-s", 5.0)])
def test_what_a_resumed_run_had_spent_is_counted_in_the_budgets_own_seconds(monkeypatch, budget, spent):
    search, _ = searching(monkeypatch, lambda spec: 0.8, budget=budget)
    search.threads, search.journal = 2, _Remembers()
    _ = search.linear
    assert search.clock.credit == pytest.approx(spent)

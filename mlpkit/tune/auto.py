"""The default strategy: the ladder, a learning-rate range, then wider and finer search as long as it pays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mlpkit.tune import stats
from mlpkit.tune.evaluate import Search
from mlpkit.tune.folds import make_folds
from mlpkit.tune.importance import importance
from mlpkit.tune.ladder import Trial, from_trials
from mlpkit.tune.space import Params
from mlpkit.tune.strategies import BATCH, MOST_TRIALS, bayes, climb_with, in_batches, narrowed, sobol

ARCHITECTURE = ("layers", "width", "shape", "activation", "dropout", "lr", "weight_decay", "optimizer", "schedule")
# Each is tried on the best of the ladder, the cheap ones first; the later rounds search those that gain.
SWITCHES: tuple[Params, ...] = (
    {"label_smoothing": 0.1}, {"scaling": "robust"}, {"log_target": True}, {"schedule": "coslog4", "epochs": 50},
    {"activation": "silu"}, {"norm": "batch"}, {"norm": "layer"}, {"periodic": 0.1}, {"periodic": 0.3},
    {"periodic": 1.0},
)  # fmt: skip
# The recipe that won with plain networks on many tables (Holzmueller et al., 2024), in sizes for a CPU.
PORTFOLIO: tuple[Params, ...] = tuple(
    {
        "layers": layers, "width": width, "shape": "wide", "expand": False, "activation": "silu", "dropout": 0.15,
        "optimizer": "adamw", "lr": 4e-3, "schedule": "coslog4", "beta2": 0.95, "weight_decay": 1e-2, "epochs": 50,
    }
    for layers, width in ((2, 64), (2, 128))
)  # fmt: skip
_USUAL_LR = 9e-4
_LINEAR_LR = (6e-3, 2e-2, 6e-2)  # Its best depends on how far the classes can be told apart.
_REPEATS = 2
_FINALISTS = 3
_AGAIN = 4
_HELPS = 0.5
_AT_ONCE = 4  # Switches: so few that a budget that ends among them has seen the first ones whole.
_HOLD = 12.0  # What the finalists cost, in candidates.
_HOLD_SHARE = 0.35
_GAINED = 0.25  # A round that gains less than this share of one SE brought nothing.
_IDLE_ROUNDS = 2


def auto(search: Search) -> None:
    """Ladder, and the linear model with less decay; switches, learning rates; quasi-random points; finer; TPE.

    Each stage starts only if the one before left something to gain: a table that the linear model fits as well as all
    networks of the ladder and of the first quasi-random round is done. Otherwise rounds of finer quasi-random points
    and TPE go on until the budget is spent or two of them have gained nothing. Finalists are trained again on other
    folds, and the winner on half of the rows and from other seeds.
    """
    search.hold(_HOLD, _HOLD_SHARE)
    climb_with(search)
    if _allowed(search, {"layers": 0, "lr": _USUAL_LR, "weight_decay": 1e-2}):
        search.evaluate([{"layers": 0, "weight_decay": 1e-2, "lr": value} for value in _LINEAR_LR], "linear settings")
    gained = _switches(search)
    _lr_range(search)
    space = search.space
    free = set(space.free())
    names = [name for name in space.parts if name in free and (name in ARCHITECTURE or name in space.given)]
    names += [name for name in gained if name not in names]
    in_batches(search, sobol(space, names, [search.seed, 16]), "quasi-random", BATCH)
    if not _linear_is_enough(search) and not search.done:
        _rounds(search, names)
    search.hold(_AGAIN + 1.0, _HOLD_SHARE)
    finalists(search)
    search.hold(0.0, 0.0)
    winner = from_trials(search.trials).winner
    if winner.hidden and search.averaging:
        search.retrain(winner, _AGAIN)
    search.halve(winner)


def finalists(search: Search) -> None:
    """The linear model and the best few are trained again with other folds and seeds: luck seldom strikes twice."""
    done = sorted((trial for trial in search.trials if trial.state == "complete"), key=lambda trial: -trial.mean)
    chosen: list[Trial] = [search.linear]
    for rung in sorted({len(trial.hidden) for trial in done}):
        best = next(trial for trial in done if len(trial.hidden) == rung)
        if best not in chosen:
            chosen.append(best)
    chosen += [trial for trial in done[:_FINALISTS] if trial not in chosen]
    problem = search.problem
    if problem.order is not None:
        return  # Time has one order: there are no other folds.
    for number in range(1, _REPEATS):
        stratify = problem.target.task == "classification"
        folds = make_folds(
            problem.target.values, len(search.folds), search.seed + number, stratify=stratify, groups=problem.groups
        )
        search.repeat(chosen, folds, number)


def _lr_range(search: Search) -> None:
    """The best of the ladder at learning rates over the whole range, trained at once."""
    part, best = search.space.parts["lr"], search.best
    if part.fixed:
        return
    grid = part.grid(9)
    above = [value for value in grid if float(value or 0.0) >= _USUAL_LR] or grid
    search.evaluate([{**best.params, "lr": value} for value in above], "learning rate")
    # Low rates take many epochs: they are tried where the lowest of the usual ones led.
    if search.best.params.get("lr") == above[0]:
        below = [value for value in grid if value not in above]
        search.evaluate([{**best.params, "lr": value} for value in below[-3:]], "learning rate")


def _switches(search: Search) -> list[str]:
    """Try each switch on the best so far, then those that gain together, and the portfolio with them; what gained.

    A part that the user has set is left alone.
    """
    best = search.best
    allowed = [change for change in SWITCHES if _allowed(search, change)]
    found: list[Trial | None] = []
    for first in range(0, len(allowed), _AT_ONCE):
        part = [{**best.params, **change} for change in allowed[first : first + _AT_ONCE]]
        found += search.evaluate(part, "switches")
    gains = [_gain(trial, best) for trial in found]
    order = sorted(range(len(allowed)), key=lambda at: gains[at])
    # Of switches for the same part the better one stays.
    together = {name: value for at in order if gains[at] > _HELPS for name, value in allowed[at].items()}
    if sum(gain > _HELPS for gain in gains) > 1:
        search.evaluate([{**best.params, **together}], "switches")
    likely = [{**entry, **together} for entry in PORTFOLIO if _allowed(search, entry)]
    if search.best.hidden:
        search.evaluate(likely, "portfolio")
    return [name for name in together if not search.space.parts[name].fixed]


def _gain(trial: Trial | None, best: Trial) -> float:
    """By how many SE it beats the best; nothing for what did not finish."""
    if trial is None or trial is best or trial.state != "complete":
        return 0.0
    return stats.compare(trial.scores, best.scores).ratio


def _rounds(search: Search, names: list[str]) -> None:
    """Finer points around the best tenth, then TPE, in turn; all parts join once the first round gains nothing."""
    idle, number = 0, 0
    while idle < _IDLE_ROUNDS and not search.done and len(search.trials) < MOST_TRIALS:
        best, count = search.best, len(search.trials)
        searched = names if not idle else search.space.free()
        finer = narrowed(search.space, search.trials)
        in_batches(search, sobol(finer, searched, [search.seed, 17, number]), "finer", BATCH)
        bayes(search, 2 * BATCH if not number else BATCH, _important(search, searched))
        gain = search.best.mean - best.mean
        idle = 0 if gain > _GAINED * best.se else idle + 1
        number += 1
        if idle == _IDLE_ROUNDS:
            search.converged = len(search.trials) - count


def _allowed(search: Search, change: Mapping[str, Any]) -> bool:
    parts, given = search.space.parts, search.space.given
    return not given & set(change) and all(parts[name].holds(value) for name, value in change.items())


def _linear_is_enough(search: Search) -> bool:
    return from_trials(search.trials).winner_rung == 0


def _important(search: Search, names: Sequence[str]) -> list[str]:
    """The parts whose choice moves the score more than noise does, by the spread of mean ranks of thirds."""
    found = importance(search.trials, search.space)
    chosen = [item.name for item in found if item.name in names and item.low > 0.0]
    return [name for name in names if name in chosen or name in ("layers", "width", "lr")]

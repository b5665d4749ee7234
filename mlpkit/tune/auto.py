"""The default strategy: the ladder, a learning-rate range, then wider and finer search as long as it pays."""

from __future__ import annotations

from collections.abc import Sequence

from mlpkit.tune.evaluate import Search
from mlpkit.tune.folds import make_folds
from mlpkit.tune.importance import importance
from mlpkit.tune.ladder import Trial, from_trials
from mlpkit.tune.strategies import BATCH, bayes, climb_with, in_batches, narrowed, sobol

ARCHITECTURE = ("layers", "width", "shape", "activation", "dropout", "lr", "weight_decay", "optimizer", "schedule")
_REPEATS = 2
_FINALISTS = 3


def auto(search: Search) -> None:
    """Ladder; learning-rate range of its winner; quasi-random over architecture, lr and regularisation; finer; TPE.

    Each stage starts only if the one before left something to gain: a table that the linear model fits as well as all
    networks of the ladder and of the first quasi-random round is done. Finalists are trained again on other folds,
    and the winner on half of the rows.
    """
    climb_with(search)
    _lr_range(search)
    space = search.space
    free = set(space.free())
    names = [name for name in space.parts if name in free and (name in ARCHITECTURE or name in space.given)]
    start = in_batches(search, sobol(space, names, [search.seed, 16]), "quasi-random", BATCH)
    if not _linear_is_enough(search) and not search.done:
        finer = narrowed(space, start)
        start += in_batches(search, sobol(finer, names, [search.seed, 17]), "finer", BATCH)
        bayes(search, 2 * BATCH, _important(search, names))
    finalists(search)
    search.halve(from_trials(search.trials).winner)


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
    search.evaluate([{**best.params, "lr": value} for value in part.grid(9)[2:]], "learning rate")


def _linear_is_enough(search: Search) -> bool:
    return from_trials(search.trials).winner_rung == 0


def _important(search: Search, names: Sequence[str]) -> list[str]:
    """The parts whose choice moves the score more than noise does, by the spread of mean ranks of thirds."""
    found = importance(search.trials, search.space)
    chosen = [item.name for item in found if item.name in names and item.low > 0.0]
    return [name for name in names if name in chosen or name in ("layers", "width", "lr")]

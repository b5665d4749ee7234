"""How candidates are chosen: each strategy asks a Search for batches until its budget or its plan is at an end."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from mlpkit.report._extras import require
from mlpkit.tune.distributions import suggest, to_distributions, to_optuna
from mlpkit.tune.evaluate import Search
from mlpkit.tune.ladder import WIDTHS, Climb, Hidden, Trial, climb, overfits
from mlpkit.tune.parts import Choice, Part, Range
from mlpkit.tune.space import Params, Space
from mlpkit.tune.study import quiet

BATCH = 16
MOST_TRIALS = 2000  # Of the strategies that have no end of their own.
_GRID_POINTS = 5
_MOST_DEPTH = 2


def constructive(search: Search) -> None:
    """The ladder of 0, 1 and 2 hidden layers; where a rung overfits, also twice its width with dropout."""
    climb_with(search)


def climb_with(search: Search) -> Climb:
    """The ladder over a search; what the space fixes or narrows of layers and widths is kept to."""
    layers, width = search.space.parts["layers"], search.space.parts["width"]
    widths: Sequence[int] = WIDTHS
    if "width" in search.space.given:
        widths = sorted({int(value or 1) for value in width.grid(4)})
    deepest = max(int(value or 0) for value in layers.grid(99)) if "layers" in search.space.given else _MOST_DEPTH

    def run(hidden: Hidden) -> Trial | None:
        if not hidden:
            return search.linear
        return search.evaluate([shape_params(hidden)], "ladder", prune=False)[0]

    def drop(hidden: Hidden, rate: float) -> Trial | None:
        return search.evaluate([{**shape_params(hidden), "dropout": rate}], "ladder", prune=False)[0]

    def ahead(candidates: Sequence[Hidden]) -> None:
        if search.clock.budget.unit == "trials":
            search.evaluate([shape_params(hidden) for hidden in candidates], "ladder", prune=False)

    # Twice the width with dropout is no answer where the user has set one of them.
    free = not {"width", "dropout"} & search.space.given
    return climb(run, ahead=ahead, drop=drop if free else None, widths=widths, deepest=deepest)


def shape_params(hidden: Hidden) -> Params:
    """The parts of the space that give these layers; for shapes the ladder tries."""
    if len(hidden) < 2:
        return {"layers": len(hidden), **({"width": hidden[0]} if hidden else {})}
    shape = {1: "wide", 2: "tapered"}.get(hidden[0] // hidden[1], "funnel")
    return {"layers": len(hidden), "width": hidden[0], "shape": shape, "expand": False}


def grid(search: Search) -> None:
    """Every combination of the parts that were given (else layers, width and lr), five points a range, in drawn order.

    A budget that ends early has then seen all corners alike.
    """
    space = search.space
    names = [name for name in space.parts if name in space.given and not space.parts[name].fixed]
    names = names or ["layers", "width", "lr"]
    lists = [space.parts[name].grid(_GRID_POINTS) for name in names]
    points = list(dict.fromkeys(_frozen(space, dict(zip(names, values))) for values in itertools.product(*lists)))
    order = np.random.default_rng([search.seed, 11]).permutation(len(points))
    in_batches(search, (dict(points[at]) for at in order), "grid")


def random(search: Search) -> None:
    """Independent draws of every part."""
    rng = np.random.default_rng([search.seed, 12])
    names = search.space.free()
    in_batches(search, (search.space.at(dict(zip(names, rng.random(len(names))))) for _ in itertools.count()), "random")


def quasirandom(search: Search) -> None:
    """Scrambled Sobol points (Owen, 1998): as random, but evenly spread over every part."""
    in_batches(search, sobol(search.space, search.space.free(), [search.seed, 13]), "quasirandom")


def coarse_to_fine(search: Search, rounds: int = 3, size: int = 2 * BATCH) -> None:
    """Rounds of quasi-random points; each round shrinks to the best tenth, and widens where that lies at a border."""
    space = search.space
    for number in range(rounds):
        if search.done:
            return
        points = sobol(space, space.free(), [search.seed, 14, number])
        trials = in_batches(search, itertools.islice(points, size), f"round {number + 1}", limit=size)
        space = narrowed(space, [*trials, *_inside(space, search.trials)])


def bayes(search: Search, trials: int = MOST_TRIALS, names: Sequence[str] | None = None) -> None:
    """Optuna's TPE, asked and told in batches; it starts from quasi-random points and what was tried before."""
    optuna = require("optuna", "mlpkit.tune")
    space = search.space
    free = list(names or space.free())
    sampler = optuna.samplers.TPESampler(seed=search.seed, n_startup_trials=0)
    with quiet(optuna):
        study = optuna.create_study(direction="maximize", sampler=sampler)
    states = optuna.trial.TrialState
    for trial in search.trials:
        _tell(optuna, study, space, trial, free)
    start = max(0, BATCH - len(study.get_trials(states=(states.COMPLETE,))))
    first = itertools.islice(sobol(space, free, [search.seed, 15]), start)
    for trial in in_batches(search, first, "bayes", start):
        _tell(optuna, study, space, trial, free)
    left = trials - start
    while left > 0 and not search.done:
        size = min(BATCH // 2, left)
        asked = [study.ask() for _ in range(size)]
        params = [{k: v for k, v in suggest(_only(space, free), one).items() if k in free} for one in asked]
        for one, found in zip(asked, search.evaluate(params, "bayes")):
            value = _value(found)
            study.tell(one, value, state=states.COMPLETE if value is not None else states.FAIL)
        left -= size


def sequential(search: Search) -> None:
    """One factor at a time, the most important first; each step keeps the best so far.

    The learning rate over its range; wide against tapered; dropout or decay where it overfits; batch size.
    """
    best = dict(search.best.params)
    if not best.get("layers"):
        best.update({"layers": 1, "width": 64})
    space = search.space
    rates = [{"lr": value} for value in space.parts["lr"].grid(9)]
    best = _step(search, best, rates, "learning rate")
    lr = float(best.get("lr") or search.base.lr)
    best = _step(search, best, [{"lr": value} for value in (lr / 3, lr / 1.7, lr * 1.7, lr * 3)], "learning rate")
    widths = [{"layers": 1, "width": value} for value in space.parts["width"].grid(5)]
    best = _step(search, best, widths, "width")
    if 2 in space.parts["layers"].grid(99):
        shapes = [{"layers": 2, "shape": shape, "expand": False} for shape in ("wide", "tapered", "funnel")]
        best = _step(search, best, shapes, "shape")
    found = _find(search, best)
    if found is not None and overfits(found):
        best = _step(search, best, [{"dropout": rate} for rate in (0.1, 0.3, 0.5)], "dropout")
        best = _step(search, best, [{"weight_decay": v} for v in space.parts["weight_decay"].grid(3)], "decay")
    best = _step(search, best, [{"batch_size": value} for value in space.parts["batch_size"].grid(5)], "batch size")


def sobol(space: Space, names: Sequence[str], seed: Sequence[int]) -> Iterable[Params]:
    """Endless quasi-random candidates over the named parts; other parts are left to the base."""
    qmc = require("scipy.stats", "mlpkit.tune").qmc
    engine = qmc.Sobol(max(1, len(names)), rng=np.random.default_rng(seed))
    while True:
        for point in engine.random(64):
            params = _only(space, names).at(dict(zip(names, point)))
            yield {name: value for name, value in params.items() if name in names or space.parts[name].fixed}


def narrowed(space: Space, trials: Sequence[Trial]) -> Space:
    """The space around the best tenth (at least three) of finished trials, widened where they crowd at a border."""
    done = sorted((trial for trial in trials if trial.state == "complete"), key=lambda trial: -trial.mean)
    best = done[: max(3, math.ceil(len(done) / 10))]
    if len(best) < 3:
        return space
    parts: dict[str, Part] = {}
    for name in space.free():
        part, values = space.parts[name], [trial.params[name] for trial in best if name in trial.params]
        if not values:
            continue
        if isinstance(part, Choice) and not part.ordered:
            kept = tuple(value for value in part.values if value in values)
            parts[name] = Choice(kept)
            continue
        units = sorted(part.to_unit(value) for value in values)
        margin = 0.1
        low, high = units[0] - margin, units[-1] + margin
        top = part.to_unit(best[0].params[name]) if name in best[0].params else 0.5
        if isinstance(part, Range):
            low = low - 0.25 if top < 0.05 else max(low, 0.0)
            high = high + 0.25 if top > 0.95 else min(high, 1.0)
        parts[name] = _legal(name, part, part.within(low, high))
    return space.with_parts(**parts)


def _legal(name: str, before: Part, after: Part) -> Part:
    """``after``, unless it left what the part may be at all."""
    try:
        Space({name: after})
    except ValueError:
        return before
    return after


def _only(space: Space, names: Sequence[str]) -> Space:
    """The space with every part fixed but the named ones."""
    return space.with_parts(
        **{name: Choice((part.from_unit(0.5),)) for name, part in space.parts.items() if name not in names}
    )


def in_batches(
    search: Search, candidates: Iterable[Mapping[str, Any]], stage: str, limit: int = MOST_TRIALS
) -> list[Trial]:
    """Evaluate candidates batch by batch until they, the limit or the budget are at an end."""
    found: list[Trial] = []
    iterator = iter(candidates)
    while limit > 0 and not search.done:
        size = int(min(BATCH, limit, search.clock.trials_left))
        batch = list(itertools.islice(iterator, size))
        if not batch:
            break
        found += [trial for trial in search.evaluate(batch, stage) if trial is not None]
        limit -= size
    return found


def _inside(space: Space, trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if set(space.free()) & set(trial.params) and space.holds(trial.params)]


def _step(search: Search, best: Params, changes: Sequence[Mapping[str, Any]], stage: str) -> Params:
    candidates = [best, *({**best, **change} for change in changes)]
    trials = search.evaluate(candidates, stage, prune=False)
    done = [trial for trial in trials if trial is not None and trial.state == "complete"]
    return dict(max(done, key=lambda trial: (trial.mean, -trial.parameters)).params) if done else best


def _find(search: Search, params: Params) -> Trial | None:
    return next((trial for trial in search.trials if trial.params == params), None)


def _value(trial: Trial | None) -> float | None:
    """What the sampler is told: the mean over the folds, also of a candidate that a rung stopped."""
    scores = [outcome.score for outcome in trial.outcomes if outcome.finished] if trial else []
    return float(np.mean(scores)) if scores and trial and trial.state in ("complete", "pruned") else None


def _tell(optuna: Any, study: Any, space: Space, trial: Trial, names: Sequence[str]) -> None:
    value = _value(trial)
    params = {name: item for name, item in trial.params.items() if name in names}
    if value is None or not params or not space.holds(params):
        return
    study.add_trial(
        optuna.trial.create_trial(
            value=value, params=to_optuna(space, params), distributions=to_distributions(space, list(params))
        )
    )


def _frozen(space: Space, params: Params) -> tuple[tuple[str, Any], ...]:
    complete = {name: params.get(name, part.from_unit(0.5)) for name, part in space.parts.items()}
    return tuple((name, value) for name, value in space.reduce(complete).items() if name in params)


STRATEGIES: dict[str, Callable[[Search], None]] = {
    "constructive": constructive,
    "grid": grid,
    "random": random,
    "quasirandom": quasirandom,
    "coarse_to_fine": coarse_to_fine,
    "bayes": bayes,
    "sequential": sequential,
}

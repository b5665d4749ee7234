"""Tables of very many rows: searched on a sample, judged on rows held out, fitted on all of them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlpkit.errors import NonFiniteError
from mlpkit.tune import trainer
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.evaluate import Search
from mlpkit.tune.final import trust, tuned
from mlpkit.tune.honest import Estimate
from mlpkit.tune.ladder import Trial
from mlpkit.tune.model import TunedModel
from mlpkit.tune.problem import Problem, part_of, target_scale, target_tensor
from mlpkit.tune.rows import scores_of_rows

Rows = npt.NDArray[np.int64]

MOST_ROWS = 200_000
SAMPLE, HELD = 40_000, 20_000
SEARCH_SHARE = 0.5  # of the budget; the fits on all rows have the rest
_LEAST_EPOCHS = 3
_NORMAL_90 = 1.645


@dataclass(frozen=True)
class Whole:
    """All of a table of which a part is searched. held: rows outside that part, which no search has seen."""

    problem: Problem
    held: Rows


def sampled(problem: Problem, seed: int) -> tuple[Problem, Whole]:
    """(a sample to search, the whole with its held-out rows); both drawn evenly over the target.

    Rows of one group are never both held out and searched; with an order the last rows are held out.
    """
    rng = np.random.default_rng([seed, 41])
    every = np.arange(problem.rows)
    if problem.order is not None:
        held = np.argsort(problem.order, kind="stable")[-HELD:]
    elif problem.groups is not None:
        names = rng.permutation(np.unique(problem.groups))
        sizes = np.cumsum([int((problem.groups == name).sum()) for name in names[:-1]])
        held = every[np.isin(problem.groups, names[: 1 + int(np.searchsorted(sizes, HELD))])]
    else:
        held = _evenly(problem.target.values, every, HELD, rng)
    rest = np.setdiff1d(every, held)
    searched = part_of(problem, np.sort(_evenly(problem.target.values, rest, SAMPLE, rng)))
    note = f"searched on a sample of {searched.rows:,} of {problem.rows:,} rows, judged on {len(held):,} held out"
    return replace(searched, notes=[*problem.notes, note]), Whole(problem, np.sort(held))


def _evenly(target: npt.NDArray[Any], rows: Rows, count: int, rng: np.random.Generator) -> Rows:
    """``count`` of the rows, evenly spaced in the order of the target: classes and numbers keep their shares."""
    shuffled = rng.permutation(rows)
    ordered = shuffled[np.argsort(target[shuffled], kind="stable")]
    count = min(count, len(ordered))
    return ordered[np.arange(count) * len(ordered) // count]


def fit(search: Search, winner: Trial, whole: Whole) -> tuple[TunedModel, int, Estimate]:
    """(the model, epochs of its fit, what it scored on the held-out rows).

    The winner is trained on all rows but those held out, half of which choose the epoch and half of which are scored;
    then for as many epochs on all rows, unless the budget has no time for that.
    """
    problem, held = whole.problem, whole.held
    spec, encoding = search.spec(winner.params)
    train = np.setdiff1d(np.arange(problem.rows), held)
    encoder = Encoder.fit(problem.data, problem.columns, train, encoding.scaling, encoding.periodic)
    mean, scale = target_scale(problem.target, train, encoding)
    x = torch.from_numpy(encoder.transform(problem.data))
    y = target_tensor(problem.target, mean, scale, encoding)
    weight = None if problem.weight is None else torch.from_numpy(problem.weight.astype(np.float32))
    data, classes = trainer.Split(x, y, weight), len(problem.target.classes)
    # As many steps as on the sample, not as many epochs: a schedule is to come to its end.
    epochs = max(_LEAST_EPOCHS, math.ceil(spec.epochs * search.rows / len(train)))
    clock = search.clock
    start = clock.now()
    half = start + (clock.end - start) / 2
    choose, test = held[::2], held[1::2]
    network, best = trainer.fit_until(
        replace(spec, epochs=epochs), data, classes, train, choose, stop=lambda: clock.now() > half,
        threads=search.threads,
    )  # fmt: skip
    with torch.inference_mode():
        output = torch.cat([network(x[part]) for part in np.array_split(test, max(1, len(test) // 4096))])
    rows = scores_of_rows(problem.target, test, output.double().numpy(), (mean, scale), encoding)
    score, se = float(rows.mean()), float(rows.std(ddof=1)) / math.sqrt(len(rows))
    found = Estimate(score, score - _NORMAL_90 * se, score + _NORMAL_90 * se, winner.mean, 0.0, score - winner.mean)
    if clock.now() + (clock.now() - start) * 0.8 < clock.end:
        again = replace(spec, epochs=max(epochs, best))
        (network,) = trainer.refit(
            [again], data, classes, [best], threads=search.threads, stop=lambda: clock.now() > clock.end
        )
    if not all(bool(torch.isfinite(value).all()) for value in network.state_dict().values()):
        raise NonFiniteError("tune: the weights became non-finite in the fit on all rows")
    temperature, interval = trust(search, winner, None)
    return tuned(search, winner, network, encoder, mean, scale, (), temperature, interval), best, found

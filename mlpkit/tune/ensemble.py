"""Several finalists in place of one: who is averaged, what that gains on unseen rows, and the network it makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mlpkit.population.data import Table
from mlpkit.population.ensemble import Ensemble, greedy_picks
from mlpkit.tune import stats
from mlpkit.tune.evaluate import Search
from mlpkit.tune.ladder import Climb, Trial
from mlpkit.tune.problem import target_scale, target_tensor
from mlpkit.tune.rows import row_scores
from mlpkit.tune.space import Encoding
from mlpkit.tune.trainer import Outcome

_CANDIDATES = 25
_PICKS = 10


@dataclass(frozen=True)
class Committee:
    """Finalists with their weights (picks). step: loss per row that the average saves against the winner.

    outputs: per fold (rows, out_features) of the average chosen on the other folds, logits for classes. score: its
    mean over the folds. The step's units are nats, or squared standard deviations of the target. seeds: 0 for the
    trial's own seed, 1, 2, ... for those it was trained from again.
    """

    trials: tuple[Trial, ...]
    weights: tuple[int, ...]
    step: stats.Comparison
    score: float
    outputs: list[Tensor] = field(repr=False)
    better: bool = False
    seeds: tuple[int, ...] = ()


class Average(nn.Module):
    """Networks on the same inputs as one: mean of the outputs, or for classes the logarithm of the mean probability.

    x: (..., in_features); returns (..., out_features). softmax of it are the averaged probabilities.
    """

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float], *, classes: bool) -> None:
        super().__init__()
        self.mean = Ensemble(models, weights, loss="cross_entropy" if classes else "mse")
        self.classes = classes

    def forward(self, x: Tensor) -> Tensor:
        """Logits, or numbers."""
        average: Tensor = self.mean(x)
        return average.clamp(min=torch.finfo(average.dtype).tiny).log() if self.classes else average

    def to_sequential(self) -> Average:
        """The same with members of stock PyTorch modules."""
        plain = [model.to_sequential() for model in self.mean.models]  # type: ignore[operator]
        same = Average(plain, self.mean.weights.tolist(), classes=self.classes)
        return same.to(self.mean.weights.dtype)


class Sliced(nn.Module):
    """A network on some of the inputs: model(x[..., first:end])."""

    def __init__(self, model: nn.Module, first: int, end: int) -> None:
        super().__init__()
        self.model, self.first, self.end = model, first, end

    def forward(self, x: Tensor) -> Tensor:
        """What the model gives."""
        y: Tensor = self.model(x[..., self.first : self.end])
        return y

    def to_sequential(self) -> Sliced:
        """The same with a model of stock PyTorch modules."""
        return Sliced(self.model.to_sequential(), self.first, self.end)  # type: ignore[operator]


def choose(search: Search, climb: Climb) -> Committee | None:
    """The winner from several seeds, and greedy selection (Caruana et al., 2004) of others beside it.

    Where the winner was trained ``again`` on its folds, its networks are averaged unless that loses one SE: what they
    do not share is noise. Other finished candidates with the winner's kind of target join, picked with repetition on
    the test rows of the folds, where that gains more than one SE of loss or score and loses that in neither; what it
    is worth is told by fold: chosen on the other folds, scored on this one. None where linear is enough, where there
    is nothing to average, or where outputs were not kept.
    """
    winner = climb.winner
    encoding = search.spec(winner.params)[1]
    others = [
        trial
        for trial in climb.trials
        if trial.state == "complete"
        and trial is not winner
        and search.spec(trial.params)[1].log_target == encoding.log_target
    ]
    pool = [winner, *sorted(others, key=lambda trial: -trial.mean)[: _CANDIDATES - 1]]
    group = [winner.outcomes, *winner.again]
    if not winner.hidden or len(pool) + len(group) < 3:
        return None
    everyone = [*group, *(trial.outcomes for trial in pool)]
    if any(outcome.output is None for outcomes in everyone for outcome in outcomes):
        return None
    truth = _truth(search, encoding)
    # The winner's networks are picked together, each other candidate by itself.
    parts = [
        torch.stack(
            [
                torch.stack([_scaled(outcomes[at].output, rows) for outcomes in group]).mean(0),
                *(_scaled(trial.outcomes[at].output, rows) for trial in pool[1:]),
            ]
        )
        for at, rows in enumerate(truth)
    ]
    alone = [_unscaled(part[0], rows) for part, rows in zip(parts, truth)]
    greedy = _crosswise(parts, truth)
    found = _judged(search, encoding, winner, truth, greedy)
    steps = _gains(search, encoding, truth, greedy, alone)
    picks = greedy_picks(torch.cat(parts, dim=1), _join(truth), _loss(truth), _PICKS)
    counted = {at: picks.count(at) for at in dict.fromkeys(picks)}
    if len(counted) > 1 and max(steps) > 1.0 and min(steps) > -1.0:
        return _committee(pool, counted, len(group), found, better=True)
    if len(group) == 1:
        return _committee(pool, counted, 1, found, better=False)
    found = _judged(search, encoding, winner, truth, alone)
    return _committee(pool, {0: 1}, len(group), found, better=found.worst > -1.0)


@dataclass(frozen=True)
class _Judged:
    """Outputs of an average, what they gain on the winner's own, and the worse of the gains in SE."""

    outputs: list[Tensor]
    step: stats.Comparison
    score: float
    worst: float


def _judged(
    search: Search, encoding: Encoding, winner: Trial, truth: Sequence[Table], outputs: list[Tensor]
) -> _Judged:
    own = [outcome.output for outcome in winner.outcomes if outcome.output is not None]
    saved = [
        _each(_scaled(before, rows), rows) - _each(_scaled(after, rows), rows)
        for before, after, rows in zip(own, outputs, truth)
    ]
    step = _step(torch.cat(saved).numpy())
    score = _step(_score_gain(search, encoding, outputs, own))
    return _Judged(outputs, step, stats.mean(scores_of(search, encoding, outputs)), min(step.ratio, score.ratio))


def _gains(
    search: Search, encoding: Encoding, truth: Sequence[Table], outputs: Sequence[Tensor], before: Sequence[Tensor]
) -> tuple[float, float]:
    """Gains of outputs over others in loss and in score, in SE."""
    saved = [
        _each(_scaled(old, rows), rows) - _each(_scaled(new, rows), rows)
        for old, new, rows in zip(before, outputs, truth)
    ]
    return _step(torch.cat(saved).numpy()).ratio, _step(_score_gain(search, encoding, outputs, before)).ratio


def _crosswise(parts: Sequence[Tensor], truth: Sequence[Table]) -> list[Tensor]:
    """Outputs on each fold of what is picked on the others."""
    outputs = []
    for at in range(len(truth)):
        others = [number for number in range(len(truth)) if number != at]
        own = greedy_picks(
            torch.cat([parts[i] for i in others], dim=1), _join([truth[i] for i in others]), _loss(truth), _PICKS
        )
        outputs.append(_unscaled(torch.stack([parts[at][pick] for pick in own]).mean(0), truth[at]))
    return outputs


def _committee(
    pool: Sequence[Trial], counted: Mapping[int, int], group: int, found: _Judged, *, better: bool
) -> Committee:
    trials, weights, seeds = [], [], []
    for at, count in counted.items():
        copies = group if at == 0 else 1
        trials += [pool[at]] * copies
        weights += [count * group // copies] * copies
        seeds += list(range(copies))
    return Committee(tuple(trials), tuple(weights), found.step, found.score, found.outputs, better, tuple(seeds))


def scores_of(search: Search, encoding: Encoding, outputs: Sequence[Tensor]) -> list[float]:
    """Accuracy or R2 per fold of outputs on its test rows."""
    found = []
    for fold, output in zip(search.folds, outputs):
        rows = row_scores(search.problem, [fold], encoding, [Outcome(output=output)])
        assert rows is not None
        weight = None if search.problem.weight is None else search.problem.weight[fold.test]
        found.append(float(np.average(rows, weights=weight)))
    return found


def _score_gain(
    search: Search, encoding: Encoding, outputs: Sequence[Tensor], before: Sequence[Tensor]
) -> npt.NDArray[np.float64]:
    """Score of every row less that of other outputs."""
    average = row_scores(search.problem, search.folds, encoding, [Outcome(output=output) for output in outputs])
    own = row_scores(search.problem, search.folds, encoding, [Outcome(output=output) for output in before])
    assert average is not None
    assert own is not None
    return average - own


def _truth(search: Search, encoding: Encoding) -> list[Table]:
    """Targets of every fold's test rows as the fold's own networks saw them."""
    problem, tables = search.problem, []
    for fold in search.folds:
        y = target_tensor(problem.target, *target_scale(problem.target, fold.train, encoding), encoding)[fold.test]
        weight = None if problem.weight is None else torch.from_numpy(problem.weight[fold.test])
        number = problem.target.task == "regression"
        tables.append(Table(torch.empty(0), None if number else y, y if number else None, weight))
    return tables


def _join(tables: Sequence[Table]) -> Table:
    def whole(name: str) -> Tensor | None:
        items = [getattr(item, name) for item in tables]
        return None if items[0] is None else torch.cat(items)

    return Table(torch.empty(0), whole("classes"), whole("target"), whole("weights"))


def _loss(tables: Sequence[Table]) -> str:
    return "mse" if tables[0].classes is None else "cross_entropy"


def _scaled(output: Tensor | None, rows: Table) -> Tensor:
    assert output is not None
    return output.double() if rows.classes is None else output.double().softmax(1)


def _unscaled(average: Tensor, rows: Table) -> Tensor:
    return average if rows.classes is None else average.clamp(min=torch.finfo(torch.float64).tiny).log()


def _each(average: Tensor, rows: Table) -> Tensor:
    """Loss of every row."""
    if rows.classes is not None:
        chance = average.gather(1, rows.classes.long()[:, None])[:, 0]
        return -chance.clamp(min=torch.finfo(torch.float64).tiny).log()
    assert rows.target is not None
    return (average - rows.target.double()).square().mean(1)


def _step(saved: npt.NDArray[np.float64]) -> stats.Comparison:
    gain, se = float(saved.mean()), float(np.std(saved, ddof=1)) / math.sqrt(len(saved))
    return stats.Comparison(gain, se, gain / se if se > 0.0 else 0.0)

"""Several finalists in place of one: who is averaged, what that gains on unseen rows, and the network it makes."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
    mean over the folds. The step's units are nats, or squared standard deviations of the target.
    """

    trials: tuple[Trial, ...]
    weights: tuple[int, ...]
    step: stats.Comparison
    score: float
    outputs: list[Tensor] = field(repr=False)
    better: bool = False


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


def choose(search: Search, climb: Climb) -> Committee | None:
    """Greedy selection with repetition (Caruana et al., 2004) over finished candidates of the winner's encoding.

    Selection is on the test rows of the folds. What it is worth is told by fold: chosen on the other folds, scored on
    this one. ``better`` if loss or score of the rows gains more than one SE over the winner and neither loses that.
    None where linear is enough, where fewer than two candidates qualify, or where outputs were not kept.
    """
    winner = climb.winner
    encoding = search.spec(winner.params)[1]
    done = [trial for trial in climb.trials if trial.state == "complete" and search.spec(trial.params)[1] == encoding]
    pool = sorted(done, key=lambda trial: (trial is not winner, -trial.mean))[:_CANDIDATES]
    if not winner.hidden or len(pool) < 2:
        return None
    if any(outcome.output is None for trial in pool for outcome in trial.outcomes):
        return None
    truth = _truth(search, encoding)
    parts = [torch.stack([_scaled(trial.outcomes[at].output, truth[at]) for trial in pool]) for at in range(len(truth))]
    picks = greedy_picks(torch.cat(parts, dim=1), _join(truth), _loss(truth), _PICKS)
    outputs, saved = [], []
    for at in range(len(truth)):
        others = [number for number in range(len(truth)) if number != at]
        own = greedy_picks(
            torch.cat([parts[i] for i in others], dim=1), _join([truth[i] for i in others]), _loss(truth), _PICKS
        )
        average = torch.stack([parts[at][pick] for pick in own]).mean(0)
        outputs.append(_unscaled(average, truth[at]))
        saved.append(_each(parts[at][0], truth[at]) - _each(average, truth[at]))
    scores = scores_of(search, encoding, outputs)
    step, score_step = _step(torch.cat(saved).numpy()), _step(_score_gain(search, encoding, outputs, winner))
    counted = {at: picks.count(at) for at in dict.fromkeys(picks)}
    better = (step.earned or score_step.earned) and min(step.ratio, score_step.ratio) > -1.0
    return Committee(
        tuple(pool[at] for at in counted), tuple(counted.values()), step, stats.mean(scores), outputs,
        better and len(counted) > 1,
    )  # fmt: skip


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
    search: Search, encoding: Encoding, outputs: Sequence[Tensor], winner: Trial
) -> npt.NDArray[np.float64]:
    """Score of every row less the winner's."""
    average = row_scores(search.problem, search.folds, encoding, [Outcome(output=output) for output in outputs])
    own = row_scores(search.problem, search.folds, encoding, winner.outcomes)
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

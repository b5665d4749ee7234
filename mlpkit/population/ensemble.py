"""Ensembles of a population's members: greedy selection, averages, one module."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError, ShapeError
from mlpkit.population.data import OF_CLASSES, Table, table
from mlpkit.population.population import Population


class Ensemble(nn.Module):
    """The weighted average of several networks over the same inputs.

    x: (..., in_features), of the models' dtype. Returns averaged probabilities for "cross_entropy" and "brier"
    (softmax) and "bce" (sigmoid), averaged numbers otherwise, after exp for a population with log_target. weights: one
    a model, above 0, made to sum to 1. Raises ArgumentError where models and weights do not fit.
    """

    weights: Tensor

    def __init__(
        self, models: Sequence[nn.Module], weights: Sequence[float], *, loss: str, log_target: bool = False
    ) -> None:
        super().__init__()
        if not models or len(models) != len(weights) or not all(weight > 0 for weight in weights):
            raise ArgumentError(
                f"Ensemble: {len(models)} models and weights {list(weights)}; it must be one weight above 0 a model"
            )
        self.models = nn.ModuleList(models)
        self.loss, self.log_target = loss, log_target
        shares = torch.tensor(weights, dtype=torch.float64)
        self.register_buffer("weights", (shares / shares.sum()).to(torch.float32))
        self.ids: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """The average."""
        parts = [scale(model(x), self.loss, self.log_target) for model in self.models]
        total = parts[0] * self.weights[0]
        for part, weight in zip(parts[1:], self.weights[1:], strict=True):
            total = total + part * weight
        return total


def scale(outputs: Tensor, loss: str, log_target: bool) -> Tensor:
    """Outputs on the scale that is averaged: probabilities, or numbers."""
    if loss in OF_CLASSES:
        return outputs.softmax(-1)
    if loss == "bce":
        return outputs.sigmoid()
    return outputs.exp() if log_target else outputs


def greedy(
    population: Population,
    X: Any,
    y: Any,
    *,
    size: int = 20,
    ids: Iterable[int] | None = None,
    weights: str = "best",
    sample_weight: Any = None,
) -> Ensemble:
    """Pick members one by one, each the one whose company helps the average most, with repetition.

    X, y, sample_weight: rows that none of them was trained on. size: picks; the ensemble is the best of its beginnings,
    and a member picked twice weighs twice. ids: candidates; None: all that have not diverged. Judged by the (binary)
    cross-entropy of the averaged probabilities, or by the mean squared error of averaged numbers.
    Caruana et al.: "Ensemble selection from libraries of models", ICML 2004.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ArgumentError(f"greedy: size is {size!r}; it must be an int of at least 1")
    scores = population.scores
    chosen = [i for i in scores if scores[i].status != "diverged"] if ids is None else population._known(ids)
    if not chosen:
        raise ArgumentError("greedy: there are no candidates; every member has diverged")
    rows = table(X, y, sample_weight, population.loss, False, "greedy")
    if rows.target is not None and rows.target.shape[1] != population.out_features:
        raise ShapeError(f"greedy: y has {rows.target.shape[1]} outputs; the members have {population.out_features}")
    raw = population.predict(rows.x, ids=chosen, weights=weights).double()
    parts = raw if population.log_target else scale(raw, population.loss, False)
    picks = greedy_picks(parts, rows, population.loss, size)
    counted = {index: picks.count(index) for index in dict.fromkeys(picks)}
    models = [population.export(chosen[index], weights=weights) for index in counted]
    ensemble = Ensemble(models, list(counted.values()), loss=population.loss, log_target=population.log_target)
    ensemble.ids = tuple(chosen[index] for index in counted)
    return ensemble.eval()


def greedy_picks(parts: Tensor, rows: Table, loss: str, size: int) -> list[int]:
    """Positions in ``parts`` (members, rows, outputs), in the order of picking, up to the best beginning."""
    total = torch.zeros_like(parts[0])
    picks: list[int] = []
    losses: list[float] = []
    for count in range(1, size + 1):
        trial = torch.stack([_loss((total + part) / count, rows, loss) for part in parts])
        trial = torch.where(trial.isnan(), torch.inf, trial)
        best = int(trial.argmin())
        picks.append(best)
        losses.append(float(trial[best]))
        total = total + parts[best]
    return picks[: 1 + losses.index(min(losses))]


def _loss(average: Tensor, rows: Table, loss: str) -> Tensor:
    tiny = torch.finfo(torch.float64).tiny
    if rows.classes is not None:
        each = -average.gather(1, rows.classes.long()[:, None]).clamp(min=tiny).log()[:, 0]
    elif loss == "bce" and rows.target is not None:
        t = rows.target.double()
        each = -(t * average.clamp(min=tiny).log() + (1 - t) * (1 - average).clamp(min=tiny).log()).mean(1)
    else:
        assert rows.target is not None
        each = (average - rows.target.double()).square().mean(1)
    return each.mean() if rows.weights is None else (each * rows.weights).sum() / rows.weights.sum()

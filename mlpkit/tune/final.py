"""From the chosen candidate to the model that predicts: fit on all rows, average, temperature, interval, estimate."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlpkit.errors import NonFiniteError
from mlpkit.tune import stats, trainer
from mlpkit.tune.calibration import fit_temperature
from mlpkit.tune.ensemble import Average, Committee
from mlpkit.tune.evaluate import Search
from mlpkit.tune.honest import Estimate, corrected
from mlpkit.tune.ladder import Climb, Trial
from mlpkit.tune.model import Member, TunedModel
from mlpkit.tune.problem import encode_all, target_scale, target_tensor
from mlpkit.tune.rows import row_scores

_INTERVAL = (0.05, 0.95)


def fit(search: Search, winner: Trial, committee: Committee | None) -> tuple[TunedModel, int]:
    """(the model on all rows, the epochs of the winner's fit); a committee that is better takes the winner's place."""
    problem = search.problem
    spec, encoding = search.spec(winner.params)
    encoder, mean, scale, split = encode_all(problem, encoding)
    used = committee if committee is not None and committee.better else None
    trials, weights = ((winner,), (1,)) if used is None else (used.trials, used.weights)
    specs = [search.spec(trial.params)[0] for trial in trials]
    epochs = [epochs_of(trial) for trial in trials]
    networks = trainer.refit(specs, split, len(problem.target.classes), epochs, threads=search.threads)
    if not all(bool(torch.isfinite(value).all()) for one in networks for value in one.state_dict().values()):
        raise NonFiniteError("tune: the weights became non-finite in the fit on all rows")
    members = [
        Member(own.hidden, own.activation, own.norm, own.dropout, float(weight)) for own, weight in zip(specs, weights)
    ]
    whole: nn.Module = networks[0]
    if used is not None:
        whole = Average(networks, weights, classes=bool(problem.target.classes)).eval()
    temperature, interval = _trust(search, unseen(search, winner, committee))
    model = TunedModel(
        model=whole, task=problem.target.task, target_name=problem.target.name, classes=problem.target.classes,
        columns=problem.columns, encoder=encoder, hidden=spec.hidden, activation=spec.activation, norm=spec.norm,
        dropout=spec.dropout, target_mean=mean, target_scale=scale, log_target=encoding.log_target,
        members=tuple(members) if used is not None else (), temperature=temperature, interval=interval,
    )  # fmt: skip
    return model, epochs_of(winner)


def epochs_of(trial: Trial) -> int:
    """The median of its best epochs over the folds."""
    return round(statistics.median(outcome.best_epoch for outcome in trial.outcomes)) + 1


def estimate(search: Search, climb: Climb, committee: Committee | None = None) -> Estimate | None:
    """The score to expect without the luck of the choice; None where outputs of the test rows are not at hand.

    Of the winner, moved by what a committee in its place gains where it was not chosen.
    """
    rows: list[Any] = []
    depths: list[int] = []
    winner = -1
    for trial in climb.trials:
        if trial.state != "complete":
            continue
        own = row_scores(search.problem, search.folds, search.spec(trial.params)[1], trial.outcomes)
        if own is None:
            return None
        if trial is climb.winner:
            winner = len(rows)
        rows.append(own)
        depths.append(len(trial.hidden))
    if winner < 0:
        return None
    found = corrected(np.stack(rows), depths, winner, climb.winner.scores, search.seed)
    if committee is None or not committee.better:
        return found
    gain = committee.score - stats.mean([outcome.score for outcome in climb.winner.outcomes])
    return Estimate(found.score + gain, found.low + gain, found.high + gain, found.raw + gain, found.optimism)


def unseen(search: Search, winner: Trial, committee: Committee | None) -> tuple[Any, Any] | None:
    """(outputs (rows, out_features), truth (rows,)) of all folds' test rows in a row, by networks that never saw them.

    Logits and class numbers; or numbers in the units of the networks' output. None where outputs were not kept.
    """
    outputs = _outputs(winner, committee if committee is not None and committee.better else None)
    if outputs is None:
        return None
    target, encoding = search.problem.target, search.spec(winner.params)[1]
    truth = []
    for fold in search.folds:
        y = target_tensor(target, *target_scale(target, fold.train, encoding), encoding)[fold.test]
        truth.append(y.numpy() if target.task == "classification" else y[:, 0].double().numpy())
    return torch.cat(outputs).double().numpy(), np.concatenate(truth)


def _outputs(winner: Trial, committee: Committee | None) -> list[Tensor] | None:
    """What the model's forerunners on the folds gave for rows they had not seen."""
    if committee is not None:
        return committee.outputs
    outputs = [outcome.output for outcome in winner.outcomes]
    return None if any(item is None for item in outputs) else [item for item in outputs if item is not None]


def _trust(search: Search, rows: tuple[Any, Any] | None) -> tuple[float, tuple[float, float] | None]:
    """(temperature of classes, 5 % and 95 % quantiles of a number's truth - output) from unseen rows."""
    if rows is None:
        return 1.0, None
    outputs, truth = rows
    if search.problem.target.task == "classification":
        weight = search.problem.weight
        own = None if weight is None else weight[np.concatenate([fold.test for fold in search.folds])]
        return fit_temperature(outputs, truth, own), None
    missed = np.sort(truth - outputs[:, 0])
    # One rank further out than the plain quantile: then a new row falls inside at least 90 % of the time.
    count = len(missed)
    low, high = math.floor(_INTERVAL[0] * (count + 1)) - 1, math.ceil(_INTERVAL[1] * (count + 1)) - 1
    return 1.0, (float(missed[max(low, 0)]), float(missed[min(high, count - 1)]))

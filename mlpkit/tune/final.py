"""From the chosen candidate to the model that predicts: fit on all rows, average, temperature, interval, estimate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlpkit.errors import NonFiniteError
from mlpkit.tune import stats, trainer
from mlpkit.tune.calibration import fit_temperature
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.ensemble import Average, Committee, Sliced
from mlpkit.tune.evaluate import Search, again
from mlpkit.tune.honest import Estimate, corrected
from mlpkit.tune.ladder import Climb, Trial
from mlpkit.tune.model import Member, TunedModel
from mlpkit.tune.problem import encode_all, target_scale, target_tensor
from mlpkit.tune.rows import row_scores
from mlpkit.tune.space import Encoding

_INTERVAL = (0.05, 0.95)


def fit(search: Search, winner: Trial, committee: Committee | None) -> tuple[TunedModel, int]:
    """(the model on all rows, the epochs of the winner's fit); a committee that is better takes the winner's place."""
    problem = search.problem
    encoding = search.spec(winner.params)[1]
    used = committee if committee is not None and committee.better else None
    trials, weights, seeds = ((winner,), (1,), (0,)) if used is None else (used.trials, used.weights, used.seeds)
    specs = [search.spec(trial.params)[0] for trial in trials]
    networks, encoder, inputs = _networks(search, trials, seeds)
    members = [
        Member(own.hidden, own.activation, own.norm, own.dropout, float(weight), part)
        for own, weight, part in zip(specs, weights, inputs)
    ]
    mean, scale = target_scale(problem.target, np.arange(problem.rows), encoding)
    whole: nn.Module = networks[0]
    if used is not None:
        whole = Average(networks, weights, classes=bool(problem.target.classes)).eval()
    kept = tuple(members) if used is not None else ()
    return tuned(search, winner, whole, encoder, mean, scale, kept, *trust(search, winner, committee)), epochs_of(
        winner
    )


def tuned(
    search: Search, winner: Trial, network: nn.Module, encoder: Encoder, mean: float, scale: float,
    members: tuple[Member, ...], temperature: float, interval: tuple[float, float] | None,
) -> TunedModel:  # fmt: skip
    """A network on the encoder's inputs as the model that predicts."""
    problem, (spec, encoding) = search.problem, search.spec(winner.params)
    return TunedModel(
        model=network, task=problem.target.task, target_name=problem.target.name, classes=problem.target.classes,
        columns=problem.columns, encoder=encoder, hidden=spec.hidden, activation=spec.activation, norm=spec.norm,
        dropout=spec.dropout, target_mean=mean, target_scale=scale, log_target=encoding.log_target, members=members,
        temperature=temperature, interval=interval,
    )  # fmt: skip


def _networks(
    search: Search, trials: Sequence[Trial], seeds: Sequence[int]
) -> tuple[list[nn.Module], Encoder, list[tuple[int, int] | None]]:
    """(each trial's network fitted on all rows, the encoder of all of them, which of its inputs each takes)."""
    problem = search.problem
    networks: dict[int, nn.Module] = {}
    encoders: dict[Encoding, Encoder] = {}
    kinds = [search.spec(trial.params)[1] for trial in trials]
    for encoding in dict.fromkeys(kinds):
        encoders[encoding], split = encode_all(problem, encoding)
        own = [number for number, kind in enumerate(kinds) if kind == encoding]
        specs = [again(search.spec(trials[number].params)[0], seeds[number]) for number in own]
        epochs = [epochs_of(trials[number]) for number in own]
        fitted = trainer.refit(specs, split, len(problem.target.classes), epochs, threads=search.threads)
        networks |= dict(zip(own, fitted))
    if not all(bool(torch.isfinite(value).all()) for one in networks.values() for value in one.state_dict().values()):
        raise NonFiniteError("tune: the weights became non-finite in the fit on all rows")
    ordered = [networks[number] for number in range(len(trials))]
    if len(encoders) == 1:
        return ordered, encoders[kinds[0]], [None] * len(trials)
    ends = dict(zip(encoders, np.cumsum([len(encoder.feature_names) for encoder in encoders.values()]).tolist()))
    parts = [(ends[kind] - len(encoders[kind].feature_names), ends[kind]) for kind in kinds]
    sliced: list[nn.Module] = [Sliced(network, *part) for network, part in zip(ordered, parts)]
    return sliced, Encoder.joined(list(encoders.values())), list(parts)


def epochs_of(trial: Trial) -> int:
    """The epochs with the least validation loss on average over the folds; a fold that has stopped keeps its last.

    A fold's own best epoch is noise where its validation rows are few.
    """
    curves = [np.asarray(outcome.validation_loss) for outcome in trial.outcomes if outcome.validation_loss]
    longest = max(map(len, curves))
    held = [np.concatenate([curve, np.full(longest - len(curve), curve[-1])]) for curve in curves]
    return int(np.mean(held, axis=0).argmin()) + 1


def estimate(search: Search, climb: Climb, committee: Committee | None = None) -> Estimate | None:
    """The score to expect without the luck of the choice; None where outputs of the test rows are not at hand.

    Of the winner, moved by what a committee in its place gains where it was not chosen, and by what more rows bring:
    with an error of a + b / rows, training on all rows instead of a share s gains 1 - s of what s gains on half of it
    (Fushiki, 2011, corrects cross-validation so by fewer folds).
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
    found = corrected(np.stack(rows), depths, winner, climb.winner.scores, search.seed, len(search.folds))
    whole = climb.winner.outcomes
    gain = committee.score - _mean(whole) if committee is not None and committee.better else 0.0
    share = np.mean([len(fold.train) for fold in search.folds]) / search.problem.rows
    halved = climb.winner.halved
    more = float(1.0 - share) * max(0.0, _mean(whole) - _mean(halved)) if halved else 0.0
    moved = gain + more
    return Estimate(
        found.score + moved, found.low + moved, found.high + moved, found.raw + gain, found.optimism, more
    )  # fmt: skip


def _mean(outcomes: Sequence[trainer.Outcome]) -> float:
    return stats.mean([outcome.score for outcome in outcomes])


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


def trust(search: Search, winner: Trial, committee: Committee | None) -> tuple[float, tuple[float, float] | None]:
    """(temperature of classes, 5 % and 95 % quantiles of a number's truth - output) from unseen rows."""
    rows = unseen(search, winner, committee)
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

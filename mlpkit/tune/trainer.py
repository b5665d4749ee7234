"""Trains MLPs on folds by the population engine: specs and folds in, scores and curves out. Knows tensors, no tables.

``train_members`` and ``refit`` are all that the rest of tune calls. Every pair of a spec and a fold is a member; those
with the same loss share one population, whose table holds the folds one below the other.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.population import Member, Population
from mlpkit.tune.spec import Spec

__all__ = ["FoldData", "Outcome", "Spec", "Split", "build", "refit", "score_of", "train_members"]

_MAX_EPOCHS = 400
_NOTABLE = 1e-3  # A validation loss that falls by less (nats, or target variances) does not renew the patience.
_MIN_STEPS = 160  # Patience is at least this many optimizer steps: an epoch of a small table is only two or three.
_MOST_OUTPUTS = 2**24  # numbers that are predicted at once


@dataclass(frozen=True)
class Split:
    """Encoded inputs and targets: x (rows, in_features) float32; y int64 classes, or float32 (rows, 1) standardised.

    weight: (rows,) float32 with mean 1, or None where all rows count alike.
    """

    x: Tensor
    y: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class FoldData:
    """The three parts of one fold, encoded by what the train part alone taught the encoder."""

    train: Split
    validation: Split
    test: Split


@dataclass
class Outcome:
    """One spec on one fold. Losses are per epoch; ``best_epoch`` (0-based) is the one whose weights were scored.

    stopped: "patience", "epochs", "diverged", "clock" or "not started". seconds: of the one thread that trained it.
    output: what the scored weights give on the fold's test rows, (rows, out_features) float32.
    """

    score: float = math.nan
    train_score: float = math.nan
    best_epoch: int = 0
    stopped: str = ""
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    output: Tensor | None = field(default=None, repr=False, compare=False)

    @property
    def finished(self) -> bool:
        """True if the fold has a score: it neither diverged nor ran out of time."""
        return math.isfinite(self.score)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without ``output``."""
        return {item.name: getattr(self, item.name) for item in fields(self) if item.name != "output"}


Report = Callable[[int, int, Outcome], None]
Place = tuple[int, int]  # number of a spec, number of a fold


def train_members(
    specs: Sequence[Spec],
    folds: Sequence[FoldData],
    out_features: int,
    *,
    deadline: float = math.inf,
    keep_at_deadline: bool = False,
    on_fold: Report | None = None,
    first_fold: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    threads: int | None = None,
) -> list[list[Outcome]]:
    """Train every spec on every fold; out_features 0 means regression (R2), else classes (accuracy).

    deadline: a time of ``clock``, in seconds; looked at ten times a second, between epochs. A fold that meets it has no
    score, unless keep_at_deadline: then its best weights so far are scored and ``stopped`` is "clock"; all folds go on
    side by side, and each is trained for an epoch at least. A fold in which anything turns non-finite is "diverged"
    and has no score, and the later folds of its spec are left out. A later spec that the deadline finds untouched is
    "not started".
    first_fold: the number of folds[0], so that a fold trained later draws what it would have drawn at once. threads:
    that train members side by side; None is torch's number. No result depends on it.
    """
    found: dict[Place, Outcome] = {}
    numbered = [replace(spec, seed=spec.seed + first_fold) for spec in specs]
    groups = list(_groups(numbered, folds, out_features, threads))
    for number, group in enumerate(groups):
        now = clock()
        if keep_at_deadline:
            limit = now + (deadline - now) / (len(groups) - number)
            _train_side_by_side(group.population, lambda limit=limit: clock() > limit)  # type: ignore[misc]
        elif now <= deadline:
            group.population.train(_MAX_EPOCHS, stop=lambda: clock() > deadline, longest_first=False)
        found |= group.outcomes(folds, keep_at_deadline)
    return [_of_spec(number, len(folds), found, on_fold) for number in range(len(specs))]


def refit(
    specs: Sequence[Spec], data: Split, out_features: int, epochs: Sequence[int], *, threads: int | None = None,
    stop: Callable[[], bool] | None = None,
) -> list[nn.Module]:  # fmt: skip
    """Train each spec on all of ``data`` for its number of epochs and return the models in eval mode.

    The weights are those of the epoch with the least loss on ``data``: the last may be one in which a constant learning
    rate threw the network out of its valley. threads: that train them side by side; None is torch's number. stop: says
    that no further epoch is to begin.
    """
    networks: dict[int, nn.Module] = {}
    for loss in dict.fromkeys(_loss(spec, out_features) for spec in specs):
        numbers = [number for number, spec in enumerate(specs) if _loss(spec, out_features) == loss]
        wanted = {index: max(1, epochs[number]) for index, number in enumerate(numbers)}
        members = [
            replace(_member(specs[number]), epochs=max(specs[number].epochs, wanted[index]))
            for index, number in enumerate(numbers)
        ]
        table = (data.x, data.y, data.weight)
        population = Population(
            members, data.x, data.y, loss=loss, sample_weight=data.weight, progress=False, threads=threads,
            out_features=out_features or None, validation=table,
        )  # fmt: skip
        # Schedules follow a member's own epochs: it is dropped when it has had its number of them.
        done = 0
        for end in sorted(set(wanted.values())):
            population.train(end - done, stop=stop)
            done = end
            population.drop(index for index, last in wanted.items() if last == end)
        networks |= {number: population.export(index, weights="best") for index, number in enumerate(numbers)}
    return [networks[number] for number in range(len(specs))]


def fit_until(
    spec: Spec, data: Split, out_features: int, rows: Any, validation_rows: Any, *, stop: Callable[[], bool],
    threads: int | None = None,
) -> tuple[nn.Module, int]:  # fmt: skip
    """Train one spec on some rows of ``data``; (its best epoch's model, how many epochs that is).

    rows, validation_rows: their numbers. stop: says that no further epoch is to begin.
    """
    member = replace(
        _member(spec), patience=_patience(spec, len(rows)), rows=torch.from_numpy(rows).int(),
        validation_rows=torch.from_numpy(validation_rows).int(),
    )  # fmt: skip
    population = Population(
        [member], data.x, data.y, loss=_loss(spec, out_features), sample_weight=data.weight, progress=False,
        threads=threads, out_features=out_features or None,
    )  # fmt: skip
    population.train(_MAX_EPOCHS, stop=stop)
    return population.export(0, weights="best"), (population.scores[0].best_epoch or 0) + 1


def build(spec: Spec, in_features: int, out_features: int) -> nn.Module:
    """The network itself; regression (out_features 0) has one output."""
    from mlpkit.nn import MLP

    dropout = spec.dropout if isinstance(spec.dropout, float | int) else tuple(spec.dropout)
    model: nn.Module = MLP(
        in_features, spec.hidden, max(1, out_features), activation=spec.activation, dropout=dropout, norm=spec.norm,
        init=spec.init,
    )  # fmt: skip
    return model


def score_of(output: Tensor, y: Tensor, weight: Tensor | None = None) -> float:
    """Accuracy for class targets, R2 for float targets. R2 of a constant target is 1 if it is met, else 0."""
    share = torch.ones(len(y), dtype=torch.float64) if weight is None else weight.double()
    share = share / share.sum()
    if y.dtype == torch.int64:
        return float(((output.argmax(1) == y).double() * share).sum())
    share = share[:, None]
    residual = float(((output.double() - y.double()).square() * share).sum())
    total = float(((y.double() - (y.double() * share).sum()).square() * share).sum())
    if total == 0.0:
        return 1.0 if residual == 0.0 else 0.0
    return 1.0 - residual / total


@dataclass
class _Group:
    """Members of one population, and which spec and fold each of them is."""

    population: Population
    places: list[Place]

    def outcomes(self, folds: Sequence[FoldData], keep: bool) -> dict[Place, Outcome]:
        """What came of every member; ``keep``: those that the clock stopped are scored too."""
        found = {place: _outcome(scores) for place, scores in zip(self.places, self.population.scores.values())}
        for number, fold in enumerate(folds):
            scored = [
                index
                for index, place in enumerate(self.places)
                if place[1] == number and found[place].stopped in ("patience", "epochs", *(("clock",) if keep else ()))
            ]
            for index, output in self._outputs(scored, fold.test.x):
                outcome = found[self.places[index]]
                outcome.output = output
                outcome.score = score_of(output, fold.test.y, fold.test.weight)
            for index, output in self._outputs(scored, fold.train.x):
                found[self.places[index]].train_score = score_of(output, fold.train.y, fold.train.weight)
        return found

    def _outputs(self, ids: Sequence[int], x: Tensor) -> Iterator[tuple[int, Tensor]]:
        at_once = max(1, _MOST_OUTPUTS // (len(x) * self.population.out_features))
        for first in range(0, len(ids), at_once):
            part = ids[first : first + at_once]
            yield from zip(part, self.population.predict(x, ids=part))


def _groups(
    specs: Sequence[Spec], folds: Sequence[FoldData], out_features: int, threads: int | None
) -> Iterator[_Group]:
    """One population for each loss; folds whose encoders made different numbers of columns are apart too."""
    kinds: dict[tuple[str, int], list[Place]] = {}
    for place in product(range(len(specs)), range(len(folds))):
        key = _loss(specs[place[0]], out_features), folds[place[1]].train.x.shape[1]
        kinds.setdefault(key, []).append(place)
    for (loss, _), places in kinds.items():
        used = sorted({fold for _, fold in places})
        table, settings, rows = _table([folds[fold] for fold in used])
        members = []
        for spec, fold in places:
            seeded = replace(specs[spec], seed=specs[spec].seed + fold)
            patience = _patience(seeded, len(folds[fold].train.x))
            members.append(replace(_member(seeded), patience=patience, **rows[used.index(fold)]))
        population = Population(
            members, table.x, table.y, loss=loss, sample_weight=table.weight, progress=False, threads=threads,
            out_features=out_features or None, **settings,
        )  # fmt: skip
        yield _Group(population, places)


def _table(folds: Sequence[FoldData]) -> tuple[Split, dict[str, Any], list[dict[str, Any]]]:
    """(table, settings of the population, rows of a member of each fold) over the folds' train and validation parts."""
    if len(folds) == 1:
        other = folds[0].validation
        return folds[0].train, {"validation": (other.x, other.y, other.weight)}, [{}]
    parts = [part for fold in folds for part in (fold.train, fold.validation)]
    weights = [part.weight for part in parts if part.weight is not None]
    table = Split(
        torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]),
        torch.cat(weights) if weights else None,
    )  # fmt: skip
    rows, end = [], 0
    for fold in folds:
        begin, middle = end, end + len(fold.train.x)
        end = middle + len(fold.validation.x)
        every = torch.arange(begin, end, dtype=torch.int32)
        rows.append({"rows": every[: middle - begin], "validation_rows": every[middle - begin :]})
    return table, {}, rows


def _member(spec: Spec) -> Member:
    with_betas = spec.optimizer in ("adam", "adamw")
    # A batch norm cannot learn from single rows.
    least = 2 if spec.norm == "batch" and spec.hidden else 1
    return Member(
        spec.hidden, activation=spec.activation, dropout=spec.dropout, norm=spec.norm, init=spec.init,
        optimizer=spec.optimizer, lr=spec.lr, weight_decay=spec.weight_decay, l1=spec.l1,
        batch_size=max(least, spec.batch_size), epochs=spec.epochs, seed=spec.seed,
        momentum=0.0 if with_betas else spec.momentum, betas=(spec.beta1, spec.beta2),
        label_smoothing=spec.label_smoothing, min_delta=_NOTABLE, schedule=spec.schedule, floor=spec.lr_decay,
        **_decay(spec),
    )  # fmt: skip


def _decay(spec: Spec) -> dict[str, Any]:
    if spec.schedule == "exponential":
        return {"gamma": spec.lr_decay ** (1.0 / spec.epochs)}
    return {"gamma": 0.1, "every": math.ceil(spec.epochs / 3)} if spec.schedule == "step" else {}


def _patience(spec: Spec, rows: int) -> int | None:
    if spec.patience is None or spec.schedule == "coslog4":  # The loss rises with the rate in each cycle.
        return None
    return max(spec.patience, math.ceil(_MIN_STEPS / math.ceil(rows / spec.batch_size)))


def _loss(spec: Spec, out_features: int) -> str:
    if out_features:
        return "brier" if spec.loss == "squared" else "cross_entropy"
    return spec.loss or "mse"


def _train_side_by_side(population: Population, late: Callable[[], bool]) -> None:
    """All members to their end, or until it is late, at nearly the same epoch each."""
    done, more = 0, 1
    while population.alive and done < _MAX_EPOCHS and not (done and late()):
        more = min(more, _MAX_EPOCHS - done)
        population.train(more, stop=late if done else None)
        done, more = done + more, 2 * more


def _outcome(scores: Any) -> Outcome:
    """Without scores; "not started" where nothing was trained."""
    pairs = list(zip(scores.train_loss, scores.validation_loss))
    finite = [all(map(math.isfinite, pair)) for pair in pairs]
    kept = pairs[: finite.index(False)] if False in finite else pairs
    stopped = scores.status
    if scores.skipped or len(kept) < len(pairs):
        stopped = "diverged"
    elif stopped == "alive":
        stopped = "not started" if not pairs else "epochs" if len(pairs) >= _MAX_EPOCHS else "clock"
    return Outcome(
        best_epoch=scores.best_epoch or 0, stopped=stopped, seconds=scores.seconds,
        train_loss=[pair[0] for pair in kept], validation_loss=[pair[1] for pair in kept],
    )  # fmt: skip


def _of_spec(number: int, folds: int, found: dict[Place, Outcome], on_fold: Report | None) -> list[Outcome]:
    """The outcomes of a spec, up to the first fold that did not finish."""
    outcomes: list[Outcome] = []
    for fold in range(folds):
        outcome = found[number, fold]
        if outcome.stopped == "not started" and (outcomes or number == 0):
            outcome.stopped = "clock"
        outcomes.append(outcome)
        if on_fold is not None and outcome.stopped != "not started":
            on_fold(number, fold, outcome)
        if not outcome.finished:
            break
    return outcomes

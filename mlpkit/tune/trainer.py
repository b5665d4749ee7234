"""Trains MLPs on folds, one after the other: specs and folds in, scores and curves out. Knows tensors, no tables.

``train_members`` and ``refit`` are all that the rest of tune calls, so that another engine can take their place: a
``Spec`` has the fields of ``population.Member``, a fold is a table of rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlpkit.tune.spec import Spec, lr_factor

__all__ = ["FoldData", "Outcome", "Spec", "Split", "build", "refit", "score_of", "train_members"]

_MAX_EPOCHS = 400
_NOTABLE = 1e-3  # A validation loss that falls by less (nats, or target variances) does not renew the patience.
_MIN_STEPS = 160  # Patience is at least this many optimizer steps: an epoch of a small table is only two or three.


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

    stopped: "patience", "epochs", "diverged", "clock" or "not started". output: what the scored weights give on the
    fold's test rows, (rows, out_features) float32.
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
) -> list[list[Outcome]]:
    """Train every spec on every fold; out_features 0 means regression (R2), else classes (accuracy).

    deadline: a time of ``clock``, in seconds. A fold that meets it has no score, unless keep_at_deadline: then its
    best weights so far are scored and ``stopped`` is "clock", and every fold gets its share of the time left.
    A fold whose loss turns non-finite is "diverged" and has no score, and the later folds of its spec are left out.
    A later spec that the deadline finds untouched is "not started".
    first_fold: the number of folds[0], so that a fold trained later draws what it would have drawn at once.
    """
    results = []
    for number, spec in enumerate(specs):
        outcomes = []
        for index, data in enumerate(folds):
            now = clock()
            limit = now + (deadline - now) / (len(folds) - index) if keep_at_deadline else deadline
            if index == 0 and number > 0 and now > limit and not keep_at_deadline:
                outcomes.append(Outcome(stopped="not started"))
                break
            own = replace(spec, seed=spec.seed + first_fold + index)
            outcome = _train_fold(own, data, out_features, limit, keep_at_deadline, clock)
            outcomes.append(outcome)
            if on_fold is not None:
                on_fold(number, index, outcome)
            if not outcome.finished:
                break
        results.append(outcomes)
    return results


def refit(spec: Spec, data: Split, out_features: int, epochs: int) -> nn.Module:
    """Train ``spec`` on all of ``data`` for a fixed number of epochs and return the model in eval mode."""
    with _own_randomness(spec.seed):
        model = build(spec, data.x.shape[1], out_features)
        optimizer = _optimizer(model, spec)
        order = torch.Generator().manual_seed(spec.seed)
        for epoch in range(max(1, epochs)):
            _epoch(model, optimizer, data, spec, epoch, order)
    return model.eval()


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


def _train_fold(
    spec: Spec, data: FoldData, out_features: int, limit: float, keep: bool, clock: Callable[[], float]
) -> Outcome:
    outcome, start = Outcome(), time.perf_counter()
    steps = math.ceil(len(data.train.x) / spec.batch_size)
    patience = math.inf if spec.patience is None else max(spec.patience, math.ceil(_MIN_STEPS / steps))
    with _own_randomness(spec.seed):
        model = build(spec, data.train.x.shape[1], out_features)
        optimizer = _optimizer(model, spec)
        order = torch.Generator().manual_seed(spec.seed)
        best, best_state, mark, waited = math.inf, _copy(model), math.inf, 0
        outcome.stopped = "epochs"
        for epoch in range(min(spec.epochs, _MAX_EPOCHS)):
            train_loss = _epoch(model, optimizer, data.train, spec, epoch, order)
            loss = _loss(_forward(model, data.validation.x), data.validation, spec).item()
            if not (math.isfinite(train_loss) and math.isfinite(loss)):
                outcome.stopped = "diverged"
                break
            outcome.train_loss.append(train_loss)
            outcome.validation_loss.append(loss)
            if loss < mark - _NOTABLE:
                mark, waited = loss, 0
            else:
                waited += 1
            if loss < best:
                best, outcome.best_epoch, best_state = loss, epoch, _copy(model)
            if waited >= patience:
                outcome.stopped = "patience"
                break
            if clock() > limit:
                outcome.stopped = "clock"
                break
        if outcome.stopped != "diverged" and (keep or outcome.stopped != "clock"):
            model.load_state_dict(best_state)
            outcome.output = _forward(model, data.test.x)
            outcome.score = score_of(outcome.output, data.test.y, data.test.weight)
            outcome.train_score = score_of(_forward(model, data.train.x), data.train.y, data.train.weight)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _epoch(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, spec: Spec, epoch: int, order: torch.Generator
) -> float:
    """One pass over the rows in a drawn order; returns the mean loss."""
    model.train()
    rows = len(data.x)
    permutation = torch.randperm(rows, generator=order)
    shuffled = Split(
        data.x[permutation], data.y[permutation], None if data.weight is None else data.weight[permutation]
    )
    decayed = [value for value in model.parameters() if value.dim() > 1] if spec.l1 > 0.0 else []
    total = torch.zeros((), dtype=torch.float64)
    for start, stop in _batches(rows, spec.batch_size, alone=spec.norm != "batch"):
        _set_lr(optimizer, spec, epoch + start / rows)
        batch = _part(shuffled, start, stop)
        loss = _loss(model(batch.x), batch, spec, spec.label_smoothing)
        total += loss.detach() * len(batch.x)
        if decayed:
            loss = loss + spec.l1 * sum(value.abs().sum() for value in decayed)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return float(total) / rows


def _batches(rows: int, size: int, *, alone: bool) -> list[tuple[int, int]]:
    """(start, stop) of every batch; a last row by itself joins its neighbours unless ``alone``: it has no variance."""
    bounds = [(start, min(start + size, rows)) for start in range(0, rows, size)]
    if not alone and len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] == 1:
        bounds[-2:] = [(bounds[-2][0], rows)]
    return bounds


def _part(data: Split, start: int, stop: int) -> Split:
    return Split(data.x[start:stop], data.y[start:stop], None if data.weight is None else data.weight[start:stop])


def _set_lr(optimizer: torch.optim.Optimizer, spec: Spec, epochs_done: float) -> None:
    if spec.schedule != "constant":
        factor = lr_factor(spec.schedule, min(epochs_done / spec.epochs, 1.0), spec.lr_decay)
        for group in optimizer.param_groups:
            group["lr"] = spec.lr * factor


def _optimizer(model: nn.Module, spec: Spec) -> torch.optim.Optimizer:
    parameters = model.parameters()
    shared: dict[str, Any] = {"lr": spec.lr, "weight_decay": spec.weight_decay}
    if spec.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=spec.momentum, fused=True, **shared)
    if spec.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, momentum=spec.momentum, **shared)
    kind = torch.optim.Adam if spec.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, betas=(spec.beta1, spec.beta2), fused=True, **shared)


def _loss(output: Tensor, data: Split, spec: Spec, smoothing: float = 0.0) -> Tensor:
    y, weight = data.y, data.weight
    if y.dtype != torch.int64:
        each = _NUMBER_LOSS[spec.loss or "mse"](output, y, reduction="none")[:, 0]
    elif spec.loss == "squared":
        each = (output.softmax(1) - F.one_hot(y, output.shape[1])).square().sum(1)
    else:
        return _mean(F.cross_entropy(output, y, reduction="none", label_smoothing=smoothing), weight)
    return _mean(each, weight)


_NUMBER_LOSS: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "huber": F.smooth_l1_loss, "l1": F.l1_loss}


def _mean(each: Tensor, weight: Tensor | None) -> Tensor:
    return each.mean() if weight is None else (each * weight).mean()


def _forward(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        output: Tensor = model(x)
    return output


def _copy(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Weights and dropout draw from torch's generator: seed it here and give it back as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield

"""Trains MLPs on folds, one after the other: specs and folds in, scores and curves out. Knows tensors, no tables.

``train_members`` and ``refit`` are all that the rest of tune calls, so that another engine can take their place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_MAX_EPOCHS = 400
_NOTABLE = 1e-3  # A validation loss that falls by less (nats, or target variances) does not renew the patience.
_MIN_STEPS = 160  # Patience is at least this many optimizer steps: an epoch of a small table is only two or three.


@dataclass(frozen=True)
class Spec:
    """One MLP and how it is trained. ``seed + fold`` draws its weights and the order of its batches."""

    hidden: tuple[int, ...]
    lr: float
    weight_decay: float
    batch_size: int
    seed: int
    activation: str = "relu"
    patience: int = 10


@dataclass(frozen=True)
class Split:
    """Encoded inputs and targets: x (rows, in_features) float32; y int64 classes, or float32 (rows, 1) standardised."""

    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class FoldData:
    """The three parts of one fold, encoded by what the train part alone taught the encoder."""

    train: Split
    validation: Split
    test: Split


@dataclass
class Outcome:
    """One spec on one fold. Losses are per epoch; ``best_epoch`` (0-based) is the one whose weights were scored."""

    score: float = math.nan
    train_score: float = math.nan
    best_epoch: int = 0
    stopped: str = ""
    seconds: float = 0.0
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """True if the fold has a score: it neither diverged nor ran out of time."""
        return math.isfinite(self.score)


Report = Callable[[int, int, Outcome], None]


def train_members(
    specs: Sequence[Spec],
    folds: Sequence[FoldData],
    out_features: int,
    *,
    deadline: float = math.inf,
    keep_at_deadline: bool = False,
    on_fold: Report | None = None,
) -> list[list[Outcome]]:
    """Train every spec on every fold; out_features 0 means regression (R2), else classes (accuracy).

    deadline: a time of ``time.perf_counter``. A fold that meets it has no score, unless keep_at_deadline: then its
    best weights so far are scored and ``stopped`` is "clock", and every fold gets its share of the time left.
    A fold whose loss turns non-finite is "diverged" and has no score.
    """
    results = []
    for number, spec in enumerate(specs):
        outcomes = []
        for index, data in enumerate(folds):
            now = time.perf_counter()
            limit = now + (deadline - now) / (len(folds) - index) if keep_at_deadline else deadline
            outcome = _train_fold(replace(spec, seed=spec.seed + index), data, out_features, limit, keep_at_deadline)
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
        model = build(spec.hidden, spec.activation, data.x.shape[1], out_features)
        optimizer = _optimizer(model, spec)
        order = torch.Generator().manual_seed(spec.seed)
        for _ in range(max(1, epochs)):
            _epoch(model, optimizer, data, spec.batch_size, order)
    return model.eval()


def build(hidden: tuple[int, ...], activation: str, in_features: int, out_features: int) -> nn.Module:
    """The network itself; regression (out_features 0) has one output."""
    from mlpkit.nn import MLP

    model: nn.Module = MLP(in_features, hidden, max(1, out_features), activation=activation)
    return model


def score_of(output: Tensor, y: Tensor) -> float:
    """Accuracy for class targets, R2 for float targets. R2 of a constant target is 1 if it is met, else 0."""
    if y.dtype == torch.int64:
        return float((output.argmax(1) == y).double().mean())
    residual = float((output.double() - y.double()).square().sum())
    total = float((y.double() - y.double().mean()).square().sum())
    if total == 0.0:
        return 1.0 if residual == 0.0 else 0.0
    return 1.0 - residual / total


def _train_fold(spec: Spec, data: FoldData, out_features: int, limit: float, keep: bool) -> Outcome:
    outcome, start = Outcome(), time.perf_counter()
    steps = math.ceil(len(data.train.x) / spec.batch_size)
    patience = max(spec.patience, math.ceil(_MIN_STEPS / steps))
    with _own_randomness(spec.seed):
        model = build(spec.hidden, spec.activation, data.train.x.shape[1], out_features)
        optimizer = _optimizer(model, spec)
        order = torch.Generator().manual_seed(spec.seed)
        best, best_state, mark, waited = math.inf, _copy(model), math.inf, 0
        outcome.stopped = "epochs"
        for epoch in range(_MAX_EPOCHS):
            train_loss = _epoch(model, optimizer, data.train, spec.batch_size, order)
            loss = _loss(_forward(model, data.validation.x), data.validation.y).item()
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
            if time.perf_counter() > limit:
                outcome.stopped = "clock"
                break
        if outcome.stopped != "diverged" and (keep or outcome.stopped != "clock"):
            model.load_state_dict(best_state)
            outcome.score = score_of(_forward(model, data.test.x), data.test.y)
            outcome.train_score = score_of(_forward(model, data.train.x), data.train.y)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _epoch(model: nn.Module, optimizer: torch.optim.Optimizer, data: Split, size: int, order: torch.Generator) -> float:
    model.train()
    rows = len(data.x)
    permutation = torch.randperm(rows, generator=order)
    x, y = data.x[permutation], data.y[permutation]
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, rows, size):
        batch = y[start : start + size]
        loss = _loss(model(x[start : start + size]), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        total += loss.detach() * len(batch)
    return float(total) / rows


def _optimizer(model: nn.Module, spec: Spec) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=spec.lr, weight_decay=spec.weight_decay, fused=True)


def _loss(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y) if y.dtype == torch.int64 else F.mse_loss(output, y)


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

"""What one member is: its network, and how it is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlpkit import init
from mlpkit.errors import ArgumentError
from mlpkit.nn.layers import ACTIVATIONS

NORMS = ("batch", "layer")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("constant", "cosine", "step", "exponential", "one_cycle", "coslog4")
PRECISIONS = ("fp32", "bf16")
MOST_LAYERS = 63  # hidden ones
MOST_EPOCHS = 2**31 - 1
# What ``Population.set`` may change: the rest decides what the member's memory holds.
CHANGEABLE = (
    "lr", "dropout", "weight_decay", "l1", "momentum", "clip_norm", "label_smoothing", "schedule", "warmup", "gamma",
    "every", "floor", "batch_size", "epochs", "patience", "min_delta",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Member:
    """One MLP of a population and the recipe of its training; members may differ in everything.

    hidden, activation, dropout, norm, init: as ``nn.MLP`` takes them. The weights are those of ``nn.MLP`` after
    ``reset_parameters(generator=torch.Generator().manual_seed(seed))``.

    optimizer: "sgd", "adam", "adamw" or "rmsprop", with the formulas of ``torch.optim``; ``momentum`` and ``nesterov``
    are sgd's (rmsprop has momentum too), ``betas`` adam's and adamw's, ``alpha`` rmsprop's. weight_decay is decoupled
    for adamw and added to the gradient elsewhere. l1: ``l1 * sign(w)`` is added to the gradient of every parameter.
    clip_norm: gradients are scaled down to this 2-norm.

    schedule: how ``lr`` moves, by steps. "constant"; "cosine" to ``floor * lr`` at the last epoch; "step" by ``gamma``
    every ``every`` epochs; "exponential" by ``gamma`` every epoch; "one_cycle" up from lr / 25 in 0.3 of the steps,
    then down to lr / 250000, ``lr`` being the top (Smith and Topin, 2018); "coslog4": four cycles of
    lr (1 - cos(2 pi log2(1 + 15 t))) / 2 with t the share of the steps that is done (Holzmueller et al., 2024).
    warmup: epochs of a linear rise before.

    batch_size: rows a step; the last batch of an epoch may be smaller. With a batch norm a last batch of one row is
    left out, since it has no deviation. The order of the rows is drawn anew each epoch from ``seed``.

    epochs, patience, min_delta: training ends after ``epochs``, or after ``patience`` epochs in which the metric on the
    validation rows did not improve by more than min_delta. The weights of the best epoch are kept.

    precision: "fp32", or "bf16": inputs, weights and activations are rounded to bfloat16 before they are multiplied,
    sums, parameters and optimizer in float32. seed: of weights, order of rows and dropout masks.

    rows: indices into X that the member is trained on (a fold); None: all. validation_rows: indices into X that it is
    validated on; None: as the population says.
    Raises ArgumentError naming the field, what it was and what it must be.
    """

    hidden: Sequence[int] = ()
    activation: str = "relu"
    dropout: float | Sequence[float] = 0.0
    norm: str | None = None
    init: str = "xavier_uniform"
    optimizer: str = "adam"
    lr: float = 1e-3
    schedule: str = "constant"
    weight_decay: float = 0.0
    l1: float = 0.0
    batch_size: int = 64
    epochs: int = 30
    patience: int | None = None
    precision: str = "fp32"
    seed: int = 0
    rows: Any = None
    validation_rows: Any = None
    momentum: float = 0.0
    nesterov: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    alpha: float = 0.99
    eps: float = 1e-8
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    warmup: float = 0.0
    gamma: float = 0.9
    every: int = 10
    floor: float = 0.0
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        _network(self)
        _optimizer(self)
        _schedule(self)
        for name in ("batch_size", "epochs"):
            _whole(name, getattr(self, name), 1, MOST_EPOCHS)
        if self.patience is not None:
            _whole("patience", self.patience, 1, MOST_EPOCHS)
        _number("min_delta", self.min_delta, 0.0)
        _number("label_smoothing", self.label_smoothing, 0.0, 1.0)
        _whole("seed", self.seed, 0, 2**63 - 1)

    @property
    def rates(self) -> tuple[float, ...]:
        """The dropout of each hidden layer."""
        if isinstance(self.dropout, (int, float)):
            return (float(self.dropout),) * len(self.hidden)
        return tuple(float(rate) for rate in self.dropout)


def refuse(field: str, value: object, must: str) -> ArgumentError:
    """The error for a field of a member."""
    return ArgumentError(f"Member: {field} is {value!r}; it must be {must}")


def _network(m: Member) -> None:
    if not _listed(m.hidden) or len(m.hidden) > MOST_LAYERS:
        raise refuse("hidden", m.hidden, f"up to {MOST_LAYERS} widths such as (64, 32), or () for a linear model")
    for index, width in enumerate(m.hidden):
        _whole(f"hidden[{index}]", width, 1, 2**20)
    _choice("activation", m.activation, ACTIVATIONS)
    _choice("init", m.init, init.NAMES)
    if m.norm is not None:
        _choice("norm", m.norm, NORMS, ", None")
    if m.precision == "fp16":
        raise refuse("precision", m.precision, "fp32 or bf16 (processors have no kernel that gains by fp16)")
    _choice("precision", m.precision, PRECISIONS)
    if not isinstance(m.dropout, (int, float)) and not _listed(m.dropout):
        raise refuse("dropout", m.dropout, "a probability in [0, 1], or one for each hidden layer")
    if isinstance(m.dropout, Sequence) and len(m.dropout) != len(m.hidden):
        raise refuse("dropout", m.dropout, f"a probability, or one for each hidden layer ({len(m.hidden)})")
    for rate in m.dropout if isinstance(m.dropout, Sequence) else (m.dropout,):
        _number("dropout", rate, 0.0, 1.0)


def _optimizer(m: Member) -> None:
    _choice("optimizer", m.optimizer, OPTIMIZERS)
    for name in ("lr", "weight_decay", "l1"):
        _number(name, getattr(m, name), 0.0)
    _number("momentum", m.momentum, 0.0, below=1.0)
    if m.momentum and m.optimizer not in ("sgd", "rmsprop"):
        raise refuse("momentum", m.momentum, f"0 for {m.optimizer}, whose betas play its part")
    if m.nesterov and not (m.optimizer == "sgd" and m.momentum > 0):
        raise refuse("nesterov", m.nesterov, "False, or the optimizer sgd with a momentum above 0")
    if not isinstance(m.betas, Sequence) or len(m.betas) != 2:
        raise refuse("betas", m.betas, "two numbers in [0, 1)")
    for name, value in (("betas", m.betas[0]), ("betas", m.betas[1]), ("alpha", m.alpha)):
        _number(name, value, 0.0, below=1.0)
    _number("eps", m.eps, 0.0)
    if m.eps == 0:
        raise refuse("eps", m.eps, "above 0, since a parameter without a gradient would be divided by it")
    if m.clip_norm is not None:
        _number("clip_norm", m.clip_norm, 0.0)
        if m.clip_norm == 0:
            raise refuse("clip_norm", m.clip_norm, "above 0, or None for no clipping")


def _schedule(m: Member) -> None:
    _choice("schedule", m.schedule, SCHEDULES)
    _number("warmup", m.warmup, 0.0)
    if m.warmup and m.schedule == "one_cycle":
        raise refuse("warmup", m.warmup, "0 with the schedule one_cycle, which has its own")
    _number("gamma", m.gamma, 0.0)
    _whole("every", m.every, 1, MOST_EPOCHS)
    _number("floor", m.floor, 0.0, 1.0)


def _listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _choice(field: str, value: object, known: Sequence[str], also: str = "") -> None:
    if not isinstance(value, str) or value not in known:
        raise refuse(field, value, f"one of {', '.join(known)}{also}")


def _whole(field: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise refuse(field, value, f"an int from {least} to {most}")


def _number(field: str, value: object, least: float, most: float = math.inf, below: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise refuse(field, value, "a finite number")
    if not (least <= value <= most and value < below):
        end = f" and at most {most:g}" if most < math.inf else f" and below {below:g}" if below < math.inf else ""
        raise refuse(field, value, f"at least {least:g}{end}")

"""The dynamic loss scale of fp16 training, with a floor, a ceiling and a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from mlpkit.errors import ArgumentError

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class ScaleChange:
    """One change of the loss scale: at which step, from what to what; ``growth | backoff | underflow``."""

    step: int
    before: float
    after: float
    reason: str


class OnDevice(Protocol):
    """A scale and its clean steps as tensors of one number."""

    value: Tensor
    clean_steps: Tensor


class LossScale:
    """A loss scale that halves when scaled gradients overflow and doubles after a run of clean steps.

    Micikevicius et al. (2018), "Mixed precision training"; the rule of ``torch.amp.GradScaler`` with bounds: floor and
    ceiling default to 1 and 2^24, and 1/scale must be a normal fp32 number. ``changes`` records growth and back-off.
    Raises ArgumentError naming the argument, what it was and what it must be.
    """

    def __init__(
        self,
        init: float = 65536.0,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        growth_interval: int = 2000,
        floor: float = 1.0,
        ceiling: float = 2.0**24,
    ) -> None:
        for name, value in (("init", init), ("floor", floor), ("ceiling", ceiling)):
            check_scale(f"LossScale: {name}", value)
        if not floor <= init <= ceiling:
            raise ArgumentError(
                f"LossScale: init is {init!r}; it must lie between floor {floor!r} and ceiling {ceiling!r}"
            )
        check_rule("LossScale", growth=growth, backoff=backoff, growth_interval=growth_interval)
        self._lent: OnDevice | None = None
        self._value, self._clean_steps = float(init), 0
        self.growth, self.backoff, self.growth_interval = growth, backoff, growth_interval
        self.floor, self.ceiling = float(floor), float(ceiling)
        self.changes: list[ScaleChange] = []

    @property
    def value(self) -> float:
        """The scale itself; syncs where a device moves it."""
        return self._value if self._lent is None else self._lent.value.item()

    @value.setter
    def value(self, value: float) -> None:
        self._value = value
        if self._lent is not None:
            self._lent.value.fill_(value)

    @property
    def clean_steps(self) -> int:
        """Since it changed; syncs where a device counts them."""
        return self._clean_steps if self._lent is None else int(self._lent.clean_steps.item())

    @clean_steps.setter
    def clean_steps(self, count: int) -> None:
        self._clean_steps = count
        if self._lent is not None:
            self._lent.clean_steps.fill_(count)

    def lend(self, to: OnDevice) -> None:
        """From now on a device moves it, by the same rule; such changes are not in ``changes``."""
        to.value.fill_(self.value)
        to.clean_steps.fill_(self.clean_steps)
        self._lent = to

    def __getstate__(self) -> dict[str, Any]:
        """A copy is its own again."""
        return {**self.__dict__, "_value": self.value, "_clean_steps": self.clean_steps, "_lent": None}

    def step_taken(self, step: int) -> None:
        """Count a clean step; grow when the run of them is long enough."""
        self.clean_steps += 1
        if self.clean_steps >= self.growth_interval:
            self._change(step, min(self.value * self.growth, self.ceiling), "growth")

    def underflowed(self, step: int) -> None:
        """Grow at once, as far as the ceiling: at this scale every gradient was flushed to zero."""
        self._change(step, min(self.value * self.growth, self.ceiling), "underflow")

    def overflowed(self, step: int) -> None:
        """Back off after scaled gradients overflowed."""
        self._change(step, max(self.value * self.backoff, self.floor), "backoff")

    @property
    def at_floor(self) -> bool:
        """Whether there is no lower scale to back off to."""
        return self.value <= self.floor

    def _change(self, step: int, value: float, reason: str) -> None:
        self.clean_steps = 0
        if value != self.value:
            self.changes.append(ScaleChange(step, self.value, value, reason))
            self.value = value

    def __repr__(self) -> str:
        return f"LossScale({self.value:g}, floor={self.floor:g}, ceiling={self.ceiling:g})"


def scaled(loss: Tensor, factor: float) -> Tensor:
    """``loss * factor``, in fp32 at least: a half-precision loss would overflow. A trace knows scaling by this file."""
    if factor == 1:
        return loss
    return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * factor


def check_scale(what: str, value: object) -> float:
    """The value as a float; raises ArgumentError unless it and its reciprocal are normal fp32 numbers above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise ArgumentError(f"{what} is {value!r}; it must be a finite number above 0")
    if not _TINY <= value <= 1 / _TINY:
        raise ArgumentError(f"{what} is {value!r}; it and its reciprocal must be normal fp32 numbers (2^-126 to 2^126)")
    return float(value)


def check_rule(owner: str, **rule: Any) -> None:
    """Raises ArgumentError unless growth is above 1, back-off between 0 and 1, and the interval an int of at least 1.

    rule: these three in order, under the names by which the caller knows them.
    """
    (growth_name, growth), (backoff_name, backoff), (interval_name, interval) = rule.items()
    if not 1 < growth < math.inf:
        raise ArgumentError(f"{owner}: {growth_name} is {growth!r}; it must be above 1 and finite")
    if not 0 < backoff < 1:
        raise ArgumentError(f"{owner}: {backoff_name} is {backoff!r}; it must lie between 0 and 1")
    if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
        raise ArgumentError(f"{owner}: {interval_name} is {interval!r}; it must be an int of at least 1")

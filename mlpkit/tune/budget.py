"""What a search may spend: trials, seconds of wall time, or seconds of CPU time."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from mlpkit.errors import ArgumentError

Unit = Literal["seconds", "cpu-seconds", "trials"]
Source = Callable[[], float]

_UNITS: dict[str, tuple[Unit, float]] = {
    "": ("seconds", 1.0), "s": ("seconds", 1.0), "sec": ("seconds", 1.0), "seconds": ("seconds", 1.0),
    "m": ("seconds", 60.0), "min": ("seconds", 60.0), "minutes": ("seconds", 60.0), "h": ("seconds", 3600.0),
    "trials": ("trials", 1.0), "trial": ("trials", 1.0), "t": ("trials", 1.0),
    "cpu": ("cpu-seconds", 1.0), "cpu-s": ("cpu-seconds", 1.0), "cpus": ("cpu-seconds", 1.0),
    "cpu-seconds": ("cpu-seconds", 1.0), "cpu-min": ("cpu-seconds", 60.0),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """``amount`` of ``unit``."""

    amount: float
    unit: Unit

    def __str__(self) -> str:
        short = {"seconds": "s", "cpu-seconds": "CPU-s", "trials": "trials"}[self.unit]
        return f"{self.amount:g} {short}"


def read_budget(given: object) -> Budget:
    """A number of seconds, or a text such as "90s", "2 min", "60 cpu-s", "200 trials". ArgumentError otherwise."""
    wanted = 'must be a positive number of seconds, or a text such as "90s", "60 cpu-s" or "200 trials"'
    amount: float
    unit: Unit = "seconds"
    if isinstance(given, Budget):
        return given
    if isinstance(given, str):
        match = re.fullmatch(r"\s*([0-9.eE+-]+?)\s*([a-zA-Z-]*)\s*", given)
        if match is None or match.group(2).lower() not in _UNITS:
            raise ArgumentError(f"tune: budget is {given!r}, {wanted}")
        try:
            amount = float(match.group(1))
        except ValueError:
            raise ArgumentError(f"tune: budget is {given!r}, {wanted}") from None
        unit, factor = _UNITS[match.group(2).lower()]
        amount *= factor
    elif isinstance(given, int | float) and not isinstance(given, bool):
        amount = float(given)
    else:
        raise ArgumentError(f"tune: budget is {given!r}, {wanted}")
    if not (math.isfinite(amount) and amount > 0) or (unit == "trials" and amount != int(amount)):
        raise ArgumentError(f"tune: budget is {given!r}, {wanted}")
    return Budget(amount, unit)


class Clock:
    """What of a budget is spent: ``now()`` counts wall or CPU seconds, those of a resumed run included."""

    def __init__(self, budget: Budget, *, wall: Source = time.perf_counter, cpu: Source = time.process_time) -> None:
        self.budget = budget
        self._source = cpu if budget.unit == "cpu-seconds" else wall
        self._start = self._source()
        self.trials = 0
        self.credit = 0.0

    def now(self) -> float:
        """Seconds spent."""
        return self._source() - self._start + self.credit

    @property
    def end(self) -> float:
        """The time of ``now`` at which the budget is spent."""
        return math.inf if self.budget.unit == "trials" else self.budget.amount

    @property
    def trials_left(self) -> float:
        """How many candidates may still start."""
        return self.budget.amount - self.trials if self.budget.unit == "trials" else math.inf

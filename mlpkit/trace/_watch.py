"""Watch: magnitudes of module outputs, gradients, parameters and buffers, once a step; and what their growth foretells.

Each step leaves one row in a ring. Growth is judged by the trend of headroom, log2(limit / absmax), over the last rows
(Theil and Sen's slope: the median over pairs, so that one odd step decides nothing).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch

from mlpkit import _C
from mlpkit.trace._history import History

RING = 256
_TREND = 16  # steps that a trend is taken from
_HORIZON = 200  # steps ahead that a warning looks
_STEADY = 0.8  # part of the pairs that must agree with the direction
_LEAST_GROWTH = 0.5  # bits over the steps that a trend is taken from


@dataclass(slots=True)
class Row:
    """One step: absmax by name; Inf stands for what holds NaN or Inf."""

    step: int
    outputs: dict[str, float] = field(default_factory=dict)
    gradients: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, float] = field(default_factory=dict)

    def bad(self) -> list[tuple[str, str]]:
        """(kind, name) of what holds NaN or Inf: outputs in the order in which they were made, then the rest."""
        kinds = (("output", self.outputs), ("gradient", self.gradients), ("parameter", self.parameters))
        return [(kind, name) for kind, values in kinds for name, value in values.items() if value == math.inf]


@dataclass(frozen=True, slots=True)
class Warned:
    """A magnitude that will pass its dtype's limit if it grows on as it does."""

    kind: str
    name: str
    step: int
    absmax: float
    limit: float
    steps_left: int


class Watch:
    """The ring of rows, filled by the hooks of a tracer."""

    def __init__(self, outputs: _C.Outputs) -> None:
        self.rows: deque[Row] = deque(maxlen=RING)
        self.row = Row(0)
        self.limits: dict[tuple[str, str], float] = {}
        self.warnings: dict[tuple[str, str], Warned] = {}
        self._outputs = outputs

    @property
    def begun(self) -> bool:
        """Whether anything was noted in this step."""
        return self._outputs.any() or bool(self.row.gradients)

    def gradients(self, names: Sequence[str], tensors: Sequence[torch.Tensor | None]) -> bool:
        """Note the gradients of a step; says whether one holds NaN or Inf."""
        return self._fill(self.row.gradients, "gradient", names, tensors)

    def parameters(self, names: Sequence[str], tensors: Sequence[torch.Tensor | None]) -> bool:
        """Note parameters and buffers after an update; says whether one holds NaN or Inf."""
        return self._fill(self.row.parameters, "parameter", names, tensors)

    def _fill(
        self, row: dict[str, float], kind: str, names: Sequence[str], tensors: Sequence[torch.Tensor | None]
    ) -> bool:
        peaks = _C.peaks(tensors)
        row.update((name, peak) for name, peak in zip(names, peaks, strict=True) if peak >= 0)
        if len(self.rows) < 2:
            self.limits.update(
                ((kind, name), _limit(one)) for name, one in zip(names, tensors, strict=True) if one is not None
            )
        return math.inf in peaks

    def end_step(self) -> None:
        """Close the row; look for trends now and then."""
        self.row.outputs = self._outputs.take()
        if len(self.rows) < 2:
            self.limits.update((("output", name), limit) for name, limit in self._outputs.limits().items())
        self.rows.append(self.row)
        self.row = Row(self.row.step + 1)
        if len(self.rows) >= _TREND and self.row.step % (_TREND // 2) == 0:
            self._look_ahead()

    def history(self) -> History:
        """The ring as the report draws it."""
        history = History()
        for row in self.rows:
            for series, values in ((history.modules, row.outputs), (history.parameters, row.parameters)):
                for name, value in values.items():
                    series.setdefault(name, deque(maxlen=RING)).append((row.step, value))
        return history

    def _look_ahead(self) -> None:
        recent = list(self.rows)[-_TREND:]
        for kind, rows in (
            ("output", [row.outputs for row in recent]),
            ("gradient", [row.gradients for row in recent]),
            ("parameter", [row.parameters for row in recent]),
        ):
            for name, now in rows[-1].items():
                limit = self.limits.get((kind, name), math.inf)
                # Most do not grow at all; only those that do are worth a closer look.
                first = rows[0].get(name, 0.0)
                if (kind, name) in self.warnings or not first * 2.0**_LEAST_GROWTH <= now < limit or first <= 0:
                    continue
                left = steps_left([row.get(name, 0.0) for row in rows], limit)
                if left is not None:
                    self.warnings[kind, name] = Warned(kind, name, recent[-1].step, now, limit, left)


def steps_left(values: Sequence[float], limit: float) -> int | None:
    """Steps until a magnitude passes a limit, by the trend of its headroom; None where it does not within 200."""
    if not all(0 < value < math.inf for value in values):
        return None
    bits = [math.log2(value) for value in values]
    slopes = [(later - now) / (j - i) for i, now in enumerate(bits) for j, later in enumerate(bits[i + 1 :], i + 1)]
    slope = median(slopes)
    steady = sum(one > 0 for one in slopes) >= _STEADY * len(slopes)
    if not steady or slope * len(values) < _LEAST_GROWTH:
        return None
    left = (math.log2(limit) - bits[-1]) / slope
    return max(1, round(left)) if left <= _HORIZON else None


def _limit(tensor: torch.Tensor) -> float:
    return float(torch.finfo(tensor.dtype).max) if tensor.is_floating_point() else math.inf

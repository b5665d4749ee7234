"""Magnitudes over time: absmax per operation site, per parameter and of the loss; and what their growth says."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from itertools import pairwise, takewhile

from mlpkit.trace._numbers import short
from mlpkit.trace._records import Link, OpRecord

_RING = 256
_GROWTH = 100.0  # total growth that counts as an explosion
_LEAP = 2.0  # a parameter that grows this much in one update moved by at least its own size
_LAYERS = 4  # growing layers in a row that count as an explosion over layers
_PRODUCTS = ("mm", "conv", "linear", "bmm")


@dataclass(frozen=True, slots=True)
class Explosion:
    """Growth that ended in an overflow."""

    cause: str  # "hyperparameter" or "explosion"
    step: int
    phase: str
    op: str
    module: str
    text: str

    def link(self) -> Link:
        """The first link of a chain."""
        return Link(self.step, self.phase, self.op, self.module, "explosion", self.cause, self.text)


Series = deque[tuple[int, float]]


class History:
    """Rings of (step, absmax); several values in one step keep the largest."""

    def __init__(self) -> None:
        self.sites: dict[tuple[str, str, str, str], Series] = {}
        self.modules: dict[str, Series] = {}
        self.parameters: dict[str, Series] = {}
        self.losses: Series = deque(maxlen=_RING)
        self.learning_rate: float | None = None
        self._updates: dict[str, OpRecord] = {}

    def operation(self, record: OpRecord) -> None:
        """Note what an operation's results reached."""
        place = record.place
        _note(self.sites.setdefault(_site(record), deque(maxlen=_RING)), place.step, record.absmax)
        if place.phase == "forward" and place.module:
            _note(self.modules.setdefault(place.module, deque(maxlen=_RING)), place.step, record.absmax)

    def parameter(self, name: str, record: OpRecord, absmax: float) -> None:
        """Note a parameter after an update."""
        _note(self.parameters.setdefault(name, deque(maxlen=_RING)), record.place.step, absmax)
        self._updates[name] = record

    def knows(self, name: str) -> bool:
        """Whether a parameter has been noted."""
        return name in self.parameters

    def start(self, name: str, absmax: float) -> None:
        """Note a parameter before its first update."""
        self.parameters.setdefault(name, deque([(-1, absmax)], maxlen=_RING))

    def loss(self, step: int, value: float) -> None:
        """Note the magnitude of a step's loss."""
        _note(self.losses, step, value)

    def of(self, record: OpRecord) -> list[tuple[int, float]]:
        """The ring of an operation's site."""
        return list(self.sites.get(_site(record), ()))

    def explosion(self, record: OpRecord) -> Explosion | None:
        """The growth, over updates or over layers, that led to this overflow."""
        return self.leap() or _over_layers(record)

    def leap(self) -> Explosion | None:
        """The first update that threw a parameter far out."""
        normal = max((series[0][1] for series in self.parameters.values()), default=0.0)
        leaps = [leap for name, series in self.parameters.items() if (leap := _first_leap(name, series, normal))]
        if not leaps:
            return None
        step, _, name, before, after = min(leaps)
        update = self._updates[name]
        at = f", at learning rate {short(self.learning_rate)}" if self.learning_rate is not None else ""
        text = f"`{name}` grew from {short(before)} to {short(after)} in one update{at}"
        return Explosion("hyperparameter", step, update.place.phase, update.op, name.rpartition(".")[0], text)


def _first_leap(name: str, series: Series, normal: float) -> tuple[int, float, str, float, float] | None:
    """The first update that more than doubled a parameter which then grew past what any parameter began with."""
    values = [(step, value) for step, value in series if math.isfinite(value) and value > 0]
    if len(values) < 2 or values[-1][1] < _GROWTH * values[0][1]:
        return None
    for (_, before), (step, after) in pairwise(values):
        if after >= _LEAP * before and after > normal:
            return step, -after / before, name, before, after
    return None


def _over_layers(record: OpRecord) -> Explosion | None:
    """Layer after layer multiplied the magnitude."""
    path = [record]
    while len(path) < 512 and path[-1].parents:
        path.append(max(path[-1].parents, key=lambda parent: (parent.op not in ("param", "input"), parent.absmax)))
    same = takewhile(lambda step: step.place.phase == record.place.phase, path)
    products = [step for step in same if any(name in step.op for name in _PRODUCTS)]
    growing = 1  # the overflowing product itself
    while growing < len(products) and (
        growing == 1 or 0 < 2 * products[growing].absmax <= products[growing - 1].absmax
    ):
        growing += 1
    first = products[growing - 1] if products else record
    if growing < _LAYERS:
        return None
    reached = products[1].absmax
    if reached < _GROWTH * first.absmax:
        return None
    text = f"absmax grew from {short(first.absmax)} to {short(reached)} over {growing - 1} layers before it overflowed"
    return Explosion("explosion", first.place.step, first.place.phase, first.op, first.place.module, text)


def _site(record: OpRecord) -> tuple[str, str, str, str]:
    return record.place.phase, record.place.module, record.op, record.place.location


def _note(series: Series, step: int, value: float) -> None:
    if series and series[-1][0] == step:
        series[-1] = (step, max(series[-1][1], value))
    else:
        series.append((step, value))

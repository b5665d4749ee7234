"""Records and histories that the native observer keeps, as the diagnosing half reads them: made when asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from mlpkit import _C
from mlpkit.trace._history import _RING, History, Series
from mlpkit.trace._records import OpRecord, Place

_DTYPES = {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}


class Recalled(OpRecord):
    """A record of the native observer; its ancestors become records when they are asked for."""

    __slots__ = ("_known_parents", "_recall", "native")

    def __init__(self, native: _C.ObservedRecord, place: Place, recall: Callable[[Any], OpRecord]) -> None:
        self.native: _C.ObservedRecord | None = None
        super().__init__(native.index, native.op, _DTYPES[native.dtype], place)
        self._known_parents: tuple[OpRecord, ...] | None = None
        self._recall = recall
        self.native = native
        self.zero, self.absmax, self.value, self.nothing = native.zero, native.absmax, native.value, native.nothing
        self.multiplied = native.multiplied if native.multiplied >= 0 else None
        self.subject, self.consumed, self.derived = native.subject, native.consumed, native.derived

    @property
    def parents(self) -> tuple[OpRecord, ...]:
        """Writers of its inputs."""
        if self._known_parents is None:
            assert self.native is not None
            self._known_parents = tuple(self._recall(parent) for parent in self.native.parents)
        return self._known_parents

    @parents.setter
    def parents(self, parents: tuple[OpRecord, ...]) -> None:
        self._known_parents = parents
        self.native = None


class Remembered(History):
    """A history whose rings lie in the native observer."""

    def __init__(self, native: _C.Observer, place: Callable[[Any], Place], module: Callable[[int], str]) -> None:
        self._native, self._place, self._module = native, place, module
        super().__init__()

    @property
    def learning_rate(self) -> float | None:
        """The largest one of the last optimizer that stepped."""
        return self._native.learning_rate

    @learning_rate.setter
    def learning_rate(self, empty: Any) -> None:
        """The native observer reads it."""

    @property
    def sites(self) -> dict[tuple[str, str, str, str], Series]:
        """Per operation site: phase, module, op, location."""
        found: dict[tuple[str, str, str, str], Series] = {}
        for phase, module, op, line, series in self._native.sites():
            place = self._place((0, phase, module, line, 0))
            key = phase, place.module, op, place.location
            found[key] = _joined(found.get(key, ()), series)
        return found

    @sites.setter
    def sites(self, empty: Any) -> None:
        """The native observer fills them."""

    @property
    def modules(self) -> dict[str, Series]:
        """Per module, of its forward operations."""
        return {self._module(number): deque(series, _RING) for number, series in self._native.modules().items()}

    @modules.setter
    def modules(self, empty: Any) -> None:
        """The native observer fills them."""

    @property
    def parameters(self) -> dict[str, Series]:
        """Per parameter, after each update; step -1 is the value before the first."""
        return {name: deque(series, _RING) for name, (series, _) in self._native.parameters().items()}

    @parameters.setter
    def parameters(self, empty: Any) -> None:
        """The native observer fills them."""

    @property
    def _updates(self) -> dict[str, OpRecord]:
        return {name: update for name, (_, update) in self._native.parameters().items() if update is not None}

    @_updates.setter
    def _updates(self, empty: Any) -> None:
        """The native observer fills them."""

    def of(self, record: OpRecord) -> list[tuple[int, float]]:
        """The ring of an operation's site."""
        native = record.native if isinstance(record, Recalled) else None
        return list(self._native.series_of(native)) if native is not None else []


def _joined(one: Any, other: Any) -> Series:
    """Two instructions of one line are one site; several values in one step keep the largest."""
    values: dict[int, float] = dict(one)
    for step, value in other:
        values[step] = max(value, values.get(step, value))
    return deque(sorted(values.items()), _RING)

"""The kinds of parts a search space is made of: a choice of values, or a range of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlpkit.errors import ArgumentError

Value = str | int | float | bool | None


@dataclass(frozen=True)
class Choice:
    """One of ``values``. Numbers in ascending order count as a scale: neighbours and borders mean something there."""

    values: tuple[Value, ...]

    @property
    def ordered(self) -> bool:
        """True for two or more ascending numbers."""
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        return len(numbers) == len(self.values) > 1 and numbers == sorted(numbers)

    @property
    def fixed(self) -> bool:
        """True where there is nothing to choose."""
        return len(self.values) == 1

    def from_unit(self, u: float) -> Value:
        """The value at ``u`` in [0, 1]: equal shares."""
        return self.values[min(int(u * len(self.values)), len(self.values) - 1)]

    def to_unit(self, value: Value) -> float:
        """The middle of the share of ``value``."""
        return (self.values.index(value) + 0.5) / len(self.values)

    def grid(self, points: int) -> list[Value]:
        """All values, however many points are wanted."""
        return list(self.values)

    def within(self, low: float, high: float) -> Choice:
        """The values whose share overlaps [low, high] of the unit scale; all of them where there is no order."""
        if not self.ordered:
            return self
        count = len(self.values)
        kept = [value for index, value in enumerate(self.values) if (index + 1) / count > low and index / count < high]
        return Choice(tuple(kept)) if kept else self

    def holds(self, value: Value) -> bool:
        """True if the search could give this value."""
        return value in self.values

    def to_plain(self) -> Any:
        """As it would be written in a YAML file."""
        return self.values[0] if self.fixed else list(self.values)


@dataclass(frozen=True)
class Range:
    """A number in [low, high]. log: even on a logarithmic scale. whole: an int. complement: 1 - value is what is drawn.

    low and high are those of the value itself, also with complement: Range(0.5, 0.99, log=True, complement=True)
    draws 1 - value from [0.01, 0.5] on a logarithmic scale.
    """

    low: float
    high: float
    log: bool = False
    whole: bool = False
    complement: bool = False

    ordered = True

    @property
    def fixed(self) -> bool:
        """True where there is nothing to choose."""
        return self.low == self.high

    @property
    def bounds(self) -> tuple[float, float]:
        """(low, high) of what is drawn."""
        return (1.0 - self.high, 1.0 - self.low) if self.complement else (self.low, self.high)

    def from_unit(self, u: float) -> Value:
        """The value at ``u`` in [0, 1] of the drawn scale."""
        low, high = self.bounds
        u = min(max(u, 0.0), 1.0)
        drawn = low * (high / low) ** u if self.log else low + u * (high - low)
        value = 1.0 - drawn if self.complement else drawn
        value = min(max(value, self.low), self.high)
        return round(value) if self.whole else value

    def to_unit(self, value: Value) -> float:
        """The inverse of ``from_unit``; outside [0, 1] for a value outside the range."""
        low, high = self.bounds
        if low == high:
            return 0.5
        drawn = 1.0 - float(value or 0.0) if self.complement else float(value or 0.0)
        if self.log:
            return math.log(max(drawn, 1e-300) / low) / math.log(high / low)
        return (drawn - low) / (high - low)

    def grid(self, points: int) -> list[Value]:
        """``points`` values, even on the drawn scale, both ends included."""
        if points < 2 or self.fixed:
            return [self.from_unit(0.5)]
        return list(dict.fromkeys(self.from_unit(index / (points - 1)) for index in range(points)))

    def within(self, low: float, high: float) -> Range:
        """The part [low, high] of the unit scale; it may lie outside [0, 1], which widens the range."""
        a, b = self.bounds
        ends = [a * (b / a) ** u if self.log else a + u * (b - a) for u in (low, high)]
        values = sorted(1.0 - end if self.complement else end for end in ends)
        if self.whole:
            values = [math.floor(values[0]), math.ceil(values[1])]
        return replace(self, low=values[0], high=values[1])

    def holds(self, value: Value) -> bool:
        """True if the search could give this value."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low - 1e-12 <= float(value or 0.0) <= self.high + 1e-12

    def to_plain(self) -> Any:
        """As it would be written in a YAML file."""
        plain: dict[str, Any] = {"low": self.low, "high": self.high}
        plain.update({name: True for name in ("log", "whole", "complement") if getattr(self, name)})
        return plain


Part = Choice | Range


def read_part(name: str, given: Any, default: Part) -> Part:
    """What a user gave for a part as a Part: a value, a list, (low, high), or {low, high, log, whole, complement}.

    A pair of numbers is a range where the default is one. Raises ArgumentError naming the part.
    """
    if isinstance(given, Choice | Range):
        part: Part = given
    elif isinstance(given, Mapping):
        part = _range(name, given, default)
    elif isinstance(given, list | tuple | set | frozenset | range):
        values = [_value(name, item) for item in given]
        if isinstance(default, Range) and isinstance(given, tuple) and len(values) == 2:
            part = _range(name, {"low": values[0], "high": values[1]}, default)
        else:
            part = Choice(tuple(dict.fromkeys(values)))
    else:
        part = Choice((_value(name, given),))
    _check(name, part)
    return part


def _range(name: str, given: Mapping[str, Any], default: Part) -> Range:
    unknown = set(given) - {"low", "high", "log", "whole", "complement"}
    if unknown or not {"low", "high"} <= set(given):
        what = f"does not know {sorted(map(str, unknown))[0]!r}" if unknown else "needs low and high"
        raise ArgumentError(f"Space: part {name!r} {what}; a range is {{low, high, log, whole, complement}}")
    numbers = {}
    for key in ("low", "high"):
        value = _value(name, given[key])
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ArgumentError(f"Space: part {name!r} has {key} {given[key]!r}, which must be a finite number")
        numbers[key] = value
    like = default if isinstance(default, Range) else Range(0, 1)
    flags = {key: bool(given.get(key, getattr(like, key))) for key in ("log", "whole", "complement")}
    return Range(numbers["low"], numbers["high"], **flags)


def _check(name: str, part: Part) -> None:
    if isinstance(part, Choice):
        if not part.values:
            raise ArgumentError(f"Space: part {name!r} has no value to choose from")
        return
    if part.low > part.high:
        raise ArgumentError(f"Space: part {name!r} has low {part.low:g} above high {part.high:g}")
    if part.log and part.bounds[0] <= 0.0:
        wanted = "high below 1" if part.complement else "low above 0"
        raise ArgumentError(f"Space: part {name!r} is on a logarithmic scale and needs {wanted}")


def _value(name: str, value: Any) -> Value:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, str):
        try:
            return float(value)  # YAML reads 1e-4, without a point, as text.
        except ValueError:
            return None if value.lower() in ("none", "null") else value
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ArgumentError(f"Space: part {name!r} holds {value!r}, not a number, a text, true, false or none")


def powers_of_two(low: int, high: int) -> tuple[int, ...]:
    """The powers of 2 from low to high."""
    return tuple(2**power for power in range(low.bit_length() - 1, high.bit_length()) if low <= 2**power <= high)


def listed(values: Sequence[Any]) -> str:
    """Values in words for an error."""
    return ", ".join(map(str, values))

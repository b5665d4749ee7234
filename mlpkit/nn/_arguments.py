"""Checks of arguments: each returns the value, or raises ArgumentError naming its owner and argument."""

from __future__ import annotations

from collections.abc import Sequence

from mlpkit.errors import ArgumentError


def size(owner: str, name: str, value: object) -> int:
    """The value itself, an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{owner}: {name} is {value!r}; it must be an int of at least 1")
    return value


def choice(owner: str, name: str, value: object, known: Sequence[str], also: str = "") -> str:
    """The value itself, one of the known names."""
    if not isinstance(value, str) or value not in known:
        names = ", ".join(known) + also
        raise ArgumentError(f"{owner}: {name} is {value!r}; it must be one of {names}")
    return value


def probability(owner: str, name: str, value: object) -> float:
    """The value as a float in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(f"{owner}: {name} is {value!r}; it must be a probability in [0, 1]")
    return float(value)

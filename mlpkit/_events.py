"""A tiny announcement board between layers that must not import each other: guard announces steps, trace listens.

Events are plain dicts with a ``"kind"``; listeners must not raise and must not keep tensors alive. Into a ``"skip"``
event a listener that knows where it began puts ``op``, ``module`` and ``cause``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Listener = Callable[[dict[str, Any]], None]
_listeners: list[Listener] = []


def subscribe(listener: Listener) -> Callable[[], None]:
    """Call ``listener(event)`` for every later event; returns the function that ends it."""
    _listeners.append(listener)
    return lambda: _listeners.remove(listener)


def listened_to() -> bool:
    """Whether anybody listens: what goes into an event need not be gathered otherwise."""
    return bool(_listeners)


def announce(kind: str, **fields: Any) -> dict[str, Any]:
    """Tell every listener; costs one truth test when nobody listens. Returns the event with what they put into it."""
    event = {"kind": kind, **fields}
    if _listeners:
        for listener in tuple(_listeners):
            listener(event)
    return event

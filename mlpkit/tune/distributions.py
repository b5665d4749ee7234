"""A space in Optuna's words and back: what its samplers, storages and dashboard know of a search."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlpkit.errors import ArgumentError
from mlpkit.report._extras import require
from mlpkit.tune.parts import Choice, Part, Range, Value
from mlpkit.tune.space import Params, Space

_COMPLEMENT = "1-"  # What Optuna calls "1-beta1" is drawn on a logarithmic scale; the space's beta1 is 1 minus it.


def to_distributions(space: Space, names: list[str] | None = None) -> dict[str, Any]:
    """Optuna's distributions of the named parts (default: all); beta1 appears as "1-beta1"."""
    chosen = list(space.parts) if names is None else names
    return {_optuna_name(name, space.parts[name]): _distribution(space.parts[name]) for name in chosen}


def from_distributions(distributions: Mapping[str, Any]) -> Space:
    """The space whose parts are these; others keep their default. ArgumentError for one that no part can be."""
    parts: dict[str, Any] = {}
    for name, item in distributions.items():
        own = name.removeprefix(_COMPLEMENT)
        kind = type(item).__name__
        if kind == "CategoricalDistribution":
            parts[own] = Choice(tuple(item.choices))
        elif kind in ("FloatDistribution", "IntDistribution"):
            low, high = item.low, item.high
            if own != name:
                low, high = 1.0 - high, 1.0 - low
            parts[own] = Range(low, high, log=item.log, whole=kind[0] == "I", complement=own != name)
        else:
            raise ArgumentError(f"Space: part {own!r} has a {kind}, which has no counterpart")
    return Space(parts)


def to_optuna(space: Space, params: Mapping[str, Value]) -> dict[str, Any]:
    """Parameters under the names and on the scales of ``to_distributions``."""
    return {_optuna_name(name, space.parts[name]): _drawn(space.parts[name], value) for name, value in params.items()}


def suggest(space: Space, trial: Any) -> Params:
    """Ask an Optuna trial for every part that matters, in order."""
    params: Params = {}
    for name, part in space.parts.items():
        if name not in space.active(params):
            continue
        label = _optuna_name(name, part)
        if isinstance(part, Choice):
            params[name] = trial.suggest_categorical(label, list(part.values))
            continue
        low, high = part.bounds
        if part.whole:
            params[name] = trial.suggest_int(label, int(low), int(high), log=part.log)
        else:
            drawn = trial.suggest_float(label, low, high, log=part.log)
            params[name] = 1.0 - drawn if part.complement else drawn
    return params


def _optuna_name(name: str, part: Part) -> str:
    return _COMPLEMENT + name if isinstance(part, Range) and part.complement else name


def _distribution(part: Part) -> Any:
    kinds = require("optuna", "mlpkit.tune").distributions
    if isinstance(part, Choice):
        return kinds.CategoricalDistribution(list(part.values))
    low, high = part.bounds
    if part.whole:
        return kinds.IntDistribution(int(low), int(high), log=part.log)
    return kinds.FloatDistribution(low, high, log=part.log)


def _drawn(part: Part, value: Value) -> Value:
    if isinstance(part, Range) and part.complement:
        low, high = part.bounds
        return min(max(1.0 - float(value or 0.0), low), high)
    return value

"""The families of cases, by name; the order is that of a whole run. A new family is a file here and a line below."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mlpkit.bench.case import Case, Settings
from mlpkit.bench.cases import (
    census,
    dropout,
    guard,
    layer,
    norm,
    population,
    step,
    threads,
    tiny,
    trace,
    update,
    wide,
)
from mlpkit.bench.peak import Peaks
from mlpkit.errors import ArgumentError

Family = Callable[[Settings, Peaks], list[Case]]

FAMILIES: dict[str, Family] = {
    "layer": layer.cases,
    "tiny": tiny.cases,
    "wide": wide.cases,
    "step": step.cases,
    "norm": norm.cases,
    "dropout": dropout.cases,
    "threads": threads.cases,
    "guard": guard.cases,
    "update": update.cases,
    "census": census.cases,
    "trace": trace.cases,
    "population": population.cases,
}


def chosen(names: Sequence[str]) -> list[str]:
    """The families asked for, in the order of a whole run; all of them for no names."""
    for name in names:
        if name not in FAMILIES:
            raise ArgumentError(f"bench: there is no case {name!r}; the cases are {', '.join(FAMILIES)}")
    return [name for name in FAMILIES if not names or name in names]


def purpose(name: str) -> str:
    """One line on what a family measures."""
    return (FAMILIES[name].__doc__ or "").splitlines()[0]

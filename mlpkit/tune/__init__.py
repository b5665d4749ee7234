"""From a table to the simplest MLP it deserves: ``tune(X, y)`` or ``mlpkit tune table.csv --target y``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlpkit.tune.model import TunedModel
    from mlpkit.tune.parts import Choice, Range
    from mlpkit.tune.run import Run
    from mlpkit.tune.search import tune
    from mlpkit.tune.space import Space
    from mlpkit.tune.table import read_csv, read_table

__all__ = ["Choice", "Range", "Run", "Space", "TunedModel", "read_csv", "read_table", "tune"]

# On first use, so that importing the package loads neither torch's optimizers nor a table library.
_HOMES = {
    "Choice": "parts",
    "Range": "parts",
    "Run": "run",
    "Space": "space",
    "TunedModel": "model",
    "read_csv": "table",
    "read_table": "table",
    "tune": "search",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'mlpkit.tune' has no attribute {name!r}")
    value = getattr(import_module(f"mlpkit.tune.{_HOMES[name]}"), name)
    globals()[name] = value
    return value

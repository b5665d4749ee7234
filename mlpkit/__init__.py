"""mlpkit: fast, safe, explained and tuned multi-layer perceptrons for PyTorch.

Public names resolve on first use, so that ``import mlpkit`` stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_MODULES = ("errors", "functional", "guard", "init", "nn", "population", "trace", "tune")
_ESTIMATORS = ("MLPClassifier", "MLPRegressor", "TunedMLPClassifier", "TunedMLPRegressor")
_FUNCTIONS = {"census": "mlpkit.trace", **dict.fromkeys(_ESTIMATORS, "mlpkit.tune.estimators")}

__all__ = [
    "MLPClassifier",
    "MLPRegressor",
    "TunedMLPClassifier",
    "TunedMLPRegressor",
    "census",
    "errors",
    "functional",
    "guard",
    "init",
    "nn",
    "population",
    "trace",
    "tune",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"mlpkit.{name}")
    if name in _FUNCTIONS:
        return getattr(import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'mlpkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)

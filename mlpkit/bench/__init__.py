"""``mlpkit bench``: mlpkit beside its rivals on this machine, in one run. Layer: above guard and nn, below the cli."""

from __future__ import annotations

from mlpkit.bench.case import Case, Rival, Settings
from mlpkit.bench.runner import run

__all__ = ["Case", "Rival", "Settings", "run"]

"""Whole training steps of small networks."""

from __future__ import annotations

from mlpkit.bench.case import Case, Settings
from mlpkit.bench.cases._network import Network
from mlpkit.bench.peak import Peaks


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """TrainStep on an MLP 128 -> w -> w -> 10 with dropout, Adam and clipping, against a loop with the same parts."""
    found = []
    for dtype in settings.dtypes:
        if dtype == "fp16":  # fp16 autocast of small products is nothing to train with on a CPU
            continue
        for rows in (8,) if settings.quick else (32, 256):
            for width in (8,) if settings.quick else (16, 64, 128, 256):
                found.append(Network(rows, width, dtype).case("step", settings))
    return found

"""A layer so small that calling it costs more than computing it."""

from __future__ import annotations

from mlpkit.bench.case import Case, Settings
from mlpkit.bench.cases._layer import QUICK_SHAPE, Layer
from mlpkit.bench.peak import Peaks


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """One tiny layer, 32 rows, 128 -> 64: what a call costs."""
    shape = QUICK_SHAPE if settings.quick else (32, 128, 64)
    return [Layer(shape, dtype, back).case("tiny", settings) for dtype in settings.dtypes for back in (False, True)]

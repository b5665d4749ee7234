"""Thin layers, where activation and dropout cost as much as the product."""

from __future__ import annotations

from mlpkit.bench.case import Case, Settings
from mlpkit.bench.cases._layer import QUICK_SHAPE, Layer
from mlpkit.bench.peak import Peaks

SHAPES = [(1024, 128, 256), (1024, 128, 4096)]


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """One layer with GELU or ReLU and dropout 0.1, 1024 rows, 128 -> 256 and 128 -> 4096, against eager and bare mm."""
    found = []
    for activation in ("gelu", "relu"):
        for dtype in settings.dtypes:
            for shape in _shapes(settings, dtype):
                for backward in (False, True):
                    found.append(Layer(shape, dtype, backward, activation).case("layer", settings))
    return found


def _shapes(settings: Settings, dtype: str) -> list[tuple[int, int, int]]:
    if settings.sizes:
        return [(sizes.rows, sizes.widths[0], sizes.widths[1]) for sizes in settings.sizes if sizes.family == "layer"]
    if settings.quick:
        return [QUICK_SHAPE]
    # Eager float16 takes seconds a call on the wider shape, and tells nothing more there.
    return SHAPES[: 1 if dtype == "fp16" else 2]

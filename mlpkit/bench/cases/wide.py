"""Layers that are one big product with a little around it."""

from __future__ import annotations

from mlpkit.bench.case import Case, Settings
from mlpkit.bench.cases._layer import QUICK_SHAPE, Layer
from mlpkit.bench.peak import Peaks

SHAPES = [(512, 1024, 1024), (256, 4096, 4096)]


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """Square layers, 1024 (512 rows) and 4096 (256 rows), GELU and dropout 0.1; float16, slow in eager, is left out."""
    return [
        Layer(shape, dtype, backward).case("wide", settings)
        for dtype in settings.dtypes
        if dtype != "fp16"
        for shape in ([QUICK_SHAPE] if settings.quick else SHAPES)
        for backward in (False, True)
    ]

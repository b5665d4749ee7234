"""Numbers as a reader wants them, and the limits of the floating-point formats."""

from __future__ import annotations

import math

import torch

_FORMATS = {name: torch.finfo(getattr(torch, name)) for name in ("float64", "float32", "float16", "bfloat16")}


def limit(dtype: str) -> float:
    """The largest finite number of a dtype."""
    return float(_FORMATS[dtype].max)


def smallest(dtype: str) -> float:
    """The smallest positive number of a dtype, subnormals included."""
    return float(_FORMATS[dtype].smallest_normal * _FORMATS[dtype].eps)


def short(value: float) -> str:
    """Three significant digits, without the padding of exponents: 6.62e4, -Inf, 0.25."""
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Inf" if value > 0 else "-Inf"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4 or value == 65504.0:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def kind(value: float) -> str:
    """``NaN``, ``Inf``, ``-Inf`` or ``""``."""
    return "" if math.isfinite(value) else short(value)

"""Counting special values."""

from __future__ import annotations

import torch
from torch import Tensor

from mlpkit.bench.case import DTYPES, OURS, Case, Rival, Settings
from mlpkit.bench.peak import Peaks
from mlpkit.ops.census import census


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """A census against the same counts by torch's operations, and against the cheapest looks, aminmax and sum."""
    return [_case(1000 if settings.quick else 16_777_216, dtype) for dtype in settings.dtypes]


def _case(elements: int, dtype: str) -> Case:
    def build() -> dict[str, Rival]:
        torch.manual_seed(0)
        x = torch.randn(elements).to(DTYPES[dtype])
        return {
            OURS: Rival(lambda: census(x)),
            "torch": Rival(lambda: by_torch(x)),
            "aminmax": Rival(lambda: torch.aminmax(x)),
            "sum": Rival(lambda: x.sum()),
            "isfinite": Rival(lambda: bool(torch.isfinite(x).all())),
        }

    return Case(
        family="census",
        label=f"{elements} elements",
        sizes={"elements": elements},
        what="census",
        dtype=dtype,
        work=0.0,
        build=build,
        baseline="torch",
    )


def by_torch(x: Tensor) -> list[float]:
    """What the census counts, one operation after the other."""
    size = x.abs()
    limits = torch.finfo(torch.float16)
    finite, present = torch.isfinite(x), x != 0
    counts = [
        torch.isnan(x).sum(),
        torch.isposinf(x).sum(),
        torch.isneginf(x).sum(),
        (~present).sum(),
        (present & (size < torch.finfo(x.dtype).smallest_normal)).sum(),
        (finite & (size > limits.max)).sum(),
        (present & (size < limits.smallest_normal)).sum(),
        size.where(finite, 0).max(),
        size.where(finite & present, torch.inf).min(),
    ]
    return [float(count) for count in counts]

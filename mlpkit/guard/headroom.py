"""How close gradients came to the dtype's limit, per tensor in the last steps, and what a skip says of the scale.

Headroom is log2(limit / absmax) in bits, of the gradients as they were computed: scaled, in the precision's dtype.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import mlpkit._ext  # noqa: F401 - loading the extension registers the census operator

LENGTH = 8
_COUNTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def absmax(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each tensor and whether it holds Inf or NaN, 1-dim; float64 and bool. No sync.

    On the CPU the magnitude is that of the finite part.
    """
    if not tensors:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.bool)
    if all(tensor.device.type == "cpu" and tensor.dtype in _COUNTED for tensor in tensors):
        counts, extremes, _ = torch.ops.mlpkit.census([tensor.detach() for tensor in tensors], False)
        return extremes[:, 0], counts[:, :3].any(1)
    # An empty tensor has no largest element, and stays out; tensors of a split model come to the first one's device.
    zero = torch.zeros((), dtype=torch.float64, device=tensors[0].device)
    held = [tensor.detach() for tensor in tensors if tensor.numel()]
    found = iter(torch._foreach_norm(held, math.inf) if held else ())
    norms = torch.stack([next(found).to(zero) if tensor.numel() else zero for tensor in tensors])
    return norms, torch.isfinite(norms).logical_not()


def bits(value: float, dtype: torch.dtype) -> float:
    """log2(limit / value), limit the dtype's largest number; Inf for 0, NaN for what is not finite."""
    if not math.isfinite(value):
        return math.nan
    return math.log2(torch.finfo(dtype).max) - math.log2(value) if value else math.inf


def least(headroom: dict[str, float]) -> float | None:
    """The fewest bits of any tensor; None where one holds Inf or NaN, or all are zero."""
    bits = min(headroom.values(), default=math.nan, key=lambda value: -math.inf if math.isnan(value) else value)
    return bits if math.isfinite(bits) else None


class _Row(NamedTuple):
    names: list[str]
    values: Tensor
    bad: Tensor
    scale: Tensor | float

    def floats(self) -> list[float]:
        return [math.inf if bad else value for value, bad in zip(self.values.tolist(), self.bad.tolist())]


class AbsmaxHistory:
    """The absmax of every gradient in the last steps, scaled as it was; kept on the device until somebody asks."""

    def __init__(self, length: int = LENGTH) -> None:
        self._rows: deque[_Row] = deque(maxlen=length)

    def add(self, names: list[str], gradients: Sequence[Tensor], scale: Tensor | float) -> None:
        """Remember one step's gradients, as they were computed under this loss scale."""
        self._rows.append(_Row(names, *absmax(gradients), scale.clone() if isinstance(scale, Tensor) else scale))

    def add_finite(self, names: list[str], values: list[float], scale: float) -> None:
        """Remember gradients that are known to be finite by their absmax."""
        self._rows.append(
            _Row(names, torch.tensor(values, dtype=torch.float64), torch.zeros(len(values), dtype=torch.bool), scale)
        )

    def last(self) -> Tensor:
        """The last step's values, unscaled. No sync."""
        return self._rows[-1].values / self._rows[-1].scale

    def of(self, name: str) -> tuple[float, ...]:
        """This gradient's values, oldest first, the last step's at the end; Inf where it held Inf or NaN. Syncs."""
        return tuple(row.floats()[row.names.index(name)] for row in self._rows if name in row.names)

    def headroom(self, dtype: torch.dtype) -> dict[str, float]:
        """Bits below the dtype's limit of each gradient at the last step, NaN where it held Inf or NaN. Syncs."""
        if not self._rows:
            return {}
        row = self._rows[-1]
        return {name: bits(value, dtype) for name, value in zip(row.names, row.floats())}


def nature(where: str, scale: float, at_floor: bool) -> str:
    """What kind of skip it was: ``calibration | collapse | data | gradient | update | state``.

    Only Inf or NaN in scaled gradients behind a finite forward is the scale's doing, as long as there is a lower scale:
    calibration, and benign. Where the forward itself holds it, every scale would meet it again: collapse.
    """
    if where in ("inputs", "target"):
        return "data"
    if where in ("forward", "loss", "buffer"):
        return "collapse"
    if where in ("update", "state"):
        return where
    return "calibration" if where == "gradient" and scale > 1 and not at_floor else "gradient"

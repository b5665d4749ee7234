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

from mlpkit._ext import _C

LENGTH = 8
_COUNTED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def absmax(gradients: Sequence[Tensor | None]) -> Tensor:
    """The largest magnitude of each, 1-dim: Inf where one holds Inf or NaN, NaN where there is None. No sync.

    float32, or float64 where one of them is that.
    """
    present = [gradient.detach() for gradient in gradients if gradient is not None]
    if all(gradient.device.type == "cpu" and gradient.dtype in _COUNTED for gradient in present):
        values: Tensor = _C.absmax(list(gradients))
        return values
    # An empty tensor has no largest element, and stays out; tensors of a split model come to the first one's device.
    wide = any(gradient.dtype == torch.float64 for gradient in present)
    zero = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=present[0].device)
    held = [gradient for gradient in present if gradient.numel()]
    found = iter(torch._foreach_norm(held, math.inf) if held else ())
    norms = torch.stack([next(found).to(zero) if gradient.numel() else zero for gradient in present])
    norms = norms.nan_to_num(nan=math.inf, posinf=math.inf)
    if len(present) == len(gradients):
        return norms
    rest = iter(norms.unbind())
    return torch.stack([zero + math.nan if gradient is None else next(rest) for gradient in gradients])


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
    values: Tensor
    scale: Tensor | float


class AbsmaxHistory:
    """The absmax of every gradient in the last steps, scaled as it was; kept on the device until somebody asks.

    Gradients are told by their parameter's place among all of an optimizer's: names are the asker's, and not kept.
    """

    def __init__(self, length: int = LENGTH) -> None:
        self._rows: deque[_Row] = deque(maxlen=length)

    def add(self, values: Tensor, scale: Tensor | float) -> None:
        """Remember one step's ``absmax`` of all parameters' gradients, as they were computed under this loss scale."""
        self._rows.append(_Row(values, scale.clone() if isinstance(scale, Tensor) else scale))

    def last(self) -> Tensor:
        """The largest of the last step, unscaled, 0-dim. No sync."""
        row = self._rows[-1]
        return row.values.nan_to_num(nan=0.0, posinf=math.inf).amax() / row.scale

    def of(self, place: int | None) -> tuple[float, ...]:
        """This gradient's values, oldest first, the last step's at the end; Inf where it held Inf or NaN. Syncs."""
        if place is None:
            return ()
        values = [float(row.values[place]) for row in self._rows if place < len(row.values)]
        return tuple(value for value in values if not math.isnan(value))

    def headroom(self, names: Sequence[str], dtype: torch.dtype) -> dict[str, float]:
        """Bits below the dtype's limit of each gradient at the last step, NaN where it held Inf or NaN. Syncs.

        names: of all parameters, in the optimizer's order.
        """
        if not self._rows:
            return {}
        values = self._rows[-1].values.tolist()
        return {name: bits(value, dtype) for name, value in zip(names, values) if not math.isnan(value)}


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

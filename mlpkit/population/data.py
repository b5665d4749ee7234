"""Tables and targets as the native part takes them, checked once."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mlpkit.errors import ArgumentError, DataError, DeviceError, DtypeError, ShapeError

LOSSES = ("cross_entropy", "brier", "bce", "mse", "l1", "huber", "log_mse")
OF_CLASSES = ("cross_entropy", "brier")
MOST_ROWS = 2**31 - 1


class Table(NamedTuple):
    """x (rows, in) float32; classes (rows,) int32 or target (rows, out) float32; weights (rows,) float32 or None."""

    x: Tensor
    classes: Tensor | None
    target: Tensor | None
    weights: Tensor | None


def table(X: Any, y: Any, weights: Any, loss: str, log_target: bool, owner: str) -> Table:
    """All three, checked against each other; owner: "Population" or "validation", for the errors."""
    x = inputs(X, owner)
    found = Table(x, None, None, _weights(weights, len(x), owner))
    if loss in OF_CLASSES:
        found = found._replace(classes=_classes(y, loss, owner))
    else:
        found = found._replace(target=_target(y, loss, log_target, owner))
    count = len(found.classes if found.classes is not None else found.target)  # type: ignore[arg-type]
    if count != len(x):
        raise ShapeError(f"{owner}: X has {len(x)} rows, y has {count}; they must agree")
    return found


def placed(device: Any, *values: Any) -> tuple[int, tuple[Any, ...]]:
    """The number of the CUDA device asked for, or that the first value lies on (-1: the CPU); all values on the CPU."""
    lies = values[0].device if isinstance(values[0], Tensor) else torch.device("cpu")
    wanted = lies if device is None else torch.device(device)
    if wanted.type not in ("cpu", "cuda"):
        raise DeviceError(f"Population: device is {wanted}; populations are trained on the CPU or a CUDA device")
    here = tuple(value.cpu() if isinstance(value, Tensor) else value for value in values)
    if wanted.type == "cpu":
        if lies.type != "cpu" and device is not None:
            raise DeviceError(f"Population: device is {device}, but X is on {lies}; move one of them")
        return -1, here
    return wanted.index if wanted.index is not None else _current(), here


def _current() -> int:
    return torch.cuda.current_device() if torch.cuda.is_available() else 0


def inputs(X: Any, owner: str) -> Tensor:
    """X as contiguous float32 (rows, in_features); float64 is rounded."""
    x = _tensor(X, "X", owner)
    if x.dim() != 2 or not x.numel() or len(x) > MOST_ROWS:
        raise ShapeError(f"{owner}: X has shape {tuple(x.shape)}; it must be (rows, in_features), neither of them 0")
    return x.to(torch.float32).contiguous()


def rows_of(rows: Any, count: int, field: str) -> Tensor:
    """Indices into X as int32; negative ones, those beyond the end and none at all are refused."""
    index = _tensor(rows, field, "Member")
    if index.dtype == torch.bool:
        if index.shape != (count,):
            raise ShapeError(f"Member: {field} is a mask of shape {tuple(index.shape)}; X has {count} rows")
        index = index.nonzero()[:, 0]
    if index.is_floating_point() or index.dim() != 1 or not index.numel():
        raise DataError(
            f"Member: {field} has shape {tuple(index.shape)} and dtype {index.dtype}; it must be row numbers"
        )
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= count:
        raise DataError(f"Member: {field} goes from {low} to {high}; X has rows 0 to {count - 1}")
    return index.to(torch.int32).contiguous()


def held_back(rows: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """(rows to train on, rows to validate on): the share of them that a fixed draw picks, the same for equal rows."""
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    if count < 1:
        raise ArgumentError("Population: validation is a share, but a member has a single row: none can be held back")
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    return rows[drawn[count:].sort().values], rows[drawn[:count].sort().values]


def _tensor(values: Any, name: str, owner: str) -> Tensor:
    if isinstance(values, Tensor):
        if values.device.type != "cpu":
            raise ArgumentError(f"{owner}: {name} is on {values.device}; it must be on the CPU")
        return values.detach()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise DtypeError(
            f"{owner}: {name} has dtype {array.dtype}; it must be numbers. Strings are encoded one layer up: "
            "mlpkit.tune takes tables as they are"
        )
    # Those of pandas may be read-only, which torch warns of.
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def _classes(y: Any, loss: str, owner: str) -> Tensor:
    array = np.asarray(y) if not isinstance(y, Tensor) else None
    if array is not None and array.dtype.kind not in "fiub":
        raise DtypeError(
            f"{owner}: y has dtype {array.dtype}; {loss} takes classes 0, 1, ...: encode labels by "
            "numpy.unique(y, return_inverse=True), or give them to mlpkit.tune as they are"
        )
    classes = _tensor(y, "y", owner)
    if classes.is_floating_point() or classes.dim() != 1:
        raise DtypeError(
            f"{owner}: y is {classes.dtype} of shape {tuple(classes.shape)}; {loss} takes integers (rows,)"
        )
    classes = classes.to(torch.int64)
    if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < 2**20:
        raise DataError(
            f"{owner}: classes go from {int(classes.min())} to {int(classes.max())}; they must count from 0"
        )
    return classes.to(torch.int32).contiguous()


def _target(y: Any, loss: str, log_target: bool, owner: str) -> Tensor:
    target = _tensor(y, "y", owner)
    if target.dim() == 1:
        target = target[:, None]
    if target.dim() != 2 or not target.shape[1]:
        raise ShapeError(f"{owner}: y has shape {tuple(target.shape)}; {loss} takes (rows,) or (rows, outputs)")
    wide = target.to(torch.float64)
    if loss == "bce" and not bool(((wide >= 0) & (wide <= 1)).all()):
        raise DataError(f"{owner}: y lies in [{float(wide.min()):g}, {float(wide.max()):g}]; bce takes [0, 1]")
    if (log_target or loss == "log_mse") and not bool((wide > 0).all()):
        raise DataError(f"{owner}: y goes down to {float(wide.min()):g}; a logarithm wants numbers above 0")
    return (wide.log() if log_target else wide).to(torch.float32).contiguous()


def _weights(weights: Any, rows: int, owner: str) -> Tensor | None:
    if weights is None:
        return None
    found = _tensor(weights, "sample_weight", owner).to(torch.float32)
    if found.shape != (rows,):
        raise ShapeError(f"{owner}: sample_weight has shape {tuple(found.shape)}; it must be ({rows},), one a row")
    if not bool((torch.isfinite(found) & (found >= 0)).all()) or not bool((found > 0).any()):
        raise DataError(f"{owner}: sample_weight must be finite, at least 0, and above 0 somewhere")
    return found.contiguous()

"""Passes over lists of tensors: norms, a quick reading that shows Inf and NaN, and the exact count behind it."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Named = Iterable[tuple[str, Tensor]]
FINITE = sys.float_info.max
_SMALLEST = 2.0**-126  # normal float32


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a sharded tensor (it shares memory with it); any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@dataclass(frozen=True)
class Finding:
    """The first tensor of a list that holds Inf or NaN, where it does, and how many tensors of the list do."""

    name: str
    nans: int
    infs: int
    shape: tuple[int, ...]
    tensors: int
    first_index: int | None = None

    @classmethod
    def of_number(cls, name: str, number: float, tensors: int = 1) -> Finding:
        """That one number is NaN, or else stands for Inf."""
        nan = math.isnan(number)
        return cls(name, int(nan), int(not nan), (), tensors)

    @property
    def kind(self) -> str:
        """``"NaN"`` where there is one, else ``"Inf"``."""
        return "NaN" if self.nans else "Inf"

    @property
    def count(self) -> int:
        """Non-finite elements of either kind."""
        return self.nans + self.infs


def first_bad(tensors: Named, *, inf_allowed: frozenset[str] = frozenset()) -> Finding | None:
    """Count exactly: the first tensor with Inf or NaN (NaN alone for names in ``inf_allowed``), or None. Syncs."""
    first: tuple[str, int, int, tuple[int, ...]] | None = None
    index = None
    bad = 0
    for name, tensor in tensors:
        tensor = local(tensor)
        if not (tensor.is_floating_point() or tensor.is_complex()) or bool(torch.isfinite(tensor).all()):
            continue
        nans = int(torch.isnan(tensor).sum())
        infs = 0 if name in inf_allowed else int(torch.isinf(tensor).sum())
        if nans or infs:
            bad += 1
            if first is None:
                first = (name, nans, infs, tuple(tensor.shape))
                wrong = torch.isfinite(tensor).logical_not() if infs else torch.isnan(tensor)
                index = int(wrong.reshape(-1).nonzero()[0])
    return None if first is None else Finding(*first, bad, index)


class Readings:
    """Numbers on the device and their limits, compared after one read: one sync, however many there are."""

    def __init__(self) -> None:
        self._values: dict[torch.device, list[Tensor]] = {}
        self._limits: dict[torch.device, list[float]] = {}

    def add(self, values: Tensor, limit: float = FINITE) -> None:
        """Ask that every one of ``values`` (any shape, not empty) is at most ``limit``; NaN is not."""
        self._values.setdefault(values.device, []).append(values.reshape(-1))
        self._limits.setdefault(values.device, []).extend([limit] * values.numel())

    def add_norms(self, tensors: Sequence[Tensor], limit: float = FINITE) -> None:
        """Ask it of the float32 norm of each tensor: exceeded by any Inf or NaN in it, and by values above 1e19."""
        for group in norms(tensors):
            self.add(group, limit)

    def exceeded(self) -> bool:
        """Whether any number is above its limit. Syncs once."""
        return any(
            not all(value <= limit for value, limit in zip(torch.cat(values).tolist(), self._limits[device]))
            for device, values in self._values.items()
        )


def norms(tensors: Sequence[Tensor], *, exact: bool = False) -> list[Tensor]:
    """The 2-norm of each tensor, one vector per device and dtype; squares summed in float32, or in float64 if exact."""
    return [
        torch.stack(torch._foreach_norm(group, 2, dtype=torch.float64 if exact else _wide(group[0].dtype)))
        for group in _groups(tensors)
    ]


def global_norm(tensors: Sequence[Tensor], *, exact: bool) -> Tensor:
    """Root of the sum of all squares, 0-dim float64 on the tensors' device; Inf or NaN in any of them shows in it.

    exact: sum squares in float64, so that finite float32 never overflows. Otherwise per-tensor norms are float32 (about
    four times as fast on a CPU) and values above 1e19 give Inf.
    """
    totals = [torch.linalg.vector_norm(group, dtype=torch.float64) for group in norms(tensors, exact=exact)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(totals))
    return total


def whole_norm(tensors: Sequence[Tensor], *, exact: bool, free: bool) -> Tensor:
    """``global_norm``; where reading is free, finite tensors have a finite norm whatever their size."""
    norm = global_norm(tensors, exact=exact)
    if free and not torch.isfinite(norm) and all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        norm = norm.new_tensor(scaled_norm(tensors))
    return norm


def scaled_norm(tensors: Sequence[Tensor]) -> float:
    """The global norm of finite tensors by |max| * norm(x / |max|): safe where even float64 squares overflow. Syncs."""
    largest = max((float(tensor.abs().max()) for tensor in tensors if tensor.numel()), default=0.0)
    if largest == 0.0:
        return 0.0
    return largest * math.sqrt(sum(float((tensor.double() / largest).square().sum()) for tensor in tensors))


def multiply(tensors: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply all tensors in place by a 0-dim float64 factor: one read and write each, on a device two.

    Below float32's normal numbers a factor would have few bits left, or none: it is two, one after the other.
    """
    tiny = factor.abs() < _SMALLEST
    first, second = torch.where(tiny, _SMALLEST, factor), torch.where(tiny, factor / _SMALLEST, 1.0)
    for group in _groups(tensors):
        wide = _wide(group[0].dtype)
        if wide == torch.float64:
            torch._foreach_mul_(group, factor)
            continue
        torch._foreach_mul_(group, first.to(wide))
        if factor.device.type != "cpu" or tiny:
            torch._foreach_mul_(group, second.to(wide))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _groups(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in map(local, tensors):
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return list(groups.values())

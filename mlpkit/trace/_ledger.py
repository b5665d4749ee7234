"""What memory holds, as the native observer knows it: writers of storages, and what the program calls them."""

from __future__ import annotations

from typing import NamedTuple
from weakref import ReferenceType, ref

import torch

from mlpkit import _C
from mlpkit.trace._records import OpRecord


class Cell(NamedTuple):
    """One storage: its last writer, whether it may hold NaN or Inf, and what the program knows it as.

    kind: "", "parameter", "buffer" or "optimizer state".
    """

    record: OpRecord | None
    bad: bool
    kind: str
    name: str


class Ledger:
    """Cells by storage."""

    def __init__(self, native: _C.Observer) -> None:
        self._native = native
        self._leaves: dict[int, ReferenceType[torch.Tensor]] = {}

    def find(self, tensor: torch.Tensor) -> Cell | None:
        """The cell of a tensor's storage, if it was ever seen."""
        found = self._native.find(tensor)
        return Cell(*found) if found is not None else None

    def name(self, tensor: torch.Tensor, kind: str, name: str) -> None:
        """Tell what the program calls a tensor; a name once known is kept over an empty one."""
        cell = self.find(tensor)
        known = cell.name if cell is not None else ""
        self._native.name(tensor, kind, name or known or f"{kind} {len(self._leaves)}")
        if kind == "parameter":
            self._leaves[id(tensor)] = ref(tensor)

    def leaves(self) -> list[torch.Tensor]:
        """Parameters that are still alive."""
        self._leaves = {key: weak for key, weak in self._leaves.items() if weak() is not None}
        return [tensor for tensor in (weak() for weak in self._leaves.values()) if tensor is not None]

    def parameters(self) -> int:
        """How many parameters are known and alive."""
        return len({tensor.untyped_storage()._cdata for tensor in self.leaves()})

    def unmoved(self) -> tuple[list[torch.Tensor], int]:
        """Parameters that the last update left as they were, bit for bit; and of how many."""
        still, total = self._native.unmoved()
        return list(still), int(total)

    def bad_records(self) -> list[OpRecord]:
        """Writers of the bad values that are still held by the program."""
        return list(self._native.bad_records())

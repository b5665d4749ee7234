"""Who wrote which memory: one cell per live storage, found by its address, which a weak reference keeps taken."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import ReferenceType, ref

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from mlpkit.trace._records import OpRecord


@dataclass(slots=True, eq=False)
class Cell:
    """One storage: its last writer, whether it may hold NaN or Inf, and what the program knows it as."""

    storage: StorageWeakRef
    record: OpRecord | None = None
    bad: bool = False
    kind: str = ""  # "parameter", "buffer" or "optimizer state"
    name: str = ""


class Ledger:
    """Cells by storage address."""

    def __init__(self) -> None:
        self._cells: dict[int, Cell] = {}
        self._leaves: dict[int, ReferenceType[torch.Tensor]] = {}
        self._swept = 256

    def find(self, tensor: torch.Tensor) -> Cell | None:
        """The cell of a tensor's storage, if it was ever seen."""
        return self._cells.get(tensor.untyped_storage()._cdata)

    def cell(self, tensor: torch.Tensor) -> Cell:
        """The cell of a tensor's storage, made on first sight."""
        storage = tensor.untyped_storage()
        found = self._cells.get(storage._cdata)
        if found is None:
            if len(self._cells) > 2 * self._swept:
                self.sweep()
            found = self._cells[storage._cdata] = Cell(StorageWeakRef(storage))  # type: ignore[no-untyped-call]
        return found

    def allocated(self, tensor: torch.Tensor) -> None:
        """Fresh memory holds anything at all until it is written."""
        cell = self.cell(tensor)
        cell.record, cell.bad = None, True

    def wrote(self, tensor: torch.Tensor, record: OpRecord, bad: bool) -> Cell:
        """Note a write; a partial one leaves older bad elements in place."""
        cell = self.cell(tensor)
        whole = tensor.numel() * tensor.element_size() >= tensor.untyped_storage().nbytes()
        if whole or bad or not cell.bad:
            cell.record = record
        cell.bad = bad or (cell.bad and not whole)
        return cell

    def name(self, tensor: torch.Tensor, kind: str, name: str) -> None:
        """Tell what the program calls a tensor; a name once known is kept over an empty one."""
        cell = self.cell(tensor)
        cell.kind = kind
        cell.name = name or cell.name or f"{kind} {len(self._leaves)}"
        if kind == "parameter":
            self._leaves[id(tensor)] = ref(tensor)

    def leaves(self) -> list[torch.Tensor]:
        """Parameters that are still alive."""
        return [tensor for tensor in (weak() for weak in self._leaves.values()) if tensor is not None]

    def parameters(self) -> int:
        """How many parameters are known and alive."""
        return len({tensor.untyped_storage()._cdata for tensor in self.leaves()})

    def bad_records(self) -> list[OpRecord]:
        """Writers of the bad values that are still held by the program."""
        self.sweep()
        return [cell.record for cell in self._cells.values() if cell.bad and cell.record is not None]

    def sweep(self) -> None:
        """Drop the cells of storages that are gone."""
        expired = [key for key, cell in self._cells.items() if cell.storage.expired()]  # type: ignore[no-untyped-call]
        for key in expired:
            del self._cells[key]
        self._leaves = {key: weak for key, weak in self._leaves.items() if weak() is not None}
        self._swept = max(256, len(self._cells))

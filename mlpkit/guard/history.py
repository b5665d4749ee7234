"""Every step of a run as one table: printed, written as JSON lines, shown in TensorBoard, or plotted on a page."""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mlpkit.errors import ArgumentError
from mlpkit.guard.record import SkipRecord, plain

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = (
    "step",
    "loss",
    "grad_norm",
    "scale",
    "headroom",
    "skipped",
    "where",
    "culprit",
    "nature",
    "kind",
    "count",
    "rank",
    "action",
)
_SCALARS = ("loss", "grad_norm", "scale", "headroom")


@dataclass
class _Entry:
    step: int
    loss: Tensor | float
    norm: Tensor | float | None
    scale: float
    headroom: float | None
    record: SkipRecord | None


class History:
    """The steps of a ``TrainStep`` or ``GradScaler`` that was given it: ``TrainStep(..., history=History())``.

    ``rows()`` is a list of dicts, ready for any table library; ``print`` shows the last steps and all skips. limit: how
    many steps to keep, all by default. Losses and norms stay on the device until they are read.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ArgumentError(f"History: limit is {limit!r}; it must be an int of at least 1, or None")
        self._entries: deque[_Entry] = deque(maxlen=limit)

    def add(
        self,
        step: int,
        loss: Tensor | float,
        norm: Tensor | float | None,
        scale: float,
        record: SkipRecord | None = None,
        headroom: float | None = None,
    ) -> None:
        """One step: its unscaled loss, unscaled gradient norm, scale, and the record if it was skipped.

        loss, norm: numbers, or scalar tensors of any floating dtype, which are read when the history is: raises
        nothing. headroom: bits to the dtype's largest number.
        """
        self._entries.append(_Entry(step, loss, norm, scale, headroom, record))

    def amend(self, record: SkipRecord) -> None:
        """A new record for the step of that number, with what was done since; nothing if it is no longer kept."""
        for entry in reversed(self._entries):
            if entry.step == record.step:
                entry.record = record
                return

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows())

    @property
    def records(self) -> list[SkipRecord]:
        """Of the skipped steps, and of those taken in float32 instead."""
        return [entry.record for entry in self._entries if entry.record is not None]

    def rows(self) -> list[dict[str, Any]]:
        """One dict a step with the keys ``COLUMNS``; None where a column does not apply. Syncs.

        headroom: bits between the largest gradient and the dtype's limit, of the tensor that has fewest.
        """
        return [_row(entry) for entry in self._entries]

    def table(self, last: int = 20) -> Table:
        """The last steps, and all skips before them, for ``rich.print``. Syncs."""
        from rich.table import Table

        rows = self.rows()
        table = Table(title=f"{len(rows)} steps, {sum(row['skipped'] for row in rows)} skipped")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("where", "culprit", "nature", "action") else "right")
        for index, row in enumerate(rows):
            if row["skipped"] or index >= len(rows) - last:
                table.add_row(*(_cell(row[name]) for name in COLUMNS), style="red" if row["skipped"] else None)
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()

    def write_jsonl(self, path: str | os.PathLike[str]) -> Path:
        """Write one JSON object a line: a row, and for skips the whole record as ``"record"``. Inf and NaN are strings.

        Raises OutputError where the file cannot be written.
        """
        from mlpkit.report import write_whole

        lines = []
        for entry in self._entries:
            row = {key: plain(value) for key, value in _row(entry).items()}
            if entry.record is not None:
                row["record"] = entry.record.to_dict()
            lines.append(json.dumps(row, allow_nan=False))
        return write_whole(path, "".join(f"{line}\n" for line in lines))

    def write_tensorboard(self, target: Any, prefix: str = "guard") -> None:
        """Write scalars and the text of every skip; target: a folder, or a ``SummaryWriter`` that stays open.

        Raises MissingExtraError for a folder without the package tensorboard.
        """
        own = isinstance(target, (str, os.PathLike))
        writer = _writer(target) if own else target
        for entry in self._entries:
            row = _row(entry)
            for name in _SCALARS:
                if row[name] is not None:
                    writer.add_scalar(f"{prefix}/{name}", row[name], entry.step)
            writer.add_scalar(f"{prefix}/skipped", int(row["skipped"]), entry.step)
            if entry.record is not None:
                writer.add_text(f"{prefix}/skip", str(entry.record), entry.step)
        (writer.close if own else writer.flush)()

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write one HTML page: loss, norm, scale and headroom over steps, and the skips. Wants the ``report`` extra."""
        from mlpkit.guard._page import page
        from mlpkit.report import write_whole

        return write_whole(path, page(self))


def _row(entry: _Entry) -> dict[str, Any]:
    entry.loss = float(entry.loss)
    entry.norm = None if entry.norm is None else float(entry.norm)
    record = entry.record
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row.update(step=entry.step, loss=entry.loss, grad_norm=entry.norm, scale=entry.scale, headroom=entry.headroom)
    row["skipped"] = record is not None and not record.taken
    if record is not None:
        for name in ("where", "culprit", "nature", "kind", "count", "rank", "action"):
            row[name] = getattr(record, name)
    return row


def _cell(value: Any) -> str:
    from rich.markup import escape

    if value is None or value is False:
        return ""
    if value is True:
        return "yes"
    return f"{value:.4g}" if isinstance(value, float) else escape(str(value))


def _writer(folder: str | os.PathLike[str]) -> Any:
    from mlpkit.report._extras import require

    require("tensorboard", "History.write_tensorboard into a folder", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(os.fspath(folder))

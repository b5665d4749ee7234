"""A diagnosis for the terminal and for notebooks: sentence, chain, evidence and fixes, by rich."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mlpkit.trace._numbers import short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from mlpkit.trace._diagnosis import Diagnosis

_STYLES = {"failure": "bold red", "warning": "bold yellow", "benign": "dim", "healthy": "bold green"}
_MARKS = {True: "verified", False: "tried: still fails", None: ""}


def view(diagnosis: Diagnosis) -> Group:
    """What ``rich.print(diagnosis)`` shows; names are shown as they are, never read as markup."""
    from rich.console import Group
    from rich.text import Text

    head = Text(f"{diagnosis.verdict}: ", style=_STYLES[diagnosis.verdict])
    head.append(diagnosis.sentence, style="default")
    parts: list[Any] = [head]
    if diagnosis.chain:
        parts.append(_chain(diagnosis))
    if diagnosis.evidence.get("operands") or diagnosis.evidence.get("exact") is not None:
        parts.append(_evidence(diagnosis))
    for fix in diagnosis.fix:
        line = Text("try: ", style="bold")
        line.append(str(fix["text"]), style="default")
        if _MARKS[fix["verified"]]:
            line.append(f" ({_MARKS[fix['verified']]})", style="green" if fix["verified"] else "yellow")
        parts.append(line)
    return Group(*parts)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def _chain(diagnosis: Diagnosis) -> Table:
    columns = ("step", "stage", "op", "module", "detail")
    return _table(columns, [tuple(str(link[name]) for name in columns) for link in diagnosis.chain])


def _evidence(diagnosis: Diagnosis) -> Table:
    evidence = diagnosis.evidence
    rows = [(f"operand {name}", short(value)) for name, value in evidence["operands"].items()]
    rows.append(("result", str(evidence["value"])))
    if evidence["exact"] is not None:
        rows.append(("exact (fp64)", short(evidence["exact"])))
    if evidence["limit"] is not None:
        rows.append((f"largest {diagnosis.dtype}", short(evidence["limit"])))
    return _table(("evidence", "value"), rows)

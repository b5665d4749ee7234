"""A diagnosis for the terminal, by rich, and for notebooks, as HTML: sentence, chain, evidence and fixes."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape as escaped
from typing import TYPE_CHECKING, Any

from mlpkit.trace._numbers import short

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from mlpkit.trace._diagnosis import Diagnosis

_STYLES = {"failure": "bold red", "warning": "bold yellow", "benign": "dim", "healthy": "bold green"}
_COLOURS = {"failure": "#b3261e", "warning": "#9a6700", "benign": "#6e7781", "healthy": "#1a7f37"}
_CHAIN = ("step", "stage", "op", "module", "detail")
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
        if _said(fix):
            line.append(f" {_said(fix)}", style="green" if fix["verified"] else "yellow")
        parts.append(line)
    return Group(*parts)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    return table


def markup(diagnosis: Diagnosis) -> str:
    """What a notebook shows of a diagnosis; every name is escaped."""
    colour, sentence = _COLOURS[diagnosis.verdict], escaped(diagnosis.sentence)
    parts = [f'<p><b style="color:{colour}">{diagnosis.verdict}</b>: {sentence}</p>']
    if diagnosis.chain:
        parts.append(_html_table(_CHAIN, [tuple(str(link[name]) for name in _CHAIN) for link in diagnosis.chain]))
    if diagnosis.evidence.get("operands") or diagnosis.evidence.get("exact") is not None:
        parts.append(_html_table(("evidence", "value"), _evidence_rows(diagnosis)))
    if diagnosis.fix:
        tries = [" ".join(filter(None, (str(fix["text"]), _said(fix)))) for fix in diagnosis.fix]
        parts.append("<p><b>try</b></p><ul>" + "".join(f"<li>{escaped(one)}</li>" for one in tries) + "</ul>")
    return "\n".join(parts)


def _html_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(tag: str, cells: tuple[str, ...]) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaped(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "<table>" + line("th", columns) + "".join(line("td", row) for row in rows) + "</table>"


def _said(fix: dict[str, Any]) -> str:
    """What came of trying a proposal."""
    mark = _MARKS[fix["verified"]]
    return f"({mark})" if mark else ""


def _chain(diagnosis: Diagnosis) -> Table:
    return _table(_CHAIN, [tuple(str(link[name]) for name in _CHAIN) for link in diagnosis.chain])


def _evidence(diagnosis: Diagnosis) -> Table:
    return _table(("evidence", "value"), _evidence_rows(diagnosis))


def _evidence_rows(diagnosis: Diagnosis) -> list[tuple[str, str]]:
    evidence = diagnosis.evidence
    rows = [(f"operand {name}", short(value)) for name, value in evidence["operands"].items()]
    rows.append(("result", str(evidence["value"])))
    if evidence["exact"] is not None:
        rows.append(("exact (fp64)", short(evidence["exact"])))
    if evidence["limit"] is not None:
        rows.append((f"largest {diagnosis.dtype}", short(evidence["limit"])))
    return rows

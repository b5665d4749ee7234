"""What a page is made of: plain data, no markup. Built by tune and trace, drawn by ``mlpkit.report.page``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class Fact:
    """One key number under the verdict: ``Fact("Accuracy", "0.979", "± 0.006 over 5 folds")``."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Text:
    """One paragraph of plain text (escaped)."""

    text: str
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Notes:
    """A short list of plain sentences (escaped)."""

    items: Sequence[str]
    kind: ClassVar[str] = "notes"


@dataclass(frozen=True)
class Code:
    """Preformatted text (escaped): a command line, a traceback, lines of source."""

    text: str
    caption: str = ""
    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Html:
    """Trusted markup, put in as it is. Whoever builds it escapes what came from outside."""

    markup: str
    kind: ClassVar[str] = "html"


@dataclass(frozen=True)
class Table:
    """A table. Cells are strings or numbers; numbers are right-aligned and shown with four significant digits.

    highlight: row numbers (0-based) drawn with emphasis. collapsed: closed behind its caption until opened.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    caption: str = ""
    highlight: Sequence[int] = ()
    collapsed: bool = False
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Figure:
    """A Plotly figure with its text alternative.

    plot: {"data": [...], "layout": {...}} in Plotly's JSON form, numpy-free. A colour written "var(--accent)" follows
    the page's light or dark theme; the names are those of ``theme.css``. alt: one sentence that says what a reader
    would see. table: the numbers behind the figure, offered closed below it. height in pixels.
    """

    title: str
    plot: Mapping[str, Any]
    alt: str
    caption: str = ""
    table: Table | None = None
    height: int = 360
    kind: ClassVar[str] = "figure"


Block = Text | Notes | Code | Html | Table | Figure


@dataclass(frozen=True)
class Section:
    """A titled part of the page: one introducing sentence, then blocks in order."""

    title: str
    blocks: Sequence[Block] = field(default_factory=tuple)
    intro: str = ""

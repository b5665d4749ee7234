"""One self-contained HTML page for every report of mlpkit: template, theme, blocks. Used by tune and trace."""

from __future__ import annotations

from mlpkit.report._files import write_whole
from mlpkit.report.blocks import Block, Code, Fact, Figure, Html, Notes, Section, Table, Text
from mlpkit.report.page import render_page

__all__ = [
    "Block",
    "Code",
    "Fact",
    "Figure",
    "Html",
    "Notes",
    "Section",
    "Table",
    "Text",
    "render_page",
    "write_whole",
]

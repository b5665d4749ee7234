"""Blocks to one HTML file: Jinja2 template, theme and (only where a page has figures) plotly.js, all inlined."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any, Literal

from mlpkit.errors import ArgumentError
from mlpkit.report._extras import require
from mlpkit.report.blocks import Fact, Figure, Section, Table

Tone = Literal["good", "notice", "bad", "neutral"]
_TONES = ("good", "notice", "bad", "neutral")


def render_page(
    *,
    kind: str,
    title: str,
    lead: str,
    verdict: Sequence[str] = (),
    tone: Tone = "neutral",
    facts: Sequence[Fact] = (),
    sections: Sequence[Section] = (),
    data: Mapping[str, Any] | None = None,
    footer: str = "",
) -> str:
    """One complete HTML document that works offline: no request leaves the page.

    kind: small line above the title ("mlpkit tune"). title: the heading. lead: the sentence that stands alone.
    verdict: plain sentences in the verdict box, the first one large; tone colours the box ("good", "notice", "bad",
    "neutral"). facts: a few key numbers below it. sections: ``Section(title, blocks, intro)`` with blocks Text, Notes,
    Code, Table, Figure and Html; each becomes an entry of the page's contents. data: offered as a JSON download.
    footer: a last line. Everything but ``Html`` is escaped. Plotly.js (4.8 MB) goes in once, where a figure is.

    Usage::

        page = render_page(
            kind="mlpkit trace", title="train.py", lead="Step 137, backward of fc2: addmm in float16 gave Inf.",
            verdict=["addmm overflowed.", "The step was skipped.", "24 parameters were saved."], tone="bad",
            sections=[Section("Chain", [Table(["step", "op"], [[137, "addmm"]])])],
        )
        write_whole("report.html", page)

    Raises MissingExtraError without jinja2 (or plotly, where there is a figure), ArgumentError for an unknown tone.
    """
    if tone not in _TONES:
        raise ArgumentError(f"render_page: tone is {tone!r}, must be one of {', '.join(_TONES)}")
    figures = any(isinstance(block, Figure) for section in sections for block in section.blocks)
    jinja2 = require("jinja2", "an HTML report", "report")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(
        cell=_cell, number_columns=_number_columns, script_json=_script_json, base64_json=_base64_json, slug=_slug
    )
    page: str = environment.from_string(_resource("template.html")).render(
        kind=kind,
        title=title,
        lead=lead,
        verdict=list(verdict),
        tone=tone,
        facts=list(facts),
        sections=list(sections),
        data=data,
        footer=footer,
        theme=_resource("theme.css"),
        script=_resource("page.js"),
        plotly_js=_plotly_js() if figures else "",
    )
    return page


def _resource(name: str) -> str:
    return files("mlpkit.report").joinpath(name).read_text(encoding="utf-8")


def _plotly_js() -> str:
    text: str = require("plotly.offline", "a report with figures", "report").get_plotlyjs()
    return text.replace("</script", "<\\/script")


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"[+\-±]?\d[\d,]*(\.\d+)?(e[+-]?\d+)?", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_columns(table: Table) -> list[bool]:
    """Which columns are right-aligned: half of whose filled cells are numbers; names of rows never are."""
    columns = [[row[at] for row in table.rows if row[at] is not None] for at in range(len(table.columns))]
    numbers = [2 * sum(map(_is_number, cells)) >= max(1, len(cells)) for cells in columns]
    if columns and any(isinstance(cell, str) for cell in columns[0]):
        numbers[0] = False
    return numbers


def _cell(value: object) -> str:
    if value is None:
        return "\N{EN DASH}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)


def _plain_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=True, allow_nan=False)


def _base64_json(value: object) -> str:
    return base64.b64encode(_plain_json(value).encode()).decode()


def _script_json(value: object) -> Any:
    # Inside <script> only "<" can end the element; the rest is JSON as it is.
    markup = require("markupsafe", "an HTML report", "report").Markup
    return markup(_plain_json(value).replace("<", "\\u003c"))


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")

"""The page of a guarded run: what happened, four curves over the steps with the skips marked, and the records."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mlpkit.report import Fact, Figure, Section, Table, Text, render_page

if TYPE_CHECKING:
    from mlpkit.guard.history import History

Rows = list[dict[str, Any]]
_CURVES = {
    "loss": ("Loss", "linear", "The loss of every step, unscaled."),
    "grad_norm": ("Gradient norm", "log", "The global norm of the unscaled gradients, before clipping."),
    "scale": ("Loss scale", "log", "Growth and back-off of the loss scale."),
    "headroom": ("Headroom", "linear", "Bits between the largest gradient and the limit of its dtype."),
}


def page(history: History) -> str:
    """One HTML document of a history; raises MissingExtraError without the ``report`` extra."""
    rows = history.rows()
    records = history.records
    skipped = [row for row in rows if row["skipped"]]
    lead = (
        f"{len(rows)} steps, {len(skipped)} skipped; parameters, optimizer and buffers stayed as they were at each."
        if skipped
        else f"{len(rows)} steps, none skipped."
    )
    curves = [_figure(name, rows) for name in _CURVES if any(_usable(row[name]) for row in rows)]
    sections = [Section("Curves", curves or [Text("No step was recorded.")])]
    if records:
        title = "Skips" if len(records) == len(skipped) else "Skips and steps in float32"
        sections.append(Section(title, [_skips(history)], "Who made Inf or NaN, and what kind of fault it was."))
    return render_page(
        kind="mlpkit guard",
        title="Guarded steps",
        lead=lead,
        verdict=[lead, *(str(record) for record in records[:3])],
        tone="notice" if skipped else "good",
        facts=_facts(rows, skipped),
        sections=sections,
        data={"records": [record.to_dict() for record in records]},
    )


def _facts(rows: Rows, skipped: Rows) -> list[Fact]:
    natures = sorted({str(row["nature"]) for row in skipped})
    scales = [row["scale"] for row in rows]
    facts = [Fact("Steps", str(len(rows))), Fact("Skipped", str(len(skipped)), ", ".join(natures))]
    if scales:
        facts.append(Fact("Loss scale", f"{scales[-1]:g}", f"from {min(scales):g} to {max(scales):g}"))
    return facts


def _figure(name: str, rows: Rows) -> Figure:
    title, kind, caption = _CURVES[name]
    taken = [row for row in rows if _usable(row[name]) and not row["skipped"]]
    skipped = [row["step"] for row in rows if row["skipped"]]
    line = {"type": "scatter", "mode": "lines", "name": title.lower(), "line": {"color": "var(--accent)"}}
    marks = [
        {"type": "line", "x0": step, "x1": step, "y0": 0, "y1": 1, "yref": "paper", "line": _MARK} for step in skipped
    ]
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {"type": kind}, "shapes": marks, "showlegend": False}
    data = [{**line, "x": [row["step"] for row in taken], "y": [row[name] for row in taken]}]
    values = [row[name] for row in taken]
    span = f", from {min(values):.4g} to {max(values):.4g}" if values else ""
    return Figure(title, {"data": data, "layout": layout}, f"{title} over {len(taken)} taken steps{span}.", caption)


_MARK = {"color": "var(--bad)", "width": 1, "dash": "dot"}


def _skips(history: History) -> Table:
    columns = ["step", "where", "culprit", "nature", "NaN", "Inf", "first index", "scale", "what was done"]
    cells = [
        [r.step, r.where, r.culprit, r.nature, r.nans, r.infs, r.first_index, r.scale, r.action or "skipped"]
        for r in history.records
    ]
    return Table(columns, cells, "Dotted lines in the curves stand for the skipped steps.")


def _usable(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)

"""The page of a run: one chart a family, the numbers behind it, and the conditions."""

from __future__ import annotations

from typing import Any

from mlpkit.bench import cases
from mlpkit.bench.case import OURS
from mlpkit.bench.table import cells, heading
from mlpkit.report import Fact, Figure, Section, Table, Text, render_page

Row = dict[str, Any]
COLUMNS = ("sizes", "pass", "dtype", "us (minimum)", "rivals' time over ours", "of the floor")


def page(results: dict[str, Any]) -> str:
    """One HTML document of results as ``run`` makes them; raises MissingExtraError without the ``report`` extra."""
    facts = results["environment"]
    families = list(dict.fromkeys(row["family"] for row in results["cases"]))
    sections = [_section(name, [row for row in results["cases"] if row["family"] == name]) for name in families]
    if results["skipped"]:
        sections.append(Section("Not measured", [Text(reason) for reason in results["skipped"]]))
    lead = "Figures of --quick: they show that all runs, and say nothing of speed." if facts["quick"] else ""
    return render_page(
        kind="mlpkit bench",
        title="Beside its rivals",
        lead=lead or "How many times longer each rival took in the same interleaved rounds: above 1, mlpkit is faster.",
        verdict=[heading(facts)],
        tone="notice" if facts["quick"] else "neutral",
        facts=_facts(results),
        sections=sections,
        data=results,
    )


def _facts(results: dict[str, Any]) -> list[Fact]:
    facts = results["environment"]
    peaks = [
        Fact(f"Peak, {dtype}", f"{peak['flops_per_second'] / 1e9:.0f} GFLOP/s", f"one thread, by {peak['product']}")
        for dtype, peak in results["peaks"].items()
    ]
    rivals = ", ".join(f"{name} {version}" for name, version in facts["rivals"].items())
    return [
        Fact("Date", str(facts["date"])[:10], f"commit {str(facts['commit'] or 'unknown')[:8]}"),
        Fact("mlpkit", str(facts["mlpkit"]), rivals),
        Fact("Load", f"{facts['load']:g}", f"{facts['load_after']:g} afterwards, on {facts['cores']} cores"),
        *peaks,
    ]


def _section(family: str, rows: list[Row]) -> Section:
    table = Table(COLUMNS, [cells(row)[1:] for row in rows])
    drawn = [row for row in rows if row["ratio"]]
    return Section(family, [*([_figure(family, drawn)] if drawn else []), table], cases.purpose(family))


def _figure(family: str, rows: list[Row]) -> Figure:
    rivals = list(dict.fromkeys(name for row in rows for name in row["ratio"]))
    names = [f"{row['label']}, {row['what']}, {row['dtype']}" for row in rows]
    data = []
    for rival in rivals:
        kept = [(name, row) for name, row in zip(names, rows) if rival in row["ratio"]]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": rival,
                "marker": {"size": 11},
                "y": [name for name, _ in kept],
                "x": [row["ratio"][rival][row["clock"]]["median"] for _, row in kept],
                "customdata": [1e6 * row["seconds"][OURS][row["clock"]]["median"] for _, row in kept],
                "hovertemplate": "%{y}: %{x:.2f} times our %{customdata:.1f} us",
            }
        )
    one = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": {"color": "var(--quiet)"}}
    layout = {
        "xaxis": {"type": "log", "title": {"text": "times as long as mlpkit (log scale)"}},
        "yaxis": {"autorange": "reversed", "automargin": True},
        "shapes": [one],
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom"},
    }
    compared = [
        row["ratio"][row["baseline"]][row["clock"]]["median"] for row in rows if row["baseline"] in row["ratio"]
    ]
    alt = f"{len(rows)} rows of {family}"
    if compared:
        alt += f": against {rows[0]['baseline']} from {min(compared):.2f} to {max(compared):.2f} times"
    return Figure(family, {"data": data, "layout": layout}, f"{alt}.", height=140 + 30 * len(names))

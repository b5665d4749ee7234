"""The report of a trace as one HTML page: the sentence, the chain, the evidence, magnitudes over steps, the fix."""

from __future__ import annotations

import math
import platform
from typing import TYPE_CHECKING, Any

import torch

from mlpkit.report import Block, Fact, Figure, Notes, Section, Table, Text, render_page
from mlpkit.trace._diagnosis import Diagnosis
from mlpkit.trace._exponents import exponents
from mlpkit.trace._history import History
from mlpkit.trace._numbers import limit, short

if TYPE_CHECKING:
    from mlpkit.trace._tracer import Tracer

_MOST_MODULES = 40
_CAUSES = {
    "overflow": "A finite result was too large for its dtype and became Inf",
    "cast_overflow": "A number was too large for the dtype it was converted to and became Inf",
    "underflow": "A number too small for its dtype was rounded to zero, and something divided by it or took its log",
    "division_by_zero": "A number was divided by zero",
    "zero_over_zero": "Zero was divided by zero, which is NaN",
    "inf_minus_inf": "Inf was subtracted from Inf, which is NaN",
    "zero_times_inf": "Zero was multiplied by Inf, which is NaN",
    "inf_over_inf": "Inf was divided by Inf, which is NaN",
    "log_of_zero": "The logarithm of zero is -Inf",
    "sqrt_of_negative": "The square root of a negative number is NaN",
    "domain": "The argument lay outside the domain of the function",
    "empty_reduction": "A mean over nothing is 0 / 0, which is NaN",
    "external": "The value was bad before any traced operation touched it",
    "hyperparameter": "A setting of the optimizer drove the numbers away",
    "explosion": "Magnitudes grew layer by layer until one passed the dtype's largest number",
}
_OUTCOMES = {True: " (verified: run with it, the failure is gone)", False: " (run with it, it still fails)", None: ""}
_CHAIN_COLUMNS = ("step", "phase", "op", "module", "stage", "cause", "detail")
_STAGE_COLOURS = {
    "explosion": "var(--accent)",
    "saturation": "var(--second)",
    "contamination": "var(--quiet)",
    "invalidation": "var(--bad)",
    "persistence": "var(--bad)",
}


def page(tracer: Tracer, history: History) -> str:
    """The page; raises MissingExtraError without jinja2 or plotly."""
    first = tracer.diagnosis
    bad = first.verdict == "failure"
    sections = [*_failure_sections(first)] if bad else []
    capture = tracer.capture if bad else None
    if capture is not None:
        sections.append(exponents(capture))
    sections += _magnitudes(first, history)
    others = [found for found in tracer.diagnoses if found.to_dict() != first.to_dict()]
    if others:
        table = Table(("verdict", "what"), [(found.verdict, found.sentence) for found in others])
        sections.append(Section("Also seen", [table], "Other births of NaN or Inf; benign ones reached nothing."))
    sections.append(Section("Environment", [_environment(tracer)]))
    return render_page(
        kind="mlpkit trace",
        title="What went wrong, and why" if bad else "No NaN or Inf that mattered",
        lead=first.sentence,
        verdict=_verdict(first) if bad else _all_clear(tracer),
        tone="bad" if bad else "notice" if tracer.raised else "good",
        facts=_facts(first, tracer),
        sections=sections,
        data=tracer.to_dict(),
        footer="NaN and Inf are followed through every operation that ran under the tracer.",
    )


def _all_clear(tracer: Tracer) -> list[str]:
    seen = "Every value that counts stayed finite." if tracer.operations else "There was nothing to check."
    ended = f"The program ended with {tracer.raised}; its own traceback says where."
    return [seen, ended] if tracer.raised else [seen]


def _verdict(first: Diagnosis) -> list[str]:
    lines = [f"{_CAUSES[str(first.cause)]}.", f"It reached {_reached(first)}."]
    return lines + [f"First thing to try: {fix['text']}." for fix in first.fix[:1]]


def _reached(first: Diagnosis) -> str:
    """``loss, parameter `fc1.weight` and 5 more``."""
    parts = []
    sinks = first.evidence["reached"]
    for kind in dict.fromkeys(sink["kind"] for sink in sinks):
        names = [sink["name"] for sink in sinks if sink["kind"] == kind]
        named = f" `{names[0]}`" if names[0] else ""
        parts.append(f"{kind}{named}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    return ", ".join(parts)


def _facts(first: Diagnosis, tracer: Tracer) -> list[Fact]:
    steps = Fact("Steps", str(tracer.steps), f"{tracer.operations} operations checked")
    if first.verdict != "failure":
        return [steps]
    return [
        Fact("Cause", str(first.cause).replace("_", " "), str(first.dtype)),
        Fact("Operation", str(first.op), first.node or str(first.phase)),
        Fact("Module", first.module or "outside modules", first.location or ""),
        Fact("Step", str(first.step), f"of {tracer.steps}; {tracer.operations} operations checked"),
    ]


def _failure_sections(first: Diagnosis) -> list[Section]:
    chain: list[Block] = [_chain_figure(first)] if first.chain else []
    return [
        Section("Chain", chain, "From the root to where the value mattered."),
        Section("Evidence", [_evidence(first)], "The first bad element and what went into it."),
        Section("What to change", [Notes([_fix(fix) for fix in first.fix])], _tried(first)),
    ]


def _fix(fix: dict[str, Any]) -> str:
    return f"{fix['text']}{_OUTCOMES[fix['verified']]}"


def _tried(first: Diagnosis) -> str:
    tried = any(fix["verified"] is not None for fix in first.fix)
    return "Proposals, run again where they could be carried out." if tried else "Proposals, not yet re-run."


def _chain_figure(first: Diagnosis) -> Figure:
    links = first.chain
    table = Table(_CHAIN_COLUMNS, [[link[name] for name in _CHAIN_COLUMNS] for link in links])
    labels = [f"{link['op']}<br>{link['module'] or link['phase']}" for link in links]
    points = {
        "type": "scatter",
        "mode": "lines+markers+text",
        "x": list(range(len(links))),
        "y": [0] * len(links),
        "text": [_escaped(label) for label in labels],
        "textposition": ["top center" if i % 2 == 0 else "bottom center" for i in range(len(links))],
        "hovertext": [_escaped(f"step {link['step']}, {link['stage']}: {link['detail']}") for link in links],
        "hoverinfo": "text",
        "line": {"color": "var(--quiet)", "width": 2},
        "marker": {"size": 18, "color": [_STAGE_COLOURS[link["stage"]] for link in links]},
    }
    layout = {
        "xaxis": {
            "tickvals": list(range(len(links))),
            "ticktext": [link["stage"] for link in links],
            "range": [-0.6, len(links) - 0.4],
        },
        "yaxis": {"visible": False, "range": [-1, 1]},
        "showlegend": False,
    }
    alt = " -> ".join(f"{link['stage']} in {link['op']}" for link in links)
    return Figure("Link by link", {"data": [points], "layout": layout}, alt, table=table, height=260)


def _evidence(first: Diagnosis) -> Table:
    evidence = first.evidence
    rows: list[tuple[str, str]] = [("element", f"{evidence['index']} of {evidence['shape']}")]
    rows += [(f"operand {name}", short(value)) for name, value in evidence["operands"].items()]
    rows.append(("result", evidence["value"]))
    if evidence["exact"] is not None:
        rows.append(("exact result (fp64)", short(evidence["exact"])))
    if evidence["limit"] is not None:
        rows.append((f"largest {first.dtype}", short(evidence["limit"])))
    rows.append(("rule", str(evidence["rule"]).replace("_", " ")))
    if "root" in evidence:
        rows.append(("root", evidence["root"]))
    return Table(("what", "value"), rows)


def _magnitudes(first: Diagnosis, history: History) -> list[Section]:
    blocks: list[Block] = []
    losses = [(step, value) for step, value in history.losses if math.isfinite(value)]
    if len(losses) > 1:
        blocks.append(_line("Loss", losses, first.step))
    if history.modules:
        blocks.append(_heatmap(history, first.step))
    if not blocks:
        blocks.append(Text("Too few steps or modules for a picture."))
    return [Section("Magnitudes", blocks, "Largest absolute values: how the run came to where it is.")]


def _line(title: str, values: list[tuple[int, float]], failed: int | None) -> Figure:
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": [step for step, _ in values],
        "y": [value for _, value in values],
        "line": {"color": "var(--accent)"},
    }
    positive = all(value > 0 for _, value in values)
    layout: dict[str, Any] = {
        "xaxis": _steps_axis([step for step, _ in values]),
        "yaxis": {"title": {"text": title.lower()}, "type": "log" if positive else "linear"},
    }
    if failed is not None:
        layout["shapes"] = [
            {
                "type": "line",
                "x0": failed,
                "x1": failed,
                "y0": 0,
                "y1": 1,
                "yref": "paper",
                "line": {"dash": "dot", "color": "var(--bad)"},
            }
        ]
    alt = (
        f"{title} from {short(values[0][1])} at step {values[0][0]} to {short(values[-1][1])} at step {values[-1][0]}."
    )
    return Figure(title, {"data": [trace], "layout": layout}, alt)


def _steps_axis(steps: list[int]) -> dict[str, Any]:
    few = {"dtick": 1} if max(steps) - min(steps) < 15 else {}
    return {"title": {"text": "step"}, "tickformat": "d", **few}


def _heatmap(history: History, failed: int | None) -> Figure:
    names = list(history.modules)[:_MOST_MODULES]
    last = math.inf if failed is None else failed + 1  # what follows a failure is NaN throughout
    steps = sorted({step for name in names for step, _ in history.modules[name] if step <= last})
    rows = []
    for name in names:
        values = dict(history.modules[name])
        sizes = [values.get(step, 0.0) for step in steps]
        rows.append([math.log2(size) if 0 < size < math.inf else None for size in sizes])
    trace = {
        "type": "heatmap",
        "x": steps,
        "y": [_escaped(name) for name in names],
        "z": rows,
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "log2 absmax"}},
    }
    top = math.log2(limit("float16"))
    table = Table(
        ("module", "first absmax", "last absmax"),
        [(name, short(history.modules[name][0][1]), short(history.modules[name][-1][1])) for name in names],
    )
    layout = {"xaxis": _steps_axis(steps), "yaxis": {"automargin": True, "autorange": "reversed"}}
    caption = f"float16 ends at 2^{top:.0f}, float32 and bfloat16 at 2^128."
    alt = f"Largest magnitude of each of {len(names)} modules over {len(steps)} steps."
    return Figure("Modules", {"data": [trace], "layout": layout}, alt, caption, table, height=160 + 24 * len(names))


def _environment(tracer: Tracer) -> Table:
    rows: list[tuple[str, object]] = [("torch", torch.__version__), ("threads", torch.get_num_threads())]
    rows += [("python", platform.python_version()), ("system", platform.platform(terse=True))]
    return Table(("what", "value"), [*rows, ("steps", tracer.steps)])


def _escaped(text: str) -> str:
    """Plotly reads a little markup in its labels; names come from outside."""
    marked = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return marked.replace("&lt;br&gt;", "<br>")

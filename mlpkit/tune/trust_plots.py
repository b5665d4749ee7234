"""Figures of trust, all on rows that no network learnt from: calibration, intervals, and what certainty is worth."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlpkit.report import Figure, Table
from mlpkit.tune.calibration import calibration_error, softmax

Floats = npt.NDArray[np.float64]
Classes = npt.NDArray[np.int64]

_POINTS = 20
_BARS = 41


def calibration(logits: Floats, truth: Classes, temperature: float) -> Figure:
    """How often the predicted class is right, against how sure the model was of it."""
    plain, chances = softmax(logits), softmax(logits, temperature)
    before, after = calibration_error(plain, truth), calibration_error(chances, truth)
    rows = _bins(chances, truth)
    ideal = {
        "type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "line": {"color": "var(--line)"},
        "name": "perfect", "hoverinfo": "skip",
    }  # fmt: skip
    traces = [
        ideal,
        _curve(_bins(plain, truth), "as trained", "var(--quiet)"),
        _curve(rows, "calibrated", "var(--accent)"),
    ]
    layout = {"xaxis": {"title": {"text": "probability it gave"}}, "yaxis": {"title": {"text": "share that was right"}}}
    return Figure(
        "Calibration",
        {"data": traces, "layout": layout},
        alt=f"Probabilities miss the share of right answers by {after:.3f} on average, as trained by {before:.3f}.",
        caption=f"Calibration error {after:.3f}, as trained {before:.3f}; logits are divided by {temperature:.2f}.",
        table=Table(["Probability", "Right", "Rows"], [list(row) for row in rows], "Calibration"),
        height=320,
    )


def selective(logits: Floats, truth: Classes, temperature: float) -> Figure:
    """Accuracy of the most certain part of the predictions, by how large that part is."""
    chances = softmax(logits, temperature)
    entropy = -(chances * np.log(np.maximum(chances, 1e-300))).sum(axis=1)
    right = (chances.argmax(axis=1) == truth)[np.argsort(entropy, kind="stable")]
    count = np.unique(np.linspace(max(1, len(right) // _POINTS), len(right), _POINTS).astype(int))
    share, accuracy = count / len(right), np.cumsum(right)[count - 1] / count
    half = float(np.cumsum(right)[len(right) // 2 - 1] / max(1, len(right) // 2)) if len(right) > 1 else float(right[0])
    line = {
        "type": "scatter", "mode": "lines+markers", "x": share.tolist(), "y": accuracy.tolist(), "name": "accuracy",
        "line": {"color": "var(--accent)"}, "hovertemplate": "surest %{x:.0%}: %{y:.3f}<extra></extra>",
    }  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "share of rows kept, the surest first"}, "tickformat": ".0%"},
        "yaxis": {"title": {"text": "accuracy among them"}, "tickformat": ".3~f"},
    }
    return Figure(
        "What certainty is worth",
        {"data": [line], "layout": layout},
        alt=f"Accuracy is {accuracy[-1]:.3f} on all rows and {half:.3f} on the surer half.",
        caption=f"The surer half is right {half:.1%} of the time, all rows {accuracy[-1]:.1%}. Certainty is entropy.",
        table=Table(
            ["Share kept", "Accuracy"], [[round(a, 3), float(b)] for a, b in zip(share, accuracy)], "Certainty"
        ),
        height=300,
    )


def coverage(outputs: Floats, truth: Floats) -> Figure:
    """Share of rows inside central intervals of every width; their ends are quantiles of the other half of the rows."""
    missed = truth - outputs[:, 0]
    halves = (missed[::2], missed[1::2])
    levels = np.linspace(0.05, 0.95, 19)
    held = []
    for level in levels:
        inside = []
        for learn, test in (halves, halves[::-1]):
            low, high = np.quantile(learn, [(1 - level) / 2, (1 + level) / 2])
            inside.append((test >= low) & (test <= high))
        held.append(float(np.concatenate(inside).mean()))
    ideal = {
        "type": "scatter", "mode": "lines", "x": [0, 1], "y": [0, 1], "line": {"color": "var(--line)"},
        "name": "perfect", "hoverinfo": "skip",
    }  # fmt: skip
    line = {
        "type": "scatter", "mode": "lines+markers", "x": levels.tolist(), "y": held, "name": "intervals",
        "line": {"color": "var(--accent)"}, "hovertemplate": "promised %{x:.2f}, held %{y:.2f}<extra></extra>",
    }  # fmt: skip
    layout = {"xaxis": {"title": {"text": "promised"}}, "yaxis": {"title": {"text": "share of rows inside"}}}
    ninety = held[-2]
    return Figure(
        "Intervals",
        {"data": [ideal, line], "layout": layout},
        alt=f"A 90 % interval holds {ninety:.1%} of unseen rows.",
        caption=f"Intervals from one half of the unseen rows, tested on the other: 90 % hold {ninety:.1%}.",
        table=Table(["Promised", "Held"], [[round(float(a), 2), b] for a, b in zip(levels, held)], "Intervals"),
        height=320,
    )


def errors(outputs: Floats, truth: Floats, interval: tuple[float, float]) -> Figure:
    """Histogram of truth minus prediction on unseen rows, with the ends of the 90 % interval."""
    missed = truth - outputs[:, 0]
    low, high = np.quantile(missed, [0.002, 0.998])
    count, edges = np.histogram(np.clip(missed, low, high), bins=_BARS)
    centres = (edges[1:] + edges[:-1]) / 2
    bars = {
        "type": "bar", "x": centres.tolist(), "y": count.tolist(), "marker": {"color": "var(--accent)"}, "name": "rows",
        "hovertemplate": "%{x:.3f}: %{y} rows<extra></extra>",
    }  # fmt: skip
    ends = [
        {"type": "line", "xref": "x", "yref": "paper", "x0": end, "x1": end, "y0": 0, "y1": 1,
         "line": {"color": "var(--second)", "dash": "dot"}}
        for end in interval
    ]  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "truth - prediction, in standard deviations of the target"}},
        "yaxis": {"title": {"text": "rows"}}, "shapes": ends,
    }  # fmt: skip
    return Figure(
        "Errors",
        {"data": [bars], "layout": layout},
        alt=f"90 % of errors lie between {interval[0]:.3f} and {interval[1]:.3f} standard deviations of the target.",
        caption="Dotted: the 90 % interval that predictions come with.",
        table=Table(["Error", "Rows"], [[float(a), int(b)] for a, b in zip(centres, count)], "Errors"),
        height=300,
    )


def _bins(chances: Floats, truth: Classes) -> list[tuple[float, float, int]]:
    """(mean probability, share that was right, rows) of the tenths of certainty that hold rows."""
    sure, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    number = np.clip((sure * 10).astype(int), 0, 9)
    used = [number == at for at in range(10) if (number == at).any()]
    return [(float(sure[own].mean()), float(right[own].mean()), int(own.sum())) for own in used]


def _curve(rows: list[tuple[float, float, int]], name: str, colour: str) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+markers", "x": [row[0] for row in rows], "y": [row[1] for row in rows],
        "name": name, "marker": {"color": colour, "size": 9}, "line": {"color": colour},
        "hovertemplate": "said %{x:.2f}, was right %{y:.2f}<extra></extra>",
    }  # fmt: skip

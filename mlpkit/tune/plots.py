"""Figures of the tuning report, as plain Plotly data."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from mlpkit.report import Figure, Table
from mlpkit.tune.fit_verdict import curve
from mlpkit.tune.ladder import Trial

if TYPE_CHECKING:
    from mlpkit.tune.run import Run

_RUNGS = ("no hidden layer", "one hidden layer", "two hidden layers", "three hidden layers")
_TONES = ("var(--quiet)", "var(--accent)", "var(--second)", "var(--good)")
_MOST_A_RUNG = 10
_TOP = 5
_POINTS = 120
_FIVE = ("var(--accent)", "var(--second)", "var(--good)", "#8a6fb0", "var(--quiet)")


def ladder(run: Run) -> Figure:
    """Mean score of every candidate with one SE, the best of each rung joined; band: one SE around the winner."""
    done = _shown(run)
    names = [trial.name for trial in done]
    winner, metric = run.winner, _metric(run)
    traces: list[dict[str, Any]] = [_joined(run)]
    for rung in sorted({len(trial.hidden) for trial in done}):
        members = [trial for trial in done if len(trial.hidden) == rung]
        traces.append(_points(members, _rung(rung), _TONES[min(rung, len(_TONES) - 1)]))
    traces.append(_ring(winner))
    shapes = [_band(winner.mean - winner.se, winner.mean + winner.se)]
    layout = {
        "xaxis": {
            "type": "category",
            "categoryarray": names,
            "categoryorder": "array",
            "title": {"text": "hidden layers"},
        },
        "yaxis": {"title": {"text": metric}, "tickformat": ".3~f"},
        "shapes": shapes,
    }
    rows = [[trial.name, _rung(len(trial.hidden)), f"{trial.mean:.4f}", f"{trial.se:.4f}"] for trial in done]
    best = ", ".join(f"{trial.name} {trial.mean:.3f}" for trial in run.climb.best.values())
    return Figure(
        f"{metric} by hidden layers",
        {"data": traces, "layout": layout},
        alt=f"{metric} of {len(done)} candidates. Best of each rung: {best}. The winner is {winner.name}.",
        caption="The band is one standard error around the winner (ringed); the line joins the best of each rung.",
        table=Table(["Hidden layers", "Rung", metric, "SE"], rows, "Scores by candidate"),
        height=400,
    )


def _shown(run: Run) -> list[Trial]:
    """The best of every depth, from shallow to deep, in the order they were tried."""
    done = [trial for trial in run.trials if trial.state == "complete"]
    shown = []
    for rung in sorted({len(trial.hidden) for trial in done}):
        members = [trial for trial in done if len(trial.hidden) == rung]
        best = sorted(members, key=lambda trial: -trial.mean)[:_MOST_A_RUNG]
        shown += [trial for trial in members if trial in best or trial is run.climb.best.get(rung)]
    return shown


def _rung(layers: int) -> str:
    return _RUNGS[layers] if layers < len(_RUNGS) else f"{layers} hidden layers"


def curves(run: Run) -> Figure:
    """Training and validation loss of the winner, by epoch."""
    outcomes = run.winner.outcomes
    traces: list[dict[str, Any]] = []
    parts = (("training", "train_loss", "var(--quiet)"), ("validation", "validation_loss", "var(--accent)"))
    for title, attribute, colour in parts:
        lines = [getattr(outcome, attribute) for outcome in outcomes]
        traces += [_line(line, title, colour, 1, 0.35, False) for line in lines]
        traces.append(_line(_mean_curve(lines), title, colour, 2.6, 1.0, True))
    best = [outcome.best_epoch + 1 for outcome in outcomes]
    lowest = [min(outcome.validation_loss) for outcome in outcomes]
    traces.append(
        {
            "type": "scatter", "mode": "markers", "x": best, "y": lowest, "name": "epoch kept",
            "marker": {"color": "var(--second)", "size": 8}, "hovertemplate": "epoch %{x}: %{y:.4f}<extra></extra>",
        }
    )  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero", "showgrid": False},
        "yaxis": {"title": {"text": "loss"}, "type": "log", **_log_ticks(*_range(traces))},
    }
    rows = [
        [number + 1, outcome.best_epoch + 1, outcome.train_loss[outcome.best_epoch], min(outcome.validation_loss),
         outcome.validation_loss[-1], outcome.stopped]
        for number, outcome in enumerate(outcomes)
    ]  # fmt: skip
    columns = [
        "Fold",
        "Best epoch",
        "Training loss there",
        "Validation loss there",
        "Validation loss at the end",
        "Stopped by",
    ]
    return Figure(
        f"Learning curves of {run.winner.name}",
        {"data": traces, "layout": layout},
        alt=(
            f"Loss by epoch on {len(outcomes)} folds. Validation loss is lowest at epochs {min(best)} to {max(best)},"
            f" on average {np.mean(lowest):.3f}."
        ),
        table=Table(columns, rows, "Learning by fold"),
    )


def top_curves(run: Run) -> Figure:
    """Mean training and validation loss of the best five candidates, each with what its curves say."""
    done = sorted((trial for trial in run.trials if trial.state == "complete"), key=lambda trial: -trial.mean)
    top = [run.winner, *(trial for trial in done if trial is not run.winner)][:_TOP]
    traces: list[dict[str, Any]] = []
    for trial, colour in zip(top, _FIVE):
        for attribute, dash, width in (("validation_loss", "solid", 2.2), ("train_loss", "dot", 1.2)):
            mean = _mean_curve([getattr(outcome, attribute) for outcome in trial.outcomes])
            step = max(1, len(mean) // _POINTS)
            line = _line(mean[::step], trial.name, colour, width, 1.0, dash == "solid")
            line["x"] = list(range(1, len(mean) + 1, step))
            line["line"]["dash"] = dash
            traces.append(line)
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero", "showgrid": False},
        "yaxis": {"title": {"text": "loss"}, "type": "log", **_log_ticks(*_range(traces))},
    }
    told = [curve(trial) for trial in top]
    rows: list[list[object]] = [
        [trial.name, f"{trial.mean:.4f}", f"{trial.train_mean:.4f}", words] for trial, words in zip(top, told)
    ]
    return Figure(
        f"Learning curves of the best {len(top)}",
        {"data": traces, "layout": layout},
        alt="; ".join(f"{trial.name}: {words}" for trial, words in zip(top, told)) + ".",
        caption="Means over the folds as far as every fold goes; solid: validation, dotted: training.",
        table=Table(["Candidate", _metric(run), "On training rows", "Curves"], rows, "Verdicts on the best"),
        height=360,
    )


def folds(run: Run) -> Figure:
    """Test score of the winner and of linear on every fold, joined in pairs."""
    winner, linear, metric = run.winner, run.climb.linear, _metric(run)
    rival = linear if winner is not linear else _best_other(run)
    names = [f"fold {number + 1}" for number in range(len(winner.scores))]
    pairs = [(winner, "var(--accent)")] if rival is None else [(rival, "var(--quiet)"), (winner, "var(--accent)")]
    traces = [] if rival is None else _bars(names, winner.scores, rival.scores)
    for trial, colour in pairs:
        marker = {"color": colour, "size": 12}
        traces.append({"type": "scatter", "mode": "markers", "x": trial.scores, "y": names, "name": trial.name,
                       "marker": marker, "hovertemplate": "%{y}: %{x:.4f}<extra></extra>"})  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": metric}, "tickformat": ".3~f"},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
    }
    columns = ["Fold", *(trial.name for trial, _ in pairs)]
    rows = [[name, *(f"{trial.scores[at]:.4f}" for trial, _ in pairs)] for at, name in enumerate(names)]
    worst, best = min(winner.scores), max(winner.scores)
    return Figure(
        f"{metric} on each fold",
        {"data": traces, "layout": layout},
        alt=f"{metric} of the winner {winner.name} runs from {worst:.3f} to {best:.3f} over {len(names)} folds.",
        table=Table(columns, rows, "Scores by fold"),
        height=110 + 38 * len(names),
    )


def _metric(run: Run) -> str:
    return "R²" if run.metric == "R2" else "Accuracy"


def _best_other(run: Run) -> Trial | None:
    others = [trial for trial in run.climb.best.values() if trial is not run.winner]
    return max(others, key=lambda trial: trial.mean) if others else None


def _bars(names: list[str], ends: list[float], starts: list[float]) -> list[dict[str, Any]]:
    line = {"color": "var(--line)", "width": 3}
    return [
        {"type": "scatter", "mode": "lines", "x": [start, end], "y": [name, name], "line": line, "showlegend": False,
         "hoverinfo": "skip"}
        for name, start, end in zip(names, starts, ends)
    ]  # fmt: skip


def _points(members: list[Trial], title: str, colour: str) -> dict[str, Any]:
    error = [trial.se for trial in members]
    return {
        "type": "scatter", "mode": "markers", "name": title, "x": [trial.name for trial in members],
        "y": [trial.mean for trial in members], "marker": {"color": colour, "size": 10},
        "error_y": {"type": "data", "array": error, "color": colour, "thickness": 1.4, "width": 5},
        "hovertemplate": "%{x}: %{y:.4f} ± %{error_y.array:.4f}<extra></extra>",
    }  # fmt: skip


def _ring(winner: Trial) -> dict[str, Any]:
    marker = {"symbol": "circle-open", "color": "var(--ink)", "size": 19, "line": {"width": 2}}
    return {"type": "scatter", "mode": "markers", "name": "winner", "x": [winner.name], "y": [winner.mean],
            "marker": marker, "hoverinfo": "skip"}  # fmt: skip


def _joined(run: Run) -> dict[str, Any]:
    best = list(run.climb.best.values())
    return {
        "type": "scatter", "mode": "lines", "x": [trial.name for trial in best], "y": [trial.mean for trial in best],
        "line": {"color": "var(--quiet)", "width": 1.4, "dash": "dot"}, "showlegend": False, "hoverinfo": "skip",
    }  # fmt: skip


def _band(low: float, high: float) -> dict[str, Any]:
    return {
        "type": "rect", "xref": "paper", "x0": 0, "x1": 1, "yref": "y", "y0": low, "y1": high, "layer": "below",
        "fillcolor": "var(--band)", "line": {"width": 0},
    }  # fmt: skip


def _line(values: list[float], title: str, colour: str, width: float, opacity: float, legend: bool) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines", "x": list(range(1, len(values) + 1)), "y": values, "name": title,
        "line": {"color": colour, "width": width}, "opacity": opacity, "showlegend": legend,
        "hoverinfo": "all" if legend else "skip", "hovertemplate": "epoch %{x}: %{y:.4f}" if legend else None,
    }  # fmt: skip


def _mean_curve(lines: list[list[float]]) -> list[float]:
    # As far as every fold goes: past the first stop the mean would be of other folds.
    length = min(len(line) for line in lines)
    return [float(value) for value in np.mean([line[:length] for line in lines], axis=0)]


def _range(traces: list[dict[str, Any]]) -> tuple[float, float]:
    values = [value for trace in traces for value in trace["y"] if value > 0.0]
    return (min(values), max(values)) if values else (0.1, 1.0)


def _log_ticks(low: float, high: float) -> dict[str, Any]:
    """1, 2, 5 of every decade where few decades are shown, else the decades alone."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 300 * low else (1,)
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    shown = [tick for tick in ticks if low / 2 <= tick <= high * 2]
    return {"tickvals": shown, "ticktext": [f"{tick:.3g}" for tick in shown]}

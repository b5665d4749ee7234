"""Figures of what was searched: parallel coordinates, slices, contours, importance. Fixed in size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mlpkit.report import Figure, Table
from mlpkit.tune.importance import Importance
from mlpkit.tune.ladder import Trial
from mlpkit.tune.parts import Choice
from mlpkit.tune.space import Space

if TYPE_CHECKING:
    from mlpkit.tune.run import Run

_MOST_LINES = 2000
_MOST_AXES = 9
_GRID = 40
_CONTOURS = (("lr", "width"), ("lr", "weight_decay"), ("dropout", "weight_decay"))
_TEXTBOOK = "The textbook order is: learning rate; then momentum, batch size and units; then layers and decay."


def usable(run: Run) -> list[Trial]:
    """Trials with a score and something chosen, the best last, so that it is drawn on top."""
    found = [trial for trial in run.trials if trial.params and _score(trial) is not None]
    return sorted(found, key=lambda trial: _score(trial) or 0.0)[-_MOST_LINES:]


def parallel(run: Run, space: Space, order: Sequence[str]) -> Figure | None:
    """One line a trial over the parts that were searched, the best in gold; drag along an axis to keep some."""
    trials = usable(run)
    names = [name for name in order if len({trial.params.get(name) for trial in trials}) > 1][:_MOST_AXES]
    if len(trials) < 3 or not names:
        return None
    scores = [_score(trial) or 0.0 for trial in trials]
    axes: list[dict[str, Any]] = [_axis(name, trials, space) for name in names]
    axes.append({"label": run.metric, "values": scores})
    # The best has a colour of its own: the end of the scale is reached by it alone.
    colour = [*np.linspace(0.0, 0.8, len(trials) - 1).tolist(), 1.0]
    line = {"color": colour, "colorscale": [[0, "#9aa5b1"], [0.8, "#3b6ea8"], [0.81, "#d4a017"], [1, "#d4a017"]]}
    best = trials[-1]
    rows = [
        [trial.name, *(_cell(trial.params.get(name)) for name in names), f"{_score(trial):.4f}"] for trial in trials
    ]
    return Figure(
        "Parallel coordinates",
        {"data": [{"type": "parcoords", "dimensions": axes, "line": line}], "layout": {"margin": {"l": 60, "r": 60}}},
        alt=f"{len(trials)} trials over {', '.join(names)}; best: {best.name}, {run.metric} {scores[-1]:.3f}.",
        caption="Drag along an axis to keep the trials that pass there. The best is gold.",
        table=Table(["Candidate", *names, run.metric], rows[::-1][:200], "The best 200 trials"),
        height=420,
    )


def slices(run: Run, space: Space, order: Sequence[str]) -> list[Figure]:
    """Score against each part, one figure a part, with the alarm of its border where there is one."""
    alarms = {verdict.value: verdict.text for verdict in run.verdicts if verdict.kind == "border"}
    told = {verdict.numbers["part"]: verdict.text for verdict in run.verdicts if verdict.kind == "hyperparameter"}
    figures = []
    for name in list(order)[:_MOST_AXES]:
        trials = [trial for trial in usable(run) if name in trial.params]
        if len({trial.params[name] for trial in trials}) < 2:
            continue
        part = space.parts[name]
        numbers = part.ordered
        x = [trial.params[name] if numbers else str(trial.params[name]) for trial in trials]
        y = [_score(trial) for trial in trials]
        trace = {
            "type": "scatter", "mode": "markers", "x": x, "y": y, "text": [trial.name for trial in trials],
            "marker": {"color": "var(--accent)", "size": 7, "opacity": 0.6},
            "hovertemplate": "%{text}: %{y:.4f}<extra></extra>",
        }  # fmt: skip
        best = {
            "type": "scatter", "mode": "markers", "x": x[-1:], "y": y[-1:], "name": "best", "hoverinfo": "skip",
            "marker": {"color": "#d4a017", "size": 12},
        }  # fmt: skip
        log = numbers and (isinstance(part, Choice) or part.log) and min(float(value or 0) for value in x) > 0
        axis = {"title": {"text": name}, "type": "log" if log else "linear" if numbers else "category"}
        layout = {"xaxis": axis, "yaxis": {"title": {"text": run.metric}, "tickformat": ".3~f"}, "showlegend": False}
        caption = " ".join(text for text in (told.get(name, ""), alarms.get(name, "")) if text)
        rows = [[_cell(trial.params[name]), f"{_score(trial):.4f}", trial.name] for trial in trials[::-1][:100]]
        figures.append(
            Figure(
                f"Slice: {name}", {"data": [trace, best], "layout": layout},
                alt=f"{run.metric} of {len(trials)} trials against {name}; best at {_cell(trials[-1].params[name])}.",
                caption=caption, table=Table([name, run.metric, "Candidate"], rows, "The best 100 trials"), height=280,
            )
        )  # fmt: skip
    return figures


def contours(run: Run, space: Space) -> list[Figure]:
    """Score over two parts at a time: a smoothed grid of fixed size under the trials."""
    figures = []
    for one, other in _CONTOURS:
        trials = [trial for trial in usable(run) if one in trial.params and other in trial.params]
        spread = [len({trial.params[name] for trial in trials}) for name in (one, other)]
        if len(trials) < 8 or min(spread) < 3:
            continue
        points = np.array([[_unit(space, name, trial) for name in (one, other)] for trial in trials])
        scores = np.array([_score(trial) for trial in trials])
        z = _smooth(points, scores)
        ticks = np.linspace(0.0, 1.0, _GRID)
        grid = {
            "type": "contour", "x": ticks.tolist(), "y": ticks.tolist(), "z": z.tolist(), "colorscale": "Viridis",
            "contours": {"coloring": "heatmap"}, "hoverinfo": "skip",
        }  # fmt: skip
        dots = {
            "type": "scatter", "mode": "markers", "x": points[:, 0].tolist(), "y": points[:, 1].tolist(),
            "text": [f"{_cell(t.params[one])}, {_cell(t.params[other])}: {_score(t):.4f}" for t in trials],
            "hovertemplate": "%{text}<extra></extra>", "marker": {"size": 6, "color": "#ffffff", "line": {"width": 1}},
        }  # fmt: skip
        layout = {"xaxis": _unit_axis(space, one), "yaxis": _unit_axis(space, other), "showlegend": False}
        best = f"{_cell(trials[-1].params[one])}, {_cell(trials[-1].params[other])}"
        rows = [[_cell(t.params[one]), _cell(t.params[other]), f"{_score(t):.4f}"] for t in trials[::-1][:100]]
        figures.append(
            Figure(
                f"Contour: {one} and {other}", {"data": [grid, dots], "layout": layout},
                alt=f"{run.metric} over {one} and {other}; best at {best}.",
                caption="A Gaussian mean of the trials nearby, not a model of its own; the dots are the trials.",
                table=Table([one, other, run.metric], rows, "The best 100 trials"), height=380,
            )
        )  # fmt: skip
    return figures


def importances(found: Sequence[Importance]) -> Figure | None:
    """Bars with 90 % intervals; a bar whose interval holds 0 is pale."""
    if not found:
        return None
    shown = list(found)[:12][::-1]
    bars = {
        "type": "bar", "orientation": "h", "y": [item.name for item in shown], "x": [item.value for item in shown],
        "marker": {"color": ["var(--accent)" if item.low > 0 else "var(--line)" for item in shown]},
        "error_x": {
            "type": "data", "symmetric": False, "array": [max(0.0, item.high - item.value) for item in shown],
            "arrayminus": [max(0.0, item.value - item.low) for item in shown],
        },
        "hovertemplate": "%{y}: %{x:.3f}<extra></extra>",
    }  # fmt: skip
    rows = [[item.name, item.value, item.low, item.high, item.trials] for item in found]
    sure = [item.name for item in found if item.low > 0]
    return Figure(
        "Importance",
        {"data": [bars], "layout": {"xaxis": {"title": {"text": "importance above chance"}}}},
        alt=f"Importance of {len(found)} parts. Above chance: {', '.join(sure) or 'none'}.",
        caption=f"PED-ANOVA with 90 % intervals; pale bars may be chance. {_TEXTBOOK}",
        table=Table(["Part", "Importance", "Low", "High", "Trials"], rows, "Importance"),
        height=120 + 26 * len(shown),
    )


def _score(trial: Trial) -> float | None:
    scores = [outcome.score for outcome in trial.outcomes if outcome.finished]
    return float(np.mean(scores)) if scores and trial.state in ("complete", "pruned") else None


def _axis(name: str, trials: Sequence[Trial], space: Space) -> dict[str, Any]:
    part = space.parts[name]
    if not isinstance(part, Choice) and part.ordered:
        values = [_unit(space, name, trial) if name in trial.params else -0.1 for trial in trials]
        ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
        return {
            "label": name,
            "values": values,
            "tickvals": ticks,
            "ticktext": [_cell(part.from_unit(u)) for u in ticks],
        }
    seen = list(dict.fromkeys(str(trial.params.get(name, "-")) for trial in trials))
    labels = sorted(seen, key=_by_number)
    values = [float(labels.index(str(trial.params.get(name, "-")))) for trial in trials]
    return {"label": name, "values": values, "tickvals": list(range(len(labels))), "ticktext": labels}


def _by_number(text: str) -> tuple[bool, float, str]:
    number = text.replace(".", "", 1).isdigit()
    return not number, float(text) if number else 0.0, text


def _unit(space: Space, name: str, trial: Trial) -> float:
    part, value = space.parts[name], trial.params[name]
    return part.to_unit(value) if not isinstance(part, Choice) or value in part.values else 0.5


def _unit_axis(space: Space, name: str) -> dict[str, Any]:
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    text = [_cell(space.parts[name].from_unit(u)) for u in ticks]
    return {"title": {"text": name}, "range": [0, 1], "tickvals": ticks, "ticktext": text}


def _smooth(points: npt.NDArray[np.float64], scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    ticks = np.linspace(0.0, 1.0, _GRID)
    x, y = np.meshgrid(ticks, ticks)
    distance = (x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2
    weight = np.exp(-distance / (2 * 0.1**2)) + 1e-9
    mean: npt.NDArray[np.float64] = (weight * scores).sum(-1) / weight.sum(-1)
    return np.round(mean, 5)


def _cell(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

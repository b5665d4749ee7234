"""What the trials say about the hyperparameters: robust or volatile, at a border, wide or tapered, dropout or decay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from mlpkit.tune import stats
from mlpkit.tune.ensemble import Committee
from mlpkit.tune.importance import Importance, importance
from mlpkit.tune.ladder import Climb, Trial
from mlpkit.tune.parts import Choice, Value
from mlpkit.tune.space import Space

Tone = Literal["good", "notice", "bad"]

_SPAN = 0.2  # A part is robust where the best tenth spans this much of its range ...
_NEAR = 0.15  # ... and a neighbour differs by at most this much of it.
_LEAST = 12
_BORDER = 0.05
_LEAST_STEPS = 4  # Of so few values one or the other is always at an end.
_LEAK_JUMP = 0.2


@dataclass(frozen=True)
class Verdict:
    """One finding. kind: what it is about; value: one word; numbers: what decided."""

    kind: str
    value: str
    text: str
    tone: Tone = "good"
    numbers: dict[str, Any] = field(default_factory=dict)


def hyperparameters(trials: Sequence[Trial], space: Space, winner: Trial) -> list[Verdict]:
    """For each part that was searched: "robust", "volatile" or "inconclusive", with the number that decided.

    The best tenth of the trials (at least 5) is set against the noise of the winner's folds. Volatile: the best
    tenth lies close together, and the best of those about 0.15 of the range away loses more than twice that noise, as
    does everything further off; robust: the best tenth spans at least 0.2 of the part's range (or two values) within
    one SE of the best, or the part has no importance above chance.
    """
    found = []
    done = [trial for trial in trials if _scored(trial)]
    weights = {item.name: item for item in importance(trials, space)}
    for name in space.free():
        used = [trial for trial in done if name in trial.params and _on(space, name, trial.params[name])]
        if len({trial.params[name] for trial in used}) < 2:
            continue
        found.append(_one(name, used, space, winner, weights.get(name)))
    return found


def borders(trials: Sequence[Trial], space: Space) -> list[Verdict]:
    """An alarm for each range whose best trials crowd at an end of it: widen it there."""
    found = []
    done = sorted((trial for trial in trials if _scored(trial)), key=_mean, reverse=True)
    for name in space.free():
        part = space.parts[name]
        used = [trial for trial in done if name in trial.params and _on(space, name, trial.params[name])]
        few = isinstance(part, Choice) and len(part.values) < _LEAST_STEPS
        if not part.ordered or few or len(used) < _LEAST:
            continue
        top = [part.to_unit(trial.params[name]) for trial in used[: max(3, len(used) // 10)]]
        # So many as are looked at fill a share of the range by themselves, however close they crowd.
        edge = 0.5 / len(part.values) if isinstance(part, Choice) else max(_BORDER, 1.5 * len(top) / len(used))
        values = [float(v or 0) for v in (part.values if isinstance(part, Choice) else (part.low, part.high))]
        for end, crowd in (
            ("low", sum(u <= edge + 1e-9 for u in top)),
            ("high", sum(u >= 1 - edge - 1e-9 for u in top)),
        ):
            if crowd * 2 > len(top) and not _natural(end, values):
                value = min(values) if (end == "low") != bool(getattr(part, "complement", False)) else max(values)
                text = f"Widen {name}: {crowd} of the best {len(top)} lie at {value:.3g}, an end of what was searched."
                numbers = {"part": name, "crowd": crowd, "of": len(top), "end": value}
                found.append(Verdict("border", name, text, "notice", numbers))
    return found


def shape(climb: Climb) -> Verdict | None:
    """Wide against tapered, at the same depth and first width where there is such a pair, else best against best."""
    deep = [trial for trial in climb.trials if len(trial.hidden) >= 2 and trial.state == "complete"]
    wide = [trial for trial in deep if len(set(trial.hidden)) == 1]
    tapered = [trial for trial in deep if trial.hidden[-1] < trial.hidden[0]]
    if not wide or not tapered:
        return None
    one, other = max(wide, key=_mean), max(tapered, key=_mean)
    step = stats.compare(other.scores, one.scores)
    numbers = {"wide": one.mean, "tapered": other.mean, "gain": step.gain, "se": step.se}
    told = f"({other.name} {other.mean:.3f}, {one.name} {one.mean:.3f}: {abs(step.ratio):.1f} SE)"
    if abs(step.ratio) < 1.0:
        text = f"Wide or tapered makes no difference here {told}: take the tapered one, it is smaller."
        return Verdict("shape", "either", text, "good", numbers)
    better = "tapered" if step.ratio > 0 else "wide"
    return Verdict("shape", better, f"Layers are better {better} {told}.", "good", numbers)


def ensemble(committee: Committee | None, metric: str) -> Verdict | None:
    """Whether an average of finalists predicts better than the winner, judged where it was not chosen."""
    if committee is None:
        return None
    count, step = len(committee.trials), committee.step
    unit = "nats of log loss a row" if metric == "accuracy" else "of the target's variance"
    numbers = {"networks": count, "saved": step.gain, "se": step.se, "score": committee.score}
    told = f"{abs(step.gain):.3f} {unit}, {abs(step.ratio):.1f} SE"
    if committee.better:
        seeds = f" ({max(committee.seeds) + 1} of them the winner from other seeds)" if any(committee.seeds) else ""
        change = "saves" if step.gain >= 0 else "costs"
        text = (
            f"An average of {count} networks{seeds} predicts: it {change} {told}; {metric} {committee.score:.3f} on"
            " unseen rows."
        )
        return Verdict("ensemble", "average", text, "good", numbers)
    change = "saves" if step.gain > 0 else "costs"
    text = f"One network predicts: an average of finalists {change} {told}, at {metric} {committee.score:.3f}."
    return Verdict("ensemble", "single", text, "good", numbers)


def regularisation(climb: Climb) -> Verdict | None:
    """Dropout against weight decay: the best trials with much of the one, of the other, and with little of both."""
    used = [
        trial
        for trial in climb.trials
        if trial.state == "complete" and trial.hidden and {"dropout", "weight_decay"} <= set(trial.params)
    ]
    if len(used) < _LEAST:
        return None
    rate = float(np.median([float(trial.params["dropout"]) for trial in used]))
    decay = float(np.median([float(trial.params["weight_decay"]) for trial in used]))
    groups: dict[str, list[Trial]] = {"dropout": [], "decay": [], "both": [], "neither": []}
    for trial in used:
        high = (float(trial.params["dropout"]) > rate, float(trial.params["weight_decay"]) > decay)
        groups[{(True, False): "dropout", (False, True): "decay", (True, True): "both"}.get(high, "neither")].append(
            trial
        )
    best = {name: max(group, key=_mean) for name, group in groups.items() if group}
    order = sorted(best, key=lambda name: -best[name].mean)
    if len(order) < 2:
        return None
    step = stats.compare(best[order[0]].scores, best[order[1]].scores)
    words = {"dropout": "more dropout", "decay": "more weight decay", "both": "both", "neither": "little of either"}
    numbers = {name: trial.mean for name, trial in best.items()}
    told = f"dropout above {rate:.2g}, decay above {decay:.2g}"
    if step.ratio < 1.0:
        text = f"Dropout or weight decay: no difference beyond one SE ({words[order[0]]} leads; {told})."
        return Verdict("regularisation", "either", text, "good", numbers)
    text = f"Dropout or weight decay: {words[order[0]]} wins by {step.ratio:.1f} SE over {words[order[1]]} ({told})."
    return Verdict("regularisation", order[0], text, "good", numbers)


def leakage(columns: Sequence[tuple[str, float]], metric: str) -> Verdict | None:
    """One column that alone gives nearly all of the score, far ahead of the next: does it know the target?

    columns: (name, score of the column alone on rows it did not learn from).
    """
    best = max(columns, key=lambda item: item[1]) if columns else None
    if best is not None and best[1] >= 0.98 and len(columns) > 1:
        second = sorted((score for _, score in columns), reverse=True)[1]
        if best[1] - second > _LEAK_JUMP:
            text = (
                f"Leakage? Column {best[0]!r} alone reaches {metric} {best[1]:.3f}, the next {second:.3f}:"
                " make sure that it is known before the target is."
            )
            return Verdict("leakage", "suspected", text, "bad", {"column": best[0], "alone": best[1], "next": second})
    return None


def _one(name: str, used: Sequence[Trial], space: Space, winner: Trial, weight: Importance | None) -> Verdict:
    part = space.parts[name]
    ranked = sorted(used, key=_mean, reverse=True)
    if len(used) < _LEAST:
        text = f"{name}: inconclusive after {len(used)} trials; {_LEAST - len(used)} more would tell."
        return Verdict("hyperparameter", "inconclusive", text, "good", {"part": name, "trials": len(used)})
    if weight is not None and weight.low <= 0.0 and len(used) >= 2 * _LEAST:
        text = f"{name}: robust; what it was set to explains nothing of the score (importance {weight.value:.2f})."
        return Verdict("hyperparameter", "robust", text, "good", {"part": name, "importance": weight.value})
    noise = max(stats.standard_error(winner.scores), 1e-9)
    top = ranked[: max(5, math.ceil(len(ranked) / 10))]
    close = [trial for trial in top if _mean(ranked[0]) - _mean(trial) <= noise]
    units = [part.to_unit(trial.params[name]) for trial in close]
    span = max(units) - min(units)
    centre = part.to_unit(ranked[0].params[name])
    # The best of the neighbours, whatever else they chose: other parts are not to blame this one.
    step = _step(part)
    ring = [trial for trial in ranked if 0.5 * step <= abs(part.to_unit(trial.params[name]) - centre) <= 1.5 * step]
    fall = _mean(ranked[0]) - _mean(ring[0]) if ring else 0.0
    apart = _mean(ranked[0]) - _elsewhere(name, ranked, space, centre)
    numbers = {"part": name, "span": span, "noise": noise, "fall_nearby": fall, "fall_elsewhere": apart}
    distinct = len({trial.params[name] for trial in close})
    wide = span >= _SPAN if not isinstance(part, Choice) else distinct >= 2
    if wide and apart <= 2 * noise:
        text = f"{name}: robust; values over {span:.0%} of its range reach the best within one SE."
        return Verdict("hyperparameter", "robust", text, "good", numbers)
    if not wide and apart > 2 * noise and fall > 2 * noise:
        near = _word(ranked[0].params[name])
        text = f"{name}: volatile; near {near} already {fall:.3f} are lost ({fall / noise:.1f} SE)."
        return Verdict("hyperparameter", "volatile", text, "notice", numbers)
    if wide:
        text = f"{name}: robust near its best; elsewhere {apart / noise:.1f} SE are lost."
        return Verdict("hyperparameter", "robust", text, "good", numbers)
    text = f"{name}: inconclusive; the best {len(close)} lie close together, but others lose less than the noise."
    return Verdict("hyperparameter", "inconclusive", text, "good", numbers)


def _elsewhere(name: str, ranked: Sequence[Trial], space: Space, centre: float) -> float:
    """The best score more than a neighbour away from the best value."""
    part = space.parts[name]
    far = [trial for trial in ranked if abs(part.to_unit(trial.params[name]) - centre) > _step(part)]
    return _mean(far[0]) if far else _mean(ranked[0])


def _step(part: Any) -> float:
    return 1.01 / len(part.values) if isinstance(part, Choice) and part.ordered else _NEAR


def _on(space: Space, name: str, value: Value) -> bool:
    part = space.parts[name]
    return not isinstance(part, Choice) or value in part.values


def _natural(end: str, values: Sequence[float]) -> bool:
    """True at an end beyond which there is nothing: no dropout, no layer, no penalty."""
    return end == "low" and min(values) == 0.0


def _scored(trial: Trial) -> bool:
    return trial.state in ("complete", "pruned") and any(outcome.finished for outcome in trial.outcomes)


def _mean(trial: Trial) -> float:
    return float(np.mean([outcome.score for outcome in trial.outcomes if outcome.finished]))


def _word(value: Value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

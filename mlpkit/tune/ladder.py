"""The ladder: no hidden layer, one, two, ... Each layer has to gain more than one SE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from mlpkit.tune import stats
from mlpkit.tune.trainer import Outcome

Hidden = tuple[int, ...]
State = Literal["complete", "diverged", "out of time", "pruned"]

WIDTHS = (16, 32, 64, 128)
TAPERS = (2, 4)
_AGAIN = 0.5


@dataclass
class Trial:
    """One candidate with its outcome on every fold. ``parameters``: weights and biases of the network.

    params: what the search chose, by name. stage: which part of the strategy proposed it. reason: why it stopped.
    repeats: outcomes on other folds with other seeds, for finalists. halved: outcomes on the same folds with half
    of the training rows, for the winner. again: outcomes on the same folds from other seeds, a list for each, for the
    winner of a search that averages. number: counts the candidates of a search.
    """

    hidden: Hidden
    parameters: int
    outcomes: list[Outcome]
    state: State
    params: dict[str, Any] = field(default_factory=dict)
    stage: str = ""
    reason: str = ""
    repeats: list[Outcome] = field(default_factory=list)
    halved: list[Outcome] = field(default_factory=list)
    again: list[list[Outcome]] = field(default_factory=list)
    number: int = 0

    @property
    def name(self) -> str:
        """Short name: "linear", "64", "64-32", "128 (dropout 0.5)"; then what else was chosen."""
        name = "-".join(map(str, self.hidden)) or "linear"
        others = [
            f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in self.params.items()
            if key not in ("layers", "width", "shape", "expand")
        ]
        if len(others) > 2:
            return f"{name} #{self.number}"
        return f"{name} ({', '.join(others)})" if others else name

    @property
    def words(self) -> str:
        """The network in words."""
        words = in_words(self.hidden)
        rate = self.params.get("dropout")
        return f"{words} (dropout {rate:.2g})" if rate else words

    @property
    def scores(self) -> list[float]:
        """Test scores by fold, those of repeats at the end."""
        return [outcome.score for outcome in (*self.outcomes, *self.repeats)]

    @property
    def mean(self) -> float:
        """Mean test score; NaN unless every fold has one."""
        return stats.mean(self.scores) if self.state == "complete" else math.nan

    @property
    def se(self) -> float:
        """Standard error of the mean."""
        return stats.standard_error(self.scores) if self.state == "complete" else math.nan

    @property
    def train_mean(self) -> float:
        """Mean score on the training rows."""
        return stats.mean([outcome.train_score for outcome in self.outcomes])

    @property
    def seconds(self) -> float:
        """Time of the threads that trained it on its folds."""
        return sum(outcome.seconds for outcome in (*self.outcomes, *self.repeats))


@dataclass
class Climb:
    """All candidates, the best of each rung, the verdict of each step up, and what the clock left out."""

    trials: list[Trial] = field(default_factory=list)
    best: dict[int, Trial] = field(default_factory=dict)
    steps: dict[int, stats.Comparison] = field(default_factory=dict)
    untried: list[Hidden] = field(default_factory=list)
    winner_rung: int = 0

    @property
    def winner(self) -> Trial:
        """The simplest candidate that no deeper rung beats by more than one SE."""
        return self.best[self.winner_rung]

    @property
    def linear(self) -> Trial:
        """The candidate without a hidden layer; it always finishes."""
        return self.best[0]


def in_words(hidden: Hidden) -> str:
    """() -> "no hidden layer", (64,) -> "one hidden layer of 64", (64, 32) -> "two hidden layers of 64 and 32"."""
    if not hidden:
        return "no hidden layer"
    if len(hidden) == 1:
        return f"one hidden layer of {hidden[0]}"
    count = {2: "two", 3: "three"}.get(len(hidden), str(len(hidden)))
    return f"{count} hidden layers of {', '.join(map(str, hidden[:-1]))} and {hidden[-1]}"


def climb(
    run: Callable[[Hidden], Trial | None],
    *,
    ahead: Callable[[Sequence[Hidden]], None] | None = None,
    drop: Callable[[Hidden, float], Trial | None] | None = None,
    widths: Sequence[int] = WIDTHS,
    deepest: int = 2,
) -> Climb:
    """Try every rung from below. ``run`` trains one candidate on all folds; None means the budget forbids it.

    ahead: told the candidates of a rung before they are asked for, so that they can be trained at once. drop: trains
    layers with a rate of dropout; asked for twice the width, 0.5 and then 0.1, where the best of a rung overfits.
    """
    result = Climb()
    for rung in range(deepest + 1):
        if rung == 0:
            candidates: Sequence[Hidden] = [()]
        elif rung == 1:
            candidates = [(width,) for width in widths]
        else:
            below = result.best[rung - 1].hidden if rung - 1 in result.best else ()
            # A second layer is half or a quarter of the first, a further one of the layer before it.
            candidates = [(*below, below[-1] // taper) for taper in TAPERS if below and below[-1] // taper > 0]
        if ahead is not None and rung:
            ahead(candidates)
        _try_rung(result, rung, candidates, run)
        if drop is not None and rung and rung in result.best and overfits(result.best[rung]):
            wider = tuple(2 * width for width in result.best[rung].hidden)
            for rate in (0.5, 0.1):
                _try_rung(result, rung, [wider], lambda hidden, rate=rate: drop(hidden, rate))  # type: ignore[misc]
        _settle(result, rung)
    return result


def from_trials(trials: Sequence[Trial], untried: Sequence[Hidden] = ()) -> Climb:
    """The ladder that any set of trials amounts to: the best of each depth, and which depth earned its place."""
    result = Climb(trials=list(trials), untried=list(untried))
    for trial in trials:
        rung = len(trial.hidden)
        if trial.state == "complete" and (rung not in result.best or _key(trial) > _key(result.best[rung])):
            result.best[rung] = trial
    for rung in sorted(result.best):
        _settle(result, rung)
    return result


def overfits(trial: Trial) -> bool:
    """True if the validation loss rises again after its best epoch by more than 2 SE over the folds."""
    return rise_after_best(trial) > 2.0


def rise_after_best(trial: Trial) -> float:
    """By how many SE over the folds the validation loss ends above its minimum."""
    rises = [
        outcome.validation_loss[-1] - outcome.validation_loss[outcome.best_epoch]
        for outcome in trial.outcomes
        if outcome.validation_loss
    ]
    if len(rises) < 2:
        return 0.0
    se = stats.standard_error(rises)
    return stats.mean(rises) / se if se > 0.0 else 0.0


def rung_scores(climb: Climb, rung: int) -> list[float]:
    """Fold scores of a rung without the luck of its best.

    In each fold, who is best on the other folds is scored; then come the repeats of who was best on all of them, for
    which it was not chosen.
    """
    rivals = [trial for trial in climb.trials if len(trial.hidden) == rung and trial.state == "complete"]
    rivals = [trial for trial in rivals if len(trial.outcomes) == len(rivals[0].outcomes)]
    tables = [[outcome.score for outcome in trial.outcomes] for trial in rivals]
    first = max(range(len(rivals)), key=lambda at: stats.mean(tables[at]))
    return [*stats.cross_selected(tables), *(outcome.score for outcome in rivals[first].repeats)]


def _settle(result: Climb, rung: int) -> None:
    """Compare the rung with the winner so far, from which it takes over if it gains one SE for each layer more."""
    if rung not in result.best or (rung == 0 and 0 in result.best):
        return
    scores, own = rung_scores(result, rung), rung_scores(result, result.winner_rung)
    folds = len(result.best[rung].outcomes)
    result.steps[rung] = stats.compare(scores, own, folds)
    repeated = min(len(scores), len(own)) - folds
    # Nobody was chosen for the repeats: the gain has to show there too.
    if repeated > 1 and stats.compare(scores[folds:], own[folds:]).ratio < _AGAIN:
        return
    if result.steps[rung].ratio > rung - result.winner_rung:
        result.winner_rung = rung


def _try_rung(result: Climb, rung: int, candidates: Sequence[Hidden], run: Callable[[Hidden], Trial | None]) -> None:
    for hidden in candidates:
        trial = run(hidden)
        if trial is None:
            result.untried.append(hidden)
            continue
        result.trials.append(trial)
        if trial.state == "complete" and (rung not in result.best or _key(trial) > _key(result.best[rung])):
            result.best[rung] = trial


def _key(trial: Trial) -> tuple[int, float, int]:
    # A finalist's mean over more folds counts before another's over fewer.
    return len(trial.scores), trial.mean, -trial.parameters  # Among equals the smaller network.

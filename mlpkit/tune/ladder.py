"""The ladder: no hidden layer, one, two. A deeper rung wins only if it beats the rung below by more than one SE."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from mlpkit.tune import stats
from mlpkit.tune.trainer import Outcome

Hidden = tuple[int, ...]
State = Literal["complete", "diverged", "out of time"]

WIDTHS = (16, 32, 64, 128)
TAPERS = (2, 4)


@dataclass
class Trial:
    """One candidate with its outcome on every fold. ``parameters``: weights and biases of the network."""

    hidden: Hidden
    parameters: int
    outcomes: list[Outcome]
    state: State

    @property
    def name(self) -> str:
        """Short name: "linear", "64", "64-32"."""
        return "-".join(map(str, self.hidden)) or "linear"

    @property
    def words(self) -> str:
        """The same in words."""
        return in_words(self.hidden)

    @property
    def scores(self) -> list[float]:
        """Test scores by fold."""
        return [outcome.score for outcome in self.outcomes]

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
        """Wall time of its folds."""
        return sum(outcome.seconds for outcome in self.outcomes)


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
    return f"two hidden layers of {hidden[0]} and {hidden[1]}"


def climb(run: Callable[[Hidden], Trial | None]) -> Climb:
    """Try every rung from below. ``run`` trains one candidate on all folds; None means the clock forbids it."""
    result = Climb()
    pivot = None
    for rung in (0, 1, 2):
        candidates: Sequence[Hidden] = [()] if rung == 0 else [(width,) for width in WIDTHS]
        if rung == 2:
            pivot = result.best[1].hidden[0] if 1 in result.best else None
            candidates = [(pivot, pivot // taper) for taper in TAPERS] if pivot else []
        _try_rung(result, rung, candidates, run)
        if rung and rung in result.best:
            result.steps[rung] = stats.compare(result.best[rung].scores, result.winner.scores)
            if result.steps[rung].earned:
                result.winner_rung = rung
    return result


def _try_rung(result: Climb, rung: int, candidates: Sequence[Hidden], run: Callable[[Hidden], Trial | None]) -> None:
    for hidden in candidates:
        trial = run(hidden)
        if trial is None:
            result.untried.append(hidden)
            continue
        result.trials.append(trial)
        if trial.state == "complete" and (rung not in result.best or _key(trial) > _key(result.best[rung])):
            result.best[rung] = trial


def _key(trial: Trial) -> tuple[float, int]:
    return trial.mean, -trial.parameters  # Among equals the smaller network.

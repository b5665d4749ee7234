"""Which parts of the space the score depends on: PED-ANOVA over the trials, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlpkit.tune.ladder import Trial
from mlpkit.tune.parts import Choice, Part, Range
from mlpkit.tune.space import Space

_BINS = 6
_TOP = 0.25
_DRAWS = 60
_LEAST_TRIALS = 12


@dataclass(frozen=True)
class Importance:
    """Importance of one part above that of a shuffled one, with its 90 % interval; trials: those that used it."""

    name: str
    value: float
    low: float
    high: float
    trials: int


def importance(trials: Sequence[Trial], space: Space) -> list[Importance]:
    """Parts by importance, the largest first; empty for fewer than 12 trials.

    PED-ANOVA (Watanabe et al., 2023): the Pearson divergence of how the best quarter of the trials is spread over a
    part from how all of them are, here on histograms. What shuffled scores give on average is subtracted, so 0 is no
    importance; the interval is from bootstrap draws of the trials.
    """
    found = []
    for name in space.free():
        part = space.parts[name]
        used = [trial for trial in trials if trial.state in ("complete", "pruned") and _known(part, trial, name)]
        units = np.array([part.to_unit(trial.params[name]) for trial in used])
        scores = np.array([np.mean([item.score for item in trial.outcomes if item.finished]) for trial in used])
        if len(units) < _LEAST_TRIALS or len(np.unique(units)) < 2:
            continue
        bins = len(part.values) if isinstance(part, Choice) else _BINS
        found.append(_judge(name, np.clip((units * bins).astype(int), 0, bins - 1), scores, bins))
    return sorted(found, key=lambda item: -item.value)


def _known(part: Part, trial: Trial, name: str) -> bool:
    return name in trial.params and (isinstance(part, Range) or trial.params[name] in part.values)


def _judge(name: str, cells: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], bins: int) -> Importance:
    rng = np.random.default_rng(len(cells))
    floor = float(np.mean([_divergence(cells, rng.permutation(scores), bins) for _ in range(_DRAWS)]))
    draws = [rng.integers(0, len(cells), len(cells)) for _ in range(_DRAWS)]
    values = [_divergence(cells[rows], scores[rows], bins) - floor for rows in draws]
    low, high = np.quantile(values, [0.05, 0.95])
    return Importance(name, _divergence(cells, scores, bins) - floor, float(low), float(high), len(cells))


def _divergence(cells: npt.NDArray[np.int64], scores: npt.NDArray[np.float64], bins: int) -> float:
    top = np.argsort(-scores, kind="stable")[: max(2, round(_TOP * len(scores)))]
    # One more in every cell: an empty one is no proof.
    every = (np.bincount(cells, minlength=bins) + 1.0) / (len(cells) + bins)
    best = (np.bincount(cells[top], minlength=bins) + 1.0) / (len(top) + bins)
    return float(np.sum(every * (best / every - 1.0) ** 2))

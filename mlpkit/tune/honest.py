"""The score one may expect: what the best of many candidates owes to luck is taken off, and an interval given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlpkit.tune import stats

_DRAWS = 300
_NORMAL_90 = 1.645


@dataclass(frozen=True)
class Estimate:
    """score: corrected; low, high: its 90 % interval; raw: the winner's mean over its folds.

    optimism: what the choice owed to luck, which score lacks; more_rows: what it has for the rows that the model learns
    from beyond those of a fold.
    """

    score: float
    low: float
    high: float
    raw: float
    optimism: float
    more_rows: float = 0.0


def corrected(
    rows: npt.NDArray[np.float64], depths: Sequence[int], winner: int, fold_scores: Sequence[float], seed: int,
    folds: int = 5,
) -> Estimate:  # fmt: skip
    """Bootstrap bias-corrected cross-validation (Tsamardinos, Greasidou and Borboudakis, 2018).

    rows: (candidates, rows) scores of every row by the model that never saw it. In each draw of rows the whole choice
    is made again (best of each depth, a deeper one only if it gains more than one SE) and scored on the rows left out;
    what it loses there against the winner is the optimism. The interval takes the larger of two
    standard errors, over the rows and over the folds, widened by sqrt(1 + 1 / (folds - 1)).
    """
    count = rows.shape[1]
    raw = stats.mean(fold_scores)
    rng = np.random.default_rng([seed, 21])
    left_out = []
    for _ in range(_DRAWS):
        times = np.bincount(rng.integers(0, count, count), minlength=count).astype(np.float64)
        out = times == 0.0
        if out.any():
            chosen = _choose(rows, times, depths)
            # Against the winner on the same rows, so that the luck of the draw itself cancels.
            left_out.append(rows[chosen, out].mean() - rows[winner, out].mean())
    lost = max(0.0, -float(np.mean(left_out))) if left_out else 0.0
    se = max(float(np.std(rows[winner], ddof=1)) / math.sqrt(count), stats.standard_error(fold_scores))
    # The models that are scored share rows with those that score them (Nadeau and Bengio, 2003).
    se *= math.sqrt(1.0 + 1.0 / (folds - 1))
    score = raw - lost
    return Estimate(score, score - _NORMAL_90 * se, score + _NORMAL_90 * se, raw, lost)


def _choose(rows: npt.NDArray[np.float64], times: npt.NDArray[np.float64], depths: Sequence[int]) -> int:
    """The ladder's choice from scores by row, each row counted so many times."""
    share = times / times.sum()
    means = rows @ share
    order = sorted(set(depths))
    best = {
        depth: max((at for at, own in enumerate(depths) if own == depth), key=lambda at: means[at]) for depth in order
    }
    chosen, root = best[order[0]], math.sqrt(float(times.sum()))
    for depth in order[1:]:
        challenger = rows[best[depth]]
        # Folds share training rows: their paired error counts 1.5 times, as in stats.compare for 5 folds.
        se = max(1.5 * _deviation(challenger - rows[chosen], share), _deviation(challenger, share)) / root
        if means[best[depth]] - means[chosen] > se:
            chosen = best[depth]
    return chosen


def _deviation(values: npt.NDArray[np.float64], share: npt.NDArray[np.float64]) -> float:
    centred = values - float(values @ share)
    return math.sqrt(float(centred**2 @ share))

"""Fold scores to decisions: standard errors and the one-standard-error rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Comparison:
    """A challenger against an incumbent on the same folds. gain and se in units of the score; ratio = gain / se."""

    gain: float
    se: float
    ratio: float

    @property
    def earned(self) -> bool:
        """True if the challenger is better by more than one standard error."""
        return self.ratio > 1.0


def mean(scores: Sequence[float]) -> float:
    """Mean score over the folds."""
    return float(np.mean(scores))


def standard_error(scores: Sequence[float]) -> float:
    """Standard error of the mean over the folds: the SE of the classic rule (Breiman et al., 1984)."""
    return float(np.std(scores, ddof=1) / math.sqrt(len(scores)))


def compare(challenger: Sequence[float], incumbent: Sequence[float], folds: int | None = None) -> Comparison:
    """Fold-paired gain, with the larger of two standard errors.

    One is that of the paired differences, widened by sqrt(1/k + 1/(folds-1)) instead of sqrt(1/k) because the folds
    share training rows (Nadeau and Bengio, 2003); with few folds it can be small by luck, so the challenger's own
    standard error is its floor. folds: how many make up the table, where the k scores repeat them.
    """
    common = min(len(challenger), len(incumbent))
    challenger, incumbent = challenger[:common], incumbent[:common]
    differences = np.asarray(challenger) - np.asarray(incumbent)
    k = len(differences)
    gain = float(np.mean(differences))
    paired = float(np.std(differences, ddof=1)) * math.sqrt(1 / k + 1 / ((folds or k) - 1))
    se = max(paired, standard_error(challenger))
    if se == 0.0:
        return Comparison(gain, se, 0.0 if gain == 0.0 else math.copysign(math.inf, gain))
    return Comparison(gain, se, gain / se)


def cross_selected(scores: Sequence[Sequence[float]]) -> list[float]:
    """Fold scores of "take the best": in fold f, of the candidate that is best on the mean of all other folds.

    scores: (candidates, folds). The best of many means is too good by luck; this is not, for no fold chooses itself.
    With a single candidate these are its scores.
    """
    table = np.asarray(scores, dtype=np.float64)
    others = table.sum(axis=1, keepdims=True) - table
    return [float(table[int(np.argmax(others[:, fold])), fold]) for fold in range(table.shape[1])]

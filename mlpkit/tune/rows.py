"""Test outputs to one score per row: right or wrong, or the share of the variance a row's error leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlpkit.tune.folds import Fold
from mlpkit.tune.problem import Problem, decode_target, target_scale
from mlpkit.tune.space import Encoding
from mlpkit.tune.target import Target
from mlpkit.tune.trainer import Outcome


def row_scores(
    problem: Problem, folds: Sequence[Fold], encoding: Encoding, outcomes: Sequence[Outcome]
) -> npt.NDArray[np.float64] | None:
    """(rows,) of the folds' test rows in a row: 1 or 0 for classes; 1 - squared error / variance for numbers.

    Their weighted mean is the accuracy, or nearly the R2, of the folds. None where an outcome has no outputs.
    """
    parts = []
    for fold, outcome in zip(folds, outcomes):
        if outcome.output is None:
            return None
        output = outcome.output.double().numpy()
        parts.append(
            scores_of_rows(
                problem.target, fold.test, output, target_scale(problem.target, fold.train, encoding), encoding
            )
        )
    return np.concatenate(parts) if parts else None


def scores_of_rows(
    target: Target, rows: npt.NDArray[np.int64], output: npt.NDArray[np.float64], scale: tuple[float, float],
    encoding: Encoding,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """(rows,) of these rows of the table; scale: (mean, scale) of the target as the network saw it."""
    truth = target.values[rows]
    if target.task == "classification":
        hits: npt.NDArray[np.float64] = (output.argmax(1) == truth).astype(np.float64)
        return hits
    predicted = decode_target(output[:, 0], *scale, encoding.log_target)
    scores: npt.NDArray[np.float64] = 1.0 - (predicted - truth) ** 2 / (float(np.var(truth)) or 1.0)
    return scores


def all_outputs(outcomes: Sequence[Outcome]) -> Any:
    """(rows, out_features) float64 of all folds in a row, or None."""
    outputs = [outcome.output for outcome in outcomes]
    if not outputs or any(output is None for output in outputs):
        return None
    return np.concatenate([output.double().numpy() for output in outputs if output is not None])

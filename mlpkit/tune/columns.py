"""How far one column alone goes: a nearest-value guess, to notice a column that knows the target."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mlpkit.tune.folds import Fold
from mlpkit.tune.problem import Problem

_BINS = 64
_MOST_COLUMNS = 500


def single_columns(problem: Problem, folds: Sequence[Fold]) -> list[tuple[str, float]]:
    """(name, accuracy or R2) of a table look-up by each column alone: learnt from training rows, mean over test parts.

    Numbers are cut at 64 quantiles, categories taken as they are; a cell never seen gives the overall guess.
    """
    found = []
    for column in list(problem.columns)[:_MOST_COLUMNS]:
        scores = [_score(problem, problem.data[column.name], column.kind == "numeric", fold) for fold in folds]
        found.append((column.name, float(np.mean(scores))))
    return found


def _score(problem: Problem, values: npt.NDArray[Any], numeric: bool, fold: Fold) -> float:
    learn, target = np.concatenate([fold.train, fold.validation]), problem.target.values
    cells, truth = _cells(values, numeric, learn), target[fold.test]
    if problem.target.task == "classification":
        return float(np.mean(_class_guess(cells, target, learn)[fold.test] == truth))
    predicted = _number_guess(cells, target, learn)[fold.test]
    return 1.0 - float(np.mean((predicted - truth) ** 2)) / (float(np.var(truth)) or 1.0)


def _cells(values: npt.NDArray[Any], numeric: bool, learn: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    if not numeric:
        return np.unique(np.array([str(value) for value in values]), return_inverse=True)[1].ravel().astype(np.int64)
    known = values[learn][~np.isnan(values[learn])]
    if not len(known):
        return np.zeros(len(values), dtype=np.int64)
    # The exact value of a copied column counts: where values repeat, quantiles fall on them.
    edges = np.unique(np.quantile(known, np.linspace(0, 1, _BINS + 1)[1:-1], method="nearest"))
    return np.where(np.isnan(values), len(edges) + 1, np.searchsorted(edges, values)).astype(np.int64)


def _number_guess(
    cells: npt.NDArray[np.int64], target: npt.NDArray[np.float64], learn: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    size = int(cells.max()) + 1
    count = np.bincount(cells[learn], minlength=size)
    total = np.bincount(cells[learn], weights=target[learn], minlength=size)
    mean = np.where(count > 0, total / np.maximum(count, 1), target[learn].mean())
    guess: npt.NDArray[np.float64] = mean[cells]
    return guess


def _class_guess(
    cells: npt.NDArray[np.int64], target: npt.NDArray[np.int64], learn: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    size, classes = int(cells.max()) + 1, int(target.max()) + 1
    count = np.zeros((size, classes))
    np.add.at(count, (cells[learn], target[learn]), 1.0)
    count += 1e-3 * np.bincount(target[learn], minlength=classes) / len(learn)
    guess: npt.NDArray[np.int64] = count.argmax(axis=1)[cells]
    return guess

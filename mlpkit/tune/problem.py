"""A checked table and its folds as tensors: everything between raw columns and the trainer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlpkit.errors import DataError, ShapeError
from mlpkit.tune import trainer
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.folds import Fold
from mlpkit.tune.table import Column, clean, fingerprint, learn_columns, pandas, take_target, to_frame
from mlpkit.tune.target import Target, learn_target


@dataclass(frozen=True)
class Problem:
    """A checked table: clean columns, target, what was left out."""

    columns: Sequence[Column]
    data: dict[str, npt.NDArray[Any]]
    target: Target
    rows: int
    notes: list[str]
    fingerprint: str


def read_problem(
    X: Any, y: Any, task: str, cv: int, categorical: Collection[str] = (), ignore: Collection[str] = ()
) -> Problem:
    """Check a table and its target; rows without a target are left out with a note."""
    frame = to_frame(X)
    if isinstance(y, str):
        frame, series = take_target(frame, y)
    else:
        series = _target_series(y)
    if len(series) != len(frame):
        raise ShapeError(f"X has {len(frame)} rows, y has {len(series)}")
    known = series.notna().to_numpy()
    notes = []
    if not known.all():
        count = int((~known).sum())
        notes.append(f"{count} {'row has' if count == 1 else 'rows have'} no target and were left out")
        frame, series = frame[known], series[known]
    target, more = learn_target(series, task, cv)
    # Indices stay those of the file up to here, so that an error names the row a user finds.
    columns, left_out = learn_columns(frame, categorical, ignore)
    data = clean(frame, columns)
    return Problem(columns, data, target, len(frame), notes + more + left_out, fingerprint(frame, series))


def encode_fold(problem: Problem, fold: Fold) -> trainer.FoldData:
    """One fold as tensors. Encoder and target scale learn from the train part only."""
    encoder = Encoder.fit(problem.data, problem.columns, fold.train)
    mean, scale = target_scale(problem.target, fold.train)
    x = torch.from_numpy(encoder.transform(problem.data))
    y = target_tensor(problem.target, mean, scale)
    parts = [trainer.Split(x[rows], y[rows]) for rows in (fold.train, fold.validation, fold.test)]
    return trainer.FoldData(*parts)


def target_scale(target: Target, rows: npt.NDArray[np.int64]) -> tuple[float, float]:
    """(mean, scale) of the target on ``rows``; (0, 1) for classes."""
    if target.task == "classification":
        return 0.0, 1.0
    with np.errstate(over="ignore", invalid="ignore"):
        scale = float(np.std(target.values[rows]))
    if not math.isfinite(scale):
        raise DataError(f"target {target.name!r} holds numbers too large to square")
    return float(np.mean(target.values[rows])), scale if scale > 0.0 else 1.0


def target_tensor(target: Target, mean: float, scale: float) -> torch.Tensor:
    """The target as the trainer wants it: int64 classes or standardised float32 (rows, 1)."""
    if target.task == "classification":
        return torch.from_numpy(target.values)
    return torch.from_numpy(((target.values - mean) / scale).astype(np.float32)[:, None])


def _target_series(y: Any) -> Any:
    pd = pandas()
    if isinstance(y, pd.DataFrame):
        if y.shape[1] != 1:
            raise ShapeError(f"y has {y.shape[1]} columns; one target is wanted")
        y = y.iloc[:, 0]
    if not isinstance(y, pd.Series):
        values = np.asarray(y)
        if values.ndim != 1:
            raise ShapeError(f"y has shape {values.shape}; one value per row is wanted")
        y = pd.Series(values)
    name = "target" if y.name is None else str(y.name)
    return y.rename(name).reset_index(drop=True)

"""A checked table and its folds as tensors: everything between raw columns and the trainer."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mlpkit.errors import ArgumentError, DataError, ShapeError
from mlpkit.tune import trainer
from mlpkit.tune.encoder import Encoder
from mlpkit.tune.folds import Fold
from mlpkit.tune.space import Encoding
from mlpkit.tune.table import (
    Column,
    clean,
    fingerprint,
    is_number_like,
    learn_columns,
    nearest,
    pandas,
    take_target,
    to_frame,
)  # fmt: skip
from mlpkit.tune.target import Target, learn_target

PLAIN = Encoding()


@dataclass(frozen=True)
class Problem:
    """A checked table: clean columns, target, what was left out.

    weight: of each row, with mean 1. groups: rows of one group share a fold. order: rows are tested after those they
    learn from.
    """

    columns: Sequence[Column]
    data: dict[str, npt.NDArray[Any]]
    target: Target
    rows: int
    notes: list[str]
    fingerprint: str
    weight: npt.NDArray[np.float64] | None = None
    groups: npt.NDArray[Any] | None = None
    order: npt.NDArray[Any] | None = None


def read_problem(
    X: Any,
    y: Any,
    task: str,
    cv: int,
    categorical: Collection[str] = (),
    ignore: Collection[str] = (),
    *,
    groups: Any = None,
    time: Any = None,
    sample_weight: Any = None,
) -> Problem:
    """Check a table and its target; rows without a target are left out with a note.

    groups, time: one value per row, or the name of a column, which is then no input. sample_weight: one per row.
    """
    frame = to_frame(X)
    if isinstance(y, str):
        frame, series = take_target(frame, y)
    else:
        series = _target_series(y)
    if len(series) != len(frame):
        raise ShapeError(f"X has {len(frame)} rows, y has {len(series)}")
    if groups is not None and time is not None:
        raise ArgumentError("tune: groups and time cannot both be given")
    frame, group = _beside(frame, groups, "groups")
    frame, order = _beside(frame, time, "time")
    weight = _weights(sample_weight, len(frame))
    known = series.notna().to_numpy()
    if weight is not None:
        known = known & (weight > 0.0)
    notes = []
    if not known.all():
        count = int((~known).sum())
        what = "no target" if weight is None else "no target or no weight"
        notes.append(f"{count} {'row has' if count == 1 else 'rows have'} {what} and were left out")
        frame, series = frame[known], series[known]
    target, more = learn_target(series, task, cv)
    # Indices stay those of the file up to here, so that an error names the row a user finds.
    columns, left_out = learn_columns(frame, categorical, ignore)
    data = clean(frame, columns)
    own = [None if item is None else item[known] for item in (weight, group, order)]
    if own[0] is not None:
        own[0] = own[0] / own[0].mean()
    if own[1] is not None and len(np.unique(own[1])) < 2 * cv:
        raise DataError(f"groups holds {len(np.unique(own[1]))} groups: {cv} folds need at least {2 * cv}")
    notes += more + left_out
    return Problem(columns, data, target, len(frame), notes, fingerprint(frame, series), *own)


def _beside(frame: Any, given: Any, what: str) -> tuple[Any, npt.NDArray[Any] | None]:
    """(the table without that column, its values as sortable numbers or texts)."""
    if given is None:
        return frame, None
    if isinstance(given, str):
        if given not in frame.columns:
            raise ArgumentError(f"{what}: no column {given!r}{nearest(given, frame.columns)}")
        frame, series = frame.drop(columns=given), frame[given]
    else:
        series = pandas().Series(np.asarray(given))
    if len(series) != len(frame):
        raise ShapeError(f"{what} has {len(series)} values, X has {len(frame)} rows")
    if series.isna().any():
        raise DataError(f"{what} has no value in data row {int(np.flatnonzero(series.isna())[0]) + 1}")
    if what == "time" and not is_number_like(series):
        dates = pandas().to_datetime(series.astype(str), errors="coerce", format="mixed")
        if dates.isna().any():
            row = int(np.flatnonzero(dates.isna())[0])
            raise DataError(f"time must hold numbers or dates, but data row {row + 1} holds {series.iloc[row]!r}")
        series = dates
    return frame, pandas().factorize(series, sort=True)[0] if what == "time" else series.astype(str).to_numpy()


def _weights(given: Any, rows: int) -> npt.NDArray[np.float64] | None:
    if given is None:
        return None
    weight = np.asarray(given, dtype=np.float64)
    if weight.shape != (rows,):
        raise ShapeError(f"sample_weight has shape {weight.shape}; one weight for each of {rows} rows is wanted")
    if not np.isfinite(weight).all() or (weight < 0.0).any() or weight.sum() <= 0.0:
        raise DataError("sample_weight must hold finite numbers from 0 up, and not only zeros")
    return weight


def part_of(problem: Problem, rows: npt.NDArray[np.int64]) -> Problem:
    """The same table with some of its rows."""
    weight, groups, order = (
        None if item is None else item[rows] for item in (problem.weight, problem.groups, problem.order)
    )
    return replace(
        problem, data={name: values[rows] for name, values in problem.data.items()}, rows=len(rows), groups=groups,
        target=replace(problem.target, values=problem.target.values[rows]), order=order,
        weight=None if weight is None else weight / weight.mean(),
    )  # fmt: skip


def encode_fold(problem: Problem, fold: Fold, encoding: Encoding = PLAIN) -> trainer.FoldData:
    """One fold as tensors. Encoder and target scale learn from the train part only."""
    encoder = Encoder.fit(problem.data, problem.columns, fold.train, encoding.scaling, encoding.periodic)
    mean, scale = target_scale(problem.target, fold.train, encoding)
    x = torch.from_numpy(encoder.transform(problem.data))
    y = target_tensor(problem.target, mean, scale, encoding)
    return trainer.FoldData(*(_split(problem, x, y, rows) for rows in (fold.train, fold.validation, fold.test)))


def encode_all(problem: Problem, encoding: Encoding = PLAIN) -> tuple[Encoder, trainer.Split]:
    """(encoder, all rows as tensors) for the fit on everything."""
    every = np.arange(problem.rows)
    encoder = Encoder.fit(problem.data, problem.columns, every, encoding.scaling, encoding.periodic)
    mean, scale = target_scale(problem.target, every, encoding)
    x, y = torch.from_numpy(encoder.transform(problem.data)), target_tensor(problem.target, mean, scale, encoding)
    weight = None if problem.weight is None else torch.from_numpy(problem.weight.astype(np.float32))
    return encoder, trainer.Split(x, y, weight)


def target_scale(target: Target, rows: npt.NDArray[np.int64], encoding: Encoding = PLAIN) -> tuple[float, float]:
    """(mean, scale) of the target, or of its logarithm, on ``rows``; (0, 1) for classes."""
    if target.task == "classification":
        return 0.0, 1.0
    values = np.log(target.values[rows]) if encoding.log_target else target.values[rows]
    with np.errstate(over="ignore", invalid="ignore"):
        scale = float(np.std(values))
    if not math.isfinite(scale):
        raise DataError(f"target {target.name!r} holds numbers too large to square")
    return float(np.mean(values)), scale if scale > 0.0 else 1.0


def target_tensor(target: Target, mean: float, scale: float, encoding: Encoding = PLAIN) -> torch.Tensor:
    """The target as the trainer wants it: int64 classes or standardised float32 (rows, 1)."""
    if target.task == "classification":
        return torch.from_numpy(target.values)
    values = np.log(target.values) if encoding.log_target else target.values
    return torch.from_numpy(((values - mean) / scale).astype(np.float32)[:, None])


def decode_target(output: npt.NDArray[Any], mean: float, scale: float, log: bool) -> npt.NDArray[np.float64]:
    """Outputs (rows,) of a regression back in the target's own units."""
    values = output * scale + mean
    # A logarithm far above the largest seen is an extrapolation gone wild; float64 ends at exp(709).
    decoded: npt.NDArray[np.float64] = np.exp(np.minimum(values, 700.0)) if log else values
    return decoded


def _split(problem: Problem, x: torch.Tensor, y: torch.Tensor, rows: npt.NDArray[np.int64]) -> trainer.Split:
    if problem.weight is None:
        return trainer.Split(x[rows], y[rows])
    weight = problem.weight[rows]
    return trainer.Split(x[rows], y[rows], torch.from_numpy((weight / weight.mean()).astype(np.float32)))


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

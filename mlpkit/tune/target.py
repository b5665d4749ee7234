"""The target column: classes or numbers, and whether there is enough of either."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlpkit.errors import ArgumentError, DataError
from mlpkit.tune.table import is_number_like, mostly_numbers, pandas, reject_text

Task = Literal["classification", "regression"]
Label = str | int | float | bool

TASKS = ("auto", "classification", "regression")
_MAX_WHOLE_CLASSES = 20
_ROWS_PER_CLASS = 5


@dataclass(frozen=True)
class Target:
    """What is to be predicted. values: int64 class numbers (``classes[values]`` are the labels) or float64."""

    name: str
    task: Task
    values: npt.NDArray[Any]
    classes: tuple[Label, ...] = ()


def learn_target(series: Any, task: str, cv: int) -> tuple[Target, list[str]]:
    """Infer the task unless it is given, number the classes, refuse what cannot be learnt. No missing cells.

    Whole numbers with at most 20 values and 5 rows a value count as classes; other numbers are a regression.
    """
    if task not in TASKS:
        raise ArgumentError(f"task is {task!r}, must be one of {', '.join(TASKS)}")
    name, rows = str(series.name), len(series)
    if series.dtype.kind in "cmM":
        raise DataError(f"target {name!r} has type {series.dtype}, which cannot be predicted; convert it to numbers")
    levels = int(series.nunique())
    if rows == 0:
        raise DataError(f"target {name!r} is empty: no row has a value")
    if rows < 4 * cv:
        raise DataError(f"{rows} rows with a target are too few: {cv} folds need at least {4 * cv}")
    numeric = is_number_like(series)
    inferred = task if task != "auto" else _infer(series, numeric, rows, levels)
    if levels < 2:
        what = "class" if inferred == "classification" else "value"
        raise DataError(f"target {name!r} holds only one {what} ({series.iloc[0]!s}): there is nothing to learn")
    if inferred == "regression":
        return Target(name, "regression", _numbers(series, numeric)), []
    if task == "auto" and not numeric and levels > _MAX_WHOLE_CLASSES and mostly_numbers(series):
        reject_text(series, f"target {name!r}", "; if the values are classes, give the task classification")
    if levels > _MAX_WHOLE_CLASSES and levels > rows / 2:
        raise DataError(
            f"target {name!r} holds {levels} different values in {rows} rows: too many for classes"
            + ("; use the task regression" if numeric else ", and they are no numbers")
        )
    return _classes(series, name, cv)


def _infer(series: Any, numeric: bool, rows: int, levels: int) -> Task:
    if not numeric or pandas().api.types.is_bool_dtype(series):
        return "classification"
    values = _numbers(series, numeric)
    whole = bool(np.all(values == np.floor(values)))
    few = levels <= 2 or (levels <= _MAX_WHOLE_CLASSES and levels * _ROWS_PER_CLASS <= rows)
    return "classification" if whole and few else "regression"


def _numbers(series: Any, numeric: bool) -> npt.NDArray[np.float64]:
    if isinstance(series.dtype, pandas().CategoricalDtype):
        raise DataError(f"target {series.name!r} must hold numbers for a regression, but holds categories")
    if not numeric:
        reject_text(series, f"target {series.name!r}")
    values: npt.NDArray[np.float64] = pandas().to_numeric(series).to_numpy(dtype=np.float64)
    if np.isinf(values).any():
        row = int(series.index[np.isinf(values)][0]) + 1
        raise DataError(f"target {series.name!r} holds infinity in data row {row}")
    return values


def _classes(series: Any, name: str, cv: int) -> tuple[Target, list[str]]:
    labels = [_label(value) for value in series]
    classes = tuple(sorted(set(labels), key=lambda label: (isinstance(label, str), label)))
    number = {label: index for index, label in enumerate(classes)}
    codes = np.array([number[label] for label in labels], dtype=np.int64)
    counts = np.bincount(codes, minlength=len(classes))
    second = int(np.argsort(counts)[-2])
    if counts[second] < cv:
        raise DataError(
            f"class {classes[second]!r} of target {name!r} has {counts[second]} rows, but {cv} folds need {cv}"
        )
    rare = [f"class {classes[index]!r} has only {counts[index]} rows" for index in np.flatnonzero(counts < cv)]
    return Target(name, "classification", codes, classes), rare


def _label(value: Any) -> Label:
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, str | int | float | bool) else str(value)

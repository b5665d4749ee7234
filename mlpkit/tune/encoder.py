"""Columns to network inputs: imputation, missing indicators, one-hot, standardising. Learns from training rows only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mlpkit.tune.table import Column

Columns = Mapping[str, npt.NDArray[Any]]

MAX_LEVELS = 30
_CLIP = 3.0
_LIMIT = 1e6  # Standardised inputs are cut here: far beyond any sense, well inside float32 products.


@dataclass(frozen=True)
class NumericCode:
    """value -> (value or median - mean) / scale, and a 0/1 indicator if training rows had gaps.

    clip: 0, or c of the smooth clip x / sqrt(1 + (x / c)^2) that follows (Holzmueller et al., 2024).
    """

    name: str
    median: float
    mean: float
    scale: float
    indicator: bool
    clip: float = 0.0


@dataclass(frozen=True)
class CategoryCode:
    """value -> one 0/1 input per level; a level never seen in training is all zeros. None among levels is "missing"."""

    name: str
    levels: tuple[str | None, ...]


@dataclass(frozen=True)
class Encoder:
    """Learned by ``fit`` from training rows; ``transform`` then treats any rows alike."""

    codes: tuple[NumericCode | CategoryCode, ...]

    @classmethod
    def fit(
        cls, data: Columns, columns: Sequence[Column], rows: npt.NDArray[np.int64], scaling: str = "standard"
    ) -> Encoder:
        """Learn medians, means, scales and levels from ``rows`` alone.

        scaling: "standard", or "robust" for median, half the distance of the quartiles and a smooth clip at 3.
        """
        codes: list[NumericCode | CategoryCode] = []
        for column in columns:
            values = data[column.name][rows]
            numeric = column.kind == "numeric"
            fit = _fit_robust if scaling == "robust" else _fit_numeric
            codes.append(fit(column.name, values) if numeric else _fit_category(column.name, values))
        return cls(tuple(codes))

    def transform(self, data: Columns) -> npt.NDArray[np.float32]:
        """(rows, in_features) float32, finite."""
        parts: list[npt.NDArray[Any]] = []
        for code in self.codes:
            values = data[code.name]
            if isinstance(code, NumericCode):
                missing = np.isnan(values)
                filled = np.where(missing, code.median, values)
                with np.errstate(over="ignore"):  # An overflow is cut like any other far value.
                    scaled = np.clip((filled - code.mean) / code.scale, -_LIMIT, _LIMIT)
                parts.append(scaled / np.sqrt(1.0 + (scaled / code.clip) ** 2) if code.clip else scaled)
                if code.indicator:
                    parts.append(missing)
            else:
                parts.extend(values == level for level in code.levels)
        return np.stack(parts, axis=1).astype(np.float32) if parts else np.empty((0, 0), dtype=np.float32)

    @property
    def feature_names(self) -> list[str]:
        """One name per network input, in order."""
        names: list[str] = []
        for code in self.codes:
            if isinstance(code, NumericCode):
                names.append(code.name)
                if code.indicator:
                    names.append(f"{code.name} is missing")
            else:
                names.extend(f"{code.name} = {'missing' if level is None else level}" for level in code.levels)
        return names

    def to_dict(self) -> list[dict[str, Any]]:
        """Plain data for model.json."""
        kinds = {NumericCode: "numeric", CategoryCode: "categorical"}
        return [{"kind": kinds[type(code)], **asdict(code)} for code in self.codes]

    @classmethod
    def from_dict(cls, items: Sequence[Mapping[str, Any]]) -> Encoder:
        """The inverse of ``to_dict``."""
        codes: list[NumericCode | CategoryCode] = []
        for item in items:
            if item["kind"] == "numeric":
                codes.append(NumericCode(**{key: item[key] for key in NumericCode.__dataclass_fields__ if key in item}))
            else:
                codes.append(CategoryCode(item["name"], tuple(item["levels"])))
        return cls(tuple(codes))


def _fit_numeric(name: str, values: npt.NDArray[np.float64]) -> NumericCode:
    missing = np.isnan(values)
    known = values[~missing]
    median = float(np.median(known)) if len(known) else 0.0
    filled = np.where(missing, median, values)
    mean = float(np.mean(filled))
    spread = filled - mean
    # Through the largest deviation, so that squares of 1e200 stay finite.
    largest = float(np.max(np.abs(spread)))
    scale = largest * float(np.sqrt(np.mean((spread / largest) ** 2))) if largest > 0.0 else 1.0
    return NumericCode(name, median, mean, scale if scale > 0.0 else 1.0, bool(missing.any()))


def _fit_robust(name: str, values: npt.NDArray[np.float64]) -> NumericCode:
    plain = _fit_numeric(name, values)
    filled = np.where(np.isnan(values), plain.median, values)
    low, high = np.quantile(filled, [0.25, 0.75]) / 2.0  # Halved first: the distance of 1e308 and -1e308 is infinite.
    scale = float(high - low) or plain.scale  # Where half the values are equal, the spread of the others.
    return NumericCode(name, plain.median, plain.median, scale, plain.indicator, _CLIP)


def _fit_category(name: str, values: npt.NDArray[Any]) -> CategoryCode:
    counts = Counter(value for value in values if value is not None)
    frequent = sorted(counts, key=lambda level: (-counts[level], level))[:MAX_LEVELS]
    levels: list[str | None] = sorted(frequent)
    if any(value is None for value in values):
        levels.append(None)
    return CategoryCode(name, tuple(levels))

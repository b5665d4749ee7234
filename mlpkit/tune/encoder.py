"""Columns to network inputs: imputation, missing indicators, one-hot, standardising. Learns from training rows only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from mlpkit.tune.table import Column

Columns = Mapping[str, npt.NDArray[Any]]

MAX_LEVELS = 30
_CLIP = 3.0
_FREQUENCIES = 8
_LEAST_VALUES = 5  # A wave over fewer values says no more than the values do.
_LIMIT = 1e6  # Standardised inputs are cut here: far beyond any sense, well inside float32 products.


@dataclass(frozen=True)
class NumericCode:
    """value -> (value or median - mean) / scale, and a 0/1 indicator if training rows had gaps.

    clip: 0, or c of the smooth clip x / sqrt(1 + (x / c)^2) that follows (Holzmueller et al., 2024). frequencies: for
    each f the inputs sin(2 pi f x) and cos(2 pi f x) of the result x come too (Gorishniy et al., 2022).
    """

    name: str
    median: float
    mean: float
    scale: float
    indicator: bool
    clip: float = 0.0
    frequencies: tuple[float, ...] = ()


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
        cls, data: Columns, columns: Sequence[Column], rows: npt.NDArray[np.int64], scaling: str = "standard",
        periodic: float = 0.0,
    ) -> Encoder:  # fmt: skip
        """Learn medians, means, scales and levels from ``rows`` alone.

        scaling: "standard", or "robust" for median, half the distance of the quartiles and a smooth clip at 3.
        periodic: 0, or the standard deviation of the frequencies of eight waves of each number; they depend on the
        place of the column alone.
        """
        codes: list[NumericCode | CategoryCode] = []
        for number, column in enumerate(columns):
            values = data[column.name][rows]
            if column.kind != "numeric":
                codes.append(_fit_category(column.name, values))
                continue
            code = (_fit_robust if scaling == "robust" else _fit_numeric)(column.name, values)
            if periodic and len(np.unique(values[~np.isnan(values)])) >= _LEAST_VALUES:
                drawn = periodic * np.random.default_rng([31, number]).normal(size=_FREQUENCIES)
                code = replace(code, frequencies=tuple(drawn.tolist()))
            codes.append(code)
        return cls(tuple(codes))

    def transform(self, data: Columns) -> npt.NDArray[np.float32]:
        """(rows, in_features) float32, finite."""
        if not self.codes:
            return np.empty((0, 0), dtype=np.float32)
        # Written where they stay: a large table is not held twice.
        inputs = np.empty((len(data[self.codes[0].name]), len(self.feature_names)), dtype=np.float32)
        at = 0
        for code in self.codes:
            for part in _inputs(code, data[code.name]):
                inputs[:, at] = part
                at += 1
        return inputs

    @classmethod
    def joined(cls, encoders: Sequence[Encoder]) -> Encoder:
        """One encoder whose inputs are those of each in turn."""
        return cls(tuple(code for encoder in encoders for code in encoder.codes))

    @property
    def feature_names(self) -> list[str]:
        """One name per network input, in order."""
        names: list[str] = []
        for code in self.codes:
            if isinstance(code, NumericCode):
                names.append(code.name)
                if code.indicator:
                    names.append(f"{code.name} is missing")
                for frequency in code.frequencies:
                    names += [f"{wave} of {code.name} at {frequency:.3g}" for wave in ("sine", "cosine")]
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
                known = {key: item[key] for key in NumericCode.__dataclass_fields__ if key in item}
                codes.append(NumericCode(**{**known, "frequencies": tuple(known.get("frequencies", ()))}))
            else:
                codes.append(CategoryCode(item["name"], tuple(item["levels"])))
        return cls(tuple(codes))


def _inputs(code: NumericCode | CategoryCode, values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The inputs of one column, (rows,) each."""
    if isinstance(code, CategoryCode):
        yield from (values == level for level in code.levels)
        return
    missing = np.isnan(values)
    with np.errstate(over="ignore"):  # An overflow is cut like any other far value.
        scaled = np.clip((np.where(missing, code.median, values) - code.mean) / code.scale, -_LIMIT, _LIMIT)
    if code.clip:
        scaled = scaled / np.sqrt(1.0 + (scaled / code.clip) ** 2)
    yield scaled
    if code.indicator:
        yield missing
    for frequency in code.frequencies:
        turned = 2.0 * np.pi * frequency * scaled
        yield np.sin(turned)
        yield np.cos(turned)


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

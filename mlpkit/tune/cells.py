"""What text cells of a file mean: dates, and numbers with a decimal comma."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable
from typing import Any

from mlpkit.errors import DataError
from mlpkit.report._extras import require

_SHARE = 0.9  # With so many numbers among its cells a column is one of numbers; the others are bad cells.
_COMMA = r"[+-]?\d+(?:,\d+)?(?:[eE][+-]?\d+)?|[+-]?\d{1,3}(?:\.\d{3})+(?:,\d+)?"
_DATES = {
    r"\d{4}-\d{2}-\d{2}(?:[ T]\d{2}:\d{2}(?::\d{2}(?:\.\d+)?)?)?": "ISO8601",
    r"\d{1,2}\.\d{1,2}\.\d{4}": "%d.%m.%Y",
}


def read_cells(frame: Any, separator: str) -> Any:
    """The table with columns of dates as dates, and of "1,5" or "1.234,5" as numbers where commas separate nothing.

    Dates are 2024-12-31, with a time of day or without, or 31.12.2024; every filled cell must be one.
    """
    pd = require("pandas", "mlpkit.tune")
    for name in frame.columns:
        if frame[name].dtype.kind in "iufbmM":
            continue
        filled = frame[name].dropna()
        if not len(filled) or not all(isinstance(cell, str) for cell in filled):
            continue
        texts = filled.str.strip()
        if separator != "," and texts.str.contains(",", regex=False).any():
            numbers = texts.str.fullmatch(_COMMA)
            if numbers.mean() >= _SHARE:
                points = texts[numbers].str.replace(".", "", regex=False).str.replace(",", ".", regex=False)
                frame[name] = pd.to_numeric(points) if numbers.all() else frame[name].mask(numbers, points)
                frame[name] = frame[name].reindex(frame.index)
            continue
        for pattern, form in _DATES.items():
            if texts.str.fullmatch(pattern).all():
                dates = pd.to_datetime(texts, format=form, errors="coerce")
                if dates.notna().all():
                    frame[name] = dates.reindex(frame.index)
    return frame


def check_header(lines: Iterable[str], separator: str) -> None:
    """DataError for a name that the header holds twice."""
    counts = Counter(name.strip() for name in next(csv.reader(lines, delimiter=separator), []))
    for name, count in counts.items():
        if name and count > 1:
            raise DataError(f"column {name!r} appears more than once in the header: give each column a name of its own")

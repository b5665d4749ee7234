"""Raw tables in: reads a CSV, tells numbers from categories, checks every column, names what it left out."""

from __future__ import annotations

import difflib
import hashlib
import os
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from mlpkit.errors import ArgumentError, DataError, ShapeError
from mlpkit.report._extras import require
from mlpkit.tune.cells import check_header, read_cells

Kind = Literal["numeric", "categorical"]

_NUMBERS_SHARE = 0.9  # A text column with at least this share of numbers is a number column with bad cells.
_IDENTIFIER_SHARE = 0.5
_IDENTIFIER_LEVELS = 20
LARGE_FILE = 256 * 2**20  # bytes
ROWS_AT_ONCE = 200_000
MANY_ROWS = 200_000


@dataclass(frozen=True)
class Column:
    """One input column as the network will see it."""

    name: str
    kind: Kind


def pandas() -> Any:
    """The pandas module, or MissingExtraError."""
    return require("pandas", "mlpkit.tune")


def read_csv(path: str | os.PathLike[str]) -> Any:
    """A DataFrame from a text table with a header line; commas, semicolons or tabs. Empty cells and "?" are missing.

    Dates become dates; where semicolons or tabs separate, a decimal comma is understood.
    """
    pd = pandas()
    source = Path(path)
    if not source.exists():
        raise DataError(f"no such file: {source}")
    if source.is_dir():
        raise DataError(f"{source} is a directory; a CSV file is wanted")
    try:
        with source.open(encoding="utf-8-sig") as stream:
            header = stream.readline()
            separator = max(",;\t", key=header.count)
            stream.seek(0)
            check_header(stream, separator)
        with warnings.catch_warnings():
            # Rows longer than the header: unless told not to, pandas takes the first column for names of rows and
            # every other one for its neighbour.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = read_cells(_parse(source, separator), separator)
    except pd.errors.EmptyDataError:
        raise DataError(f"{source} is empty") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text (byte {error.start}): save it as UTF-8 CSV") from None
    except pd.errors.ParserWarning:
        raise DataError(f"{source} is no regular CSV: its rows have more cells than its header has names") from None
    except pd.errors.ParserError as error:
        raise DataError(f"{source} is no regular CSV: {str(error).strip()}") from None
    if len(frame) == 0:
        raise DataError(f"{source} has a header line but no rows")
    return frame


def _parse(source: Path, separator: str) -> Any:
    """The table; a large file piece by piece, since a parser holds the text of all that it reads at once."""
    pd = pandas()
    settings: dict[str, Any] = {
        "sep": separator, "na_values": ["?"], "skipinitialspace": True, "low_memory": False, "encoding": "utf-8-sig",
        "index_col": False,
    }  # fmt: skip
    if source.stat().st_size < LARGE_FILE:
        return pd.read_csv(source, **settings)
    pieces = [dict(piece.items()) for piece in pd.read_csv(source, chunksize=ROWS_AT_ONCE, **settings)]
    if not pieces:
        return pd.read_csv(source, **settings)
    # Column by column, each piece let go as it is joined: the table is never in memory twice.
    names, joined, mixed = list(pieces[0]), {}, []
    for name in names:
        parts = [piece.pop(name) for piece in pieces]
        kinds = {part.dtype.kind in "iufb" for part in parts if part.notna().any()}
        if len(kinds) > 1:  # Text in one piece makes text of the numbers in the others, as they were written.
            mixed.append(name)
            continue
        joined[name] = pd.concat(parts, ignore_index=True).infer_objects()
    if mixed:
        joined |= dict(pd.read_csv(source, usecols=mixed, **settings).items())
    return pd.DataFrame({name: joined[name] for name in names})


def read_table(path: str | os.PathLike[str]) -> Any:
    """A DataFrame from a CSV or, by its ending .parquet or .pq, from a Parquet file (needs pyarrow)."""
    source = Path(path)
    if source.suffix.lower() not in (".parquet", ".pq"):
        return read_csv(source)
    if not source.is_file():
        raise DataError(f"no such file: {source}")
    arrow = require("pyarrow", "a Parquet file")
    try:
        frame = require("pyarrow.parquet", "a Parquet file").read_table(source).to_pandas()
    except (OSError, ValueError, arrow.ArrowException) as error:
        raise DataError(f"{source} is no Parquet file: {str(error).splitlines()[0]}") from None
    if len(frame) == 0:
        raise DataError(f"{source} has columns but no rows")
    return frame


def to_frame(X: Any) -> Any:
    """``X`` as a DataFrame with text column names; arrays get x0, x1, ..."""
    pd = pandas()
    if isinstance(X, pd.DataFrame):
        frame = X.copy(deep=False)
    elif hasattr(X, "to_pandas"):  # polars, pyarrow
        frame = X.to_pandas()
    elif isinstance(X, dict):
        frame = pd.DataFrame(X)
    else:
        values = np.asarray(X)
        if values.ndim != 2:
            raise ShapeError(f"X has shape {values.shape}; a table of rows and columns is wanted")
        frame = pd.DataFrame(values, columns=[f"x{number}" for number in range(values.shape[1])])
    frame.columns = [str(name) for name in frame.columns]
    duplicates = frame.columns[frame.columns.duplicated()]
    if len(duplicates):
        raise DataError(f"column {duplicates[0]!r} appears more than once")
    return frame.reset_index(drop=True)


def take_target(frame: Any, name: str) -> tuple[Any, Any]:
    """(frame without the target, the target column), or a DataError that suggests the nearest name."""
    if name not in frame.columns:
        raise DataError(f"no column {name!r} for the target{nearest(name, frame.columns)}")
    return frame.drop(columns=name), frame[name]


def nearest(name: str, names: Iterable[str]) -> str:
    """A tail for an error sentence: the nearest of ``names``, or all of them if none is near."""
    known = [str(item) for item in names]
    lowered = {item.lower(): item for item in reversed(known)}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {lowered[near[0]]!r}?"
    shown = ", ".join(known[:12]) + (", ..." if len(known) > 12 else "")
    return f"; the columns are {shown}" if known else ""


def learn_columns(
    frame: Any, categorical: Collection[str] = (), ignore: Collection[str] = ()
) -> tuple[list[Column], list[str]]:
    """(usable columns, notes about those left out). Looks at types and counts only; statistics belong to the folds."""
    for name in (*categorical, *ignore):
        if name not in frame.columns:
            raise ArgumentError(f"no column {name!r}{nearest(name, frame.columns)}")
    if not len(frame.columns):
        raise DataError("the table has no column beside the target: there is nothing to learn from")
    columns: list[Column] = []
    notes: list[str] = []
    for name in frame.columns:
        if name in ignore:
            continue
        column, note = _learn_column(frame[name], name, name in categorical)
        if column is not None:
            columns.append(column)
        if note:
            notes.append(note)
    if not columns:
        raise DataError("no usable input column is left" + (": " + "; ".join(notes) if notes else ""))
    return columns, notes


def clean(frame: Any, columns: Iterable[Column]) -> dict[str, npt.NDArray[Any]]:
    """The named columns as arrays: float64 with NaN, or objects (text, None where missing)."""
    cleaned: dict[str, npt.NDArray[Any]] = {}
    for column in columns:
        if column.name not in frame.columns:
            raise DataError(f"the table lacks column {column.name!r}{nearest(column.name, frame.columns)}")
        series = frame[column.name]
        cleaned[column.name] = _numbers(series, column.name) if column.kind == "numeric" else _texts(series)
    return cleaned


def fingerprint(frame: Any, target: Any) -> str:
    """SHA-256 over names and values of the table: equal tables have equal fingerprints, in a file or in memory."""
    pd = pandas()
    digest = hashlib.sha256(repr([*frame.columns, target.name]).encode())
    for series in (*(frame[name] for name in frame.columns), target):
        if len(series) > MANY_ROWS and pd.api.types.is_numeric_dtype(series):
            numbers = series.to_numpy(dtype=np.float64, na_value=np.nan)
            digest.update(pd.util.hash_array(numbers).tobytes())
            continue
        values = series.astype(object).map(lambda value: None if value is pd.NA else value)
        digest.update(pd.util.hash_array(values.map(repr).to_numpy(dtype=object)).tobytes())
    return digest.hexdigest()


def is_number_like(series: Any) -> bool:
    """True for bool, number and date columns, and for text columns whose every filled cell reads as a number."""
    types = pandas().api.types
    if isinstance(series.dtype, pandas().CategoricalDtype):
        return False
    if types.is_numeric_dtype(series) or types.is_bool_dtype(series) or types.is_datetime64_any_dtype(series):
        return True
    filled = series.dropna()
    return len(filled) > 0 and bool(_parsed(filled).notna().all())


def _learn_column(series: Any, name: str, categorical: bool) -> tuple[Column | None, str]:
    filled = series.dropna()
    if series.dtype.kind in "cm":
        raise DataError(f"column {name!r} has type {series.dtype}, which a network cannot take; convert it to numbers")
    if len(filled) == 0:
        return None, f"column {name!r} is empty and was left out"
    try:
        levels = filled.nunique()
    except TypeError:
        # pandas counts by hash, and a cell may hold anything.
        raise DataError(
            f"column {name!r} holds cells that are neither numbers nor text, such as {str(filled.iloc[0])[:40]!r}"
        ) from None
    if levels == 1 and len(filled) == len(series):
        return None, f"column {name!r} holds a single value and was left out"
    if categorical:
        return Column(name, "categorical"), ""
    if is_number_like(series):
        return Column(name, "numeric"), ""
    if mostly_numbers(filled):
        reject_text(filled, f"column {name!r}")
    if levels > _IDENTIFIER_LEVELS and levels > _IDENTIFIER_SHARE * len(filled):
        return None, f"column {name!r} holds {levels} different texts in {len(filled)} rows and was left out"
    return Column(name, "categorical"), ""


def _numbers(series: Any, name: str) -> npt.NDArray[np.float64]:
    types = pandas().api.types
    values: npt.NDArray[np.float64]
    if types.is_datetime64_any_dtype(series):
        days = series.to_numpy(dtype="datetime64[ns]")
        values = days.astype(np.int64) / 86_400e9
        values[np.isnat(days)] = np.nan
    elif types.is_numeric_dtype(series) or types.is_bool_dtype(series):
        values = series.to_numpy(dtype=np.float64, na_value=np.nan)
    else:
        filled = series.dropna()
        if not _parsed(filled).notna().all():
            reject_text(filled, f"column {name!r}")
        values = _parsed(series).to_numpy(dtype=np.float64, na_value=np.nan)
    if np.isinf(values).any():
        row = int(series.index[np.isinf(values)][0]) + 1
        raise DataError(f"column {name!r} holds infinity in data row {row}; leave the cell empty if it is unknown")
    return values


def _texts(series: Any) -> npt.NDArray[Any]:
    # Once a level, not once a row: rows of a level share its text.
    codes, levels = pandas().factorize(series.astype(object))
    texts = np.array([*map(_text, levels), None], dtype=object)
    column: npt.NDArray[Any] = texts[codes]  # A gap has the code -1.
    return column


def _text(value: object) -> str:
    # A whole number reads 3 in one file and 3.0 in another, where the column has gaps: the same category.
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def mostly_numbers(filled: Any) -> bool:
    """A text column in which nearly every cell reads as a number: the others are bad cells."""
    return not isinstance(filled.dtype, pandas().CategoricalDtype) and _parsed(filled).notna().mean() >= _NUMBERS_SHARE


def reject_text(filled: Any, what: str, hint: str = "") -> None:
    """DataError naming the first cell that is no number; there must be one."""
    bad = _parsed(filled).isna().to_numpy()
    row, value = int(filled.index[bad][0]) + 1, filled[bad].iloc[0]
    count = int(bad.sum())
    more = f" (and {count - 1} more rows)" if count > 1 else ""
    raise DataError(f"{what} must hold numbers, but data row {row} holds {str(value)!r}{more}{hint}")


def _parsed(series: Any) -> Any:
    return pandas().to_numeric(series.astype(object), errors="coerce")

"""Every error mlpkit raises on purpose: each is a ``MlpkitError`` and the built-in class a caller would expect."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class MlpkitError(Exception):
    """Base class of all errors raised by mlpkit."""


class ArgumentError(MlpkitError, ValueError):
    """An argument has a value the function cannot take."""


class ShapeError(MlpkitError, ValueError):
    """Tensor shapes do not fit each other."""


class DtypeError(MlpkitError, TypeError):
    """A dtype is not supported or two dtypes do not fit each other."""


class DeviceError(MlpkitError, ValueError):
    """Tensors lie on different devices, or on one that mlpkit has no kernel for."""


class DataError(MlpkitError, ValueError):
    """A table, file or dataset cannot be used as it is."""


class OutputError(MlpkitError, OSError):
    """A file or folder cannot be written."""


class BuildError(MlpkitError, ImportError):
    """The native extension is missing or was built for another torch."""


class MissingExtraError(MlpkitError, ImportError):
    """An optional dependency is not installed; the message holds the pip line."""


class NonFiniteError(MlpkitError, FloatingPointError):
    """A training step met Inf or NaN and the caller asked for an error; ``records`` tells of the skips behind it."""

    def __init__(self, message: str, records: Iterable[Any] = ()) -> None:
        super().__init__(message)
        self.records: list[Any] = list(records)

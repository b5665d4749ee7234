"""Optional packages: import one, or say in one sentence how to install it. Shared by the layers that have extras."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from mlpkit.errors import MissingExtraError


def require(module: str, wanted_by: str, extras: str = "tune,report") -> Any:
    """``import module``, or raise MissingExtraError with the pip line; ``wanted_by`` names the feature."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        # A broken dependency of an installed package is another problem and keeps its own message.
        if error.name != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f'{wanted_by} needs {error.name}, which is not installed: pip install "mlpkit[{extras}]"'
        ) from error

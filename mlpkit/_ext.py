"""Loads the native extension, or says in one sentence why it cannot be loaded. Nothing else imports ``mlpkit._C``."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch

from mlpkit.errors import BuildError

REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."


def _load() -> ModuleType:
    try:
        from mlpkit import _build_config
    except ImportError as error:
        raise BuildError(f"mlpkit's native extension is not built; from its source folder run: {REBUILD}") from error
    if torch.__version__ != _build_config.TORCH_VERSION:
        raise BuildError(
            f"mlpkit was built for torch {_build_config.TORCH_VERSION}, but torch {torch.__version__} is imported; "
            f"from mlpkit's source folder run: {REBUILD}"
        )
    try:
        return importlib.import_module("mlpkit._C")
    except ImportError as error:
        raise BuildError(
            f"mlpkit's native extension cannot be loaded ({error}); from its source folder run: {REBUILD}"
        ) from error


_C = _load()

"""Run directories: where one may be written, and how it appears whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlpkit.errors import ArgumentError, DataError
from mlpkit.report._files import check_folder, writing

_MARK = "report.json"


def check(out: str | os.PathLike[str], overwrite: bool) -> Path:
    """The path, if a run may be written there: absent, an empty directory, or an earlier run and overwrite."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"out: {path} exists and is a file; a directory is wanted")
    if path.is_dir() and any(path.iterdir()):
        if not (path / _MARK).is_file():
            raise ArgumentError(f"out: {path} exists and holds other files; choose another directory")
        if not overwrite:
            raise ArgumentError(
                f"out: {path} holds an earlier run; choose another directory or overwrite it (--overwrite)"
            )
    # A run replaces its directory, so what must be writable is the folder around it.
    check_folder(path.parent, "out")
    return path


def read(path: Path) -> dict[str, Any]:
    """What report.json of a run directory holds; DataError if it is none."""
    try:
        data = json.loads((path / _MARK).read_text(encoding="utf-8"))
    except OSError:
        raise DataError(f"{path} is no run directory: it has no {_MARK}") from None
    except ValueError:
        data = None
    if not isinstance(data, dict) or data.get("format") != "mlpkit-tune":
        raise DataError(f"{path} holds a damaged {_MARK}")
    return data


def free_name(stem: str) -> Path:
    """``<stem>-run`` here, or ``<stem>-run-2`` and so on: the first that does not exist."""
    path, number = Path(f"{stem}-run"), 1
    while path.exists():
        number += 1
        path = Path(f"{stem}-run-{number}")
    return path


def write(path: Path, overwrite: bool, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a temporary directory beside ``path``, then rename it; nothing is left if it fails."""
    check(path, overwrite)
    with writing(path):
        _write(path, fill)


def _write(path: Path, fill: Callable[[Path], None]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fill(made)
        os.chmod(made, 0o755)
        for file in made.iterdir():
            os.chmod(file, 0o644)  # Some writers keep a file to its owner.
        if path.exists():
            _replace(path, made)
        else:
            os.rename(made, path)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def _replace(path: Path, made: Path) -> None:
    """A directory cannot be replaced in one move: the old run steps aside, and comes back if the new one fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        os.rename(path, aside / "old")
        try:
            os.rename(made, path)
        except BaseException:
            os.rename(aside / "old", path)
            raise
    finally:
        if path.exists():
            shutil.rmtree(aside, ignore_errors=True)

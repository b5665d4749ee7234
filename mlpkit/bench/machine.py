"""What the numbers depend on: versions, processor, commit, load."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import mlpkit
from mlpkit._ext import _C
from mlpkit.bench.case import Settings


def environment(settings: Settings) -> dict[str, Any]:
    """Everything a reader needs to judge the figures, or to make them again."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "mlpkit": mlpkit.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "rivals": {"torch": torch.__version__} | _installed("scikit-learn"),
        "system": platform.platform(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "cpu_capability": _C.cpu_capability(),
        "gemm_library": _C.gemm_library(),
        "load": load(),
        "threads": settings.threads,
        "rounds": settings.rounds,
        "clock": settings.clock,
        "compile": settings.compile,
        "quick": settings.quick,
        "caches": "warm",
    }


def load() -> float | None:
    """How many processes wanted a core in the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def processor() -> str:
    """The processor's name."""
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        for line in listing.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the sources, ``+`` after it where they were changed since; None for an installed package."""
    root = Path(mlpkit.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # site-packages inside somebody's repository is not ours
        return None
    found = _git(root, "rev-parse", "HEAD")
    return found and found + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None  # no git here: the results say so
    return result.stdout.strip()


def _installed(*packages: str) -> dict[str, str]:
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

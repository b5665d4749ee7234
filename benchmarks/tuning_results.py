"""A results file that is written piece by piece: a benchmark that was killed goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mlpkit.bench.machine import commit, load, processor
from mlpkit.tune.plain import versions


def environment() -> dict[str, Any]:
    """Versions, sources and machine."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


class Part:
    """One part of a results file: pieces by name, each computed once, and a summary of them.

    settings: what the pieces depend on. Pieces of other settings are not used again, nor, if the part follows our
    sources, those of another commit.
    """

    def __init__(self, path: Path | None, name: str, settings: dict[str, Any], *, follows_sources: bool = True) -> None:
        self.path, self.name = path, name
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        before = _read(path).get(name, {})
        same = before.get("settings") == self.settings
        if follows_sources:
            same = same and before.get("commit") == commit()
        self.pieces: dict[str, Any] = before.get("pieces", {}) if same else {}

    def piece(self, name: str, compute: Callable[..., Any], *given: Any) -> Any:
        """What ``compute(*given)`` gives, which the file remembers."""
        if name not in self.pieces:
            self.pieces[name] = {**compute(*given), "load": load()}
            self._write({})
        return self.pieces[name]

    def summary(self, words: dict[str, Any]) -> None:
        """What the pieces amount to, beside them."""
        self._write(words)

    def _write(self, words: dict[str, Any]) -> None:
        if self.path is None:
            return
        whole = _read(self.path)
        whole[self.name] = {**environment(), "settings": self.settings, **words, "pieces": self.pieces}
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(whole, indent=1) + "\n")
        beside.replace(self.path)


def _read(path: Path | None) -> dict[str, Any]:
    if path is None or not path.exists():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    return found

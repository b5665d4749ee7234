"""What was trained, written down as it is done: a search that was killed goes on where it stopped."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mlpkit.errors import DataError
from mlpkit.report._files import writing
from mlpkit.tune.space import Encoding
from mlpkit.tune.spec import Spec
from mlpkit.tune.trainer import Outcome

_LARGEST_OUTPUT = 200_000  # Test outputs of more numbers than this are not kept.
Work = tuple[Spec, Encoding, str, int]  # what is trained; a mark, and the first fold: on what


class Journal:
    """Outcomes by what was trained. Without a path it remembers nothing.

    The search is deterministic, given the outcomes: run again with the journal of a killed run, it proposes the same
    candidates, finds their outcomes here and trains only the rest. A last line that was cut is ignored.
    """

    def __init__(self, path: Path | None = None, header: dict[str, Any] | None = None) -> None:
        self.path = path
        self.resumed = 0
        self.credits = True  # What is found here was trained at the expense of this search.
        self._known: dict[str, list[dict[str, Any]]] = {}
        if path is None:
            return
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path, header or {})
            else:
                _append(path, {"header": header or {}})

    def find(self, work: Work) -> list[Outcome] | None:
        """What training the spec on these folds gave, or None if it must be trained."""
        found = self._known.get(key_of(*work))
        return None if found is None else [outcome_of(item) for item in found]

    def take(self, wanted: Sequence[Work]) -> list[int]:
        """Numbers of the pieces of work that this process is to train now: all of them."""
        return list(range(len(wanted)))

    def wait(self) -> None:
        """Nobody else is at work."""

    def add(self, work: Work, outcomes: Sequence[Outcome]) -> None:
        """Write down finished folds; what the clock cut is not: it will be trained in full."""
        if self.path is None or not outcomes or any(item.stopped in ("clock", "not started") for item in outcomes):
            return
        plain = [plain_of(outcome) for outcome in outcomes]
        with writing(self.path):
            _append(self.path, {"key": key_of(*work), "outcomes": plain})

    def close(self) -> None:
        """The search is over."""

    def _read(self, path: Path, header: dict[str, Any]) -> None:
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            path.write_bytes(whole)
        lines = whole.decode("utf-8").splitlines()
        try:
            items = [json.loads(line) for line in lines]
        except ValueError:
            raise DataError(f"{path} is damaged; remove it to start anew") from None
        if not items or items[0].get("header") != json.loads(json.dumps(header)):
            path.unlink()
            _append(path, {"header": header})
            return
        self._known = {item["key"]: item["outcomes"] for item in items[1:]}
        self.resumed = len(self._known)


def header_of(path: Path) -> dict[str, Any] | None:
    """The first line of a journal, or None if there is none."""
    try:
        with path.open(encoding="utf-8") as stream:
            header = json.loads(stream.readline()).get("header")
        return header if isinstance(header, dict) else None
    except (OSError, ValueError):
        return None


def _append(path: Path, item: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(item) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def key_of(spec: Spec, encoding: Encoding, mark: str, first: int) -> str:
    """A name for a piece of work: what is trained, and on which folds."""
    return hashlib.sha256(repr((spec, encoding, mark, first)).encode()).hexdigest()[:32]


def plain_of(outcome: Outcome) -> dict[str, Any]:
    """An outcome as JSON holds it, with its outputs unless they are many."""
    plain: dict[str, Any] = {**outcome.to_dict(), "output": None}
    if outcome.output is not None and outcome.output.numel() <= _LARGEST_OUTPUT:
        values = np.ascontiguousarray(outcome.output.numpy(), dtype="<f4")
        plain["output"] = [list(values.shape), base64.b64encode(values.tobytes()).decode()]
    return plain


def outcome_of(item: dict[str, Any]) -> Outcome:
    """The inverse of ``plain_of``."""
    item = dict(item)
    output = item.pop("output")
    outcome = Outcome(**item)
    if output is not None:
        values = np.frombuffer(base64.b64decode(output[1]), dtype="<f4").reshape(output[0])
        outcome.output = torch.from_numpy(values.copy())
    return outcome

"""A trace as a log: one JSON object a line, or TensorBoard scalars."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpkit.report import write_whole
from mlpkit.report._extras import require
from mlpkit.trace._numbers import short

if TYPE_CHECKING:
    from mlpkit.trace._diagnosis import Diagnosis
    from mlpkit.trace._history import History


def _by_step(history: History) -> dict[int, dict[str, Any]]:
    """Losses and largest magnitudes of modules and parameters, by step; the latest 256 steps."""
    steps: dict[int, dict[str, Any]] = {}
    for step, value in history.losses:
        steps.setdefault(step, {})["loss"] = value
    for kind, series in (("modules", history.modules), ("parameters", history.parameters)):
        for name, values in series.items():
            for step, value in values:
                if step >= 0:
                    steps.setdefault(step, {}).setdefault(kind, {})[name] = value
    return dict(sorted(steps.items()))


def write_lines(path: str | os.PathLike[str], history: History, diagnoses: Sequence[Diagnosis]) -> Path:
    """A line for each step (``kind``: ``step``) and each diagnosis (``kind``: ``diagnosis``)."""
    lines = [{"kind": "step", "step": step, **_plain(values)} for step, values in _by_step(history).items()]
    lines += [{"kind": "diagnosis", **found.to_dict()} for found in diagnoses]
    return write_whole(path, "".join(json.dumps(line, allow_nan=False) + "\n" for line in lines))


def write_events(folder: str | os.PathLike[str], history: History, diagnoses: Sequence[Diagnosis]) -> Path:
    """TensorBoard: the loss, log2 of the largest magnitude of each module and parameter, and the sentences as text."""
    require("tensorboard", "a TensorBoard log", "tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(os.fspath(folder))
    for step, values in _by_step(history).items():
        if "loss" in values:
            writer.add_scalar("trace/loss", values["loss"], step)
        for kind in ("modules", "parameters"):
            for name, value in values.get(kind, {}).items():
                if value > 0 and math.isfinite(value):
                    writer.add_scalar(f"trace/log2_absmax/{name}", math.log2(value), step)
    for found in diagnoses:
        writer.add_text("trace/diagnosis", found.sentence, found.step or 0)
    writer.close()
    return Path(folder)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return short(value) if isinstance(value, float) and not math.isfinite(value) else value

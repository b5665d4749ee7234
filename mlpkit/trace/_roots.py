"""Roots beyond the first bad value: a number rounded to zero, an exploding run, a hyperparameter."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mlpkit.trace import _cause, _shadow
from mlpkit.trace._history import History
from mlpkit.trace._intercept import OpCall
from mlpkit.trace._numbers import short, smallest
from mlpkit.trace._records import Finding, Incident, OpRecord, Scan

_PRODUCTS = frozenset({"mul", "div", "pow", "square", "addcmul", "prod", "mean", "var", "linalg_vector_norm"})
_EXPONENTIALS = frozenset({"exp", "exp2", "sigmoid", "_softmax", "special_expm1"})
_BOUNDS = frozenset({"add", "clamp", "clamp_min", "maximum", "fill", "full", "full_like", "scalar_tensor", "where"})
_ZERO_CAUSES = frozenset({"division_by_zero", "zero_over_zero", "log_of_zero", "zero_times_inf"})
_DEPTH = 8


def underflow(
    call: OpCall, record: OpRecord, written: Sequence[torch.Tensor], scans: Sequence[Scan], parents: Sequence[OpRecord]
) -> Finding | None:
    """Did this operation round a non-zero number to zero? Asked only where zeros appeared that no input explains."""
    if not record.zero or not _suspicious(call, record, scans, parents):
        return None
    for position, (tensor, found) in enumerate(zip(written, scans)):
        if found.zero:
            which = position - len(call.outputs) if position >= len(call.outputs) else position
            finding = _cause.rounded_to_zero(call, tensor, which)
            if finding:
                return finding
    return None


def _suspicious(call: OpCall, record: OpRecord, scans: Sequence[Scan], parents: Sequence[OpRecord]) -> bool:
    base = _shadow.base_name(call.name)
    inherited = sum(parent.zero for parent in parents)
    if call.name in ("_to_copy", "copy_"):
        return record.zero > inherited
    if record.place.phase == "optimizer" and base in ("mul", "div"):
        return False
    if base in _PRODUCTS:
        return record.zero > inherited
    if base in _EXPONENTIALS:
        return True
    if base in _BOUNDS:
        tiny = smallest(record.dtype)
        return any(0 < abs(value) < tiny for value in _shadow.scalars(call, 0))
    return False


def find(incident: Incident, history: History, step_size: float) -> None:
    """Fill in an earlier root of an incident, if the records show one."""
    finding = incident.finding
    if finding.cause in _ZERO_CAUSES:
        rounded = _rounded_ancestor(incident.record)
        if rounded is not None and rounded.underflow is not None:
            incident.root, incident.root_cause = rounded, "underflow"
            incident.root_text = rounded.underflow.text
    elif finding.cause == "overflow" and step_size >= 1.0:
        incident.root_cause = "hyperparameter"
        incident.root_text = f"the update was multiplied by {short(step_size)}"
    elif finding.cause == "overflow":
        explosion = history.explosion(incident.record)
        if explosion is not None:
            incident.root_cause, incident.root_text = explosion.cause, explosion.text
            incident.links.append(explosion.link())


def _rounded_ancestor(record: OpRecord) -> OpRecord | None:
    """The nearest ancestor that rounded to zero, through operations that hand zeros on."""
    level: list[OpRecord] = list(record.parents)
    for _ in range(_DEPTH):
        for candidate in level:
            if candidate.underflow is not None:
                return candidate
        level = [parent for candidate in level if candidate.zero for parent in candidate.parents]
    return None

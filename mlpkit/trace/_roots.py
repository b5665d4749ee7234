"""Roots beyond the first bad value: a number rounded to zero, an exploding run, a hyperparameter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import torch

from mlpkit.trace import _cause, _shadow
from mlpkit.trace._capture import Captures
from mlpkit.trace._history import History
from mlpkit.trace._intercept import OpCall, is_plain
from mlpkit.trace._numbers import short, smallest
from mlpkit.trace._records import Finding, Incident, OpRecord, Scan

PRODUCTS = frozenset({"mul", "div", "pow", "square", "addcmul", "prod", "mean", "var", "linalg_vector_norm"})
EXPONENTIALS = frozenset({"exp", "exp2", "sigmoid", "_softmax", "special_expm1"})
BOUNDS = frozenset({"add", "clamp", "clamp_min", "maximum", "fill", "full", "full_like", "scalar_tensor", "where"})
_ZERO_CAUSES = frozenset({"division_by_zero", "zero_over_zero", "log_of_zero", "zero_times_inf"})
ROUNDED = frozenset({"add", "sub", "rsub", "clamp", "clamp_min", "clamp_max"})
# Operation of the backward pass: what it is in the forward pass, and the values of its result where it is flat.
FLAT = {
    "sigmoid_backward": ("sigmoid", (0.0, 1.0)),
    "tanh_backward": ("tanh", (-1.0, 1.0)),
    "_softmax_backward_data": ("_softmax", (0.0, 1.0)),
}
_MOST_SEEN = 4096
_MOST_ASKED = 4  # times that one operation's zeros are computed again in fp64


class Roots:
    """Looks at every finite result for numbers that were rounded away."""

    def __init__(self) -> None:
        self.captures = Captures()
        self._asked: Counter[tuple[str, str]] = Counter()

    def look(self, call: OpCall, record: OpRecord, written: Sequence[torch.Tensor], scans: Sequence[Scan]) -> None:
        """Did this operation round a number to zero? Asked only where zeros appeared that no input explains."""
        if record.place.phase != "backward":
            record.underflow = _rounded_scalar(call, record)
        if not record.zero or record.underflow is not None:
            return
        nothing_else = record.nothing and not any(parent.nothing for parent in record.parents)
        if nothing_else:
            site = (call.name, record.place.phase + record.place.location)
            self._asked[site] += 1
            nothing_else = self._asked[site] <= _MOST_ASKED and bool(record.parents)
        if nothing_else and is_flat(call):
            record.flat = True
        elif nothing_else or _suspicious(call, record, scans):
            record.underflow = _rounded(call, written, scans)
            if record.underflow is not None:
                record.underflow.capture = self.captures.take(call)


def is_flat(call: OpCall) -> bool:
    """The gradient is zero because every element lies in the flat part of an activation."""
    if call.name not in FLAT or len(call.args) < 2 or not is_plain(call.args[1]):
        return False
    result, ends = call.args[1].detach(), FLAT[call.name][1]
    return bool(((result == ends[0]) | (result == ends[1])).all())


def _rounded_scalar(call: OpCall, record: OpRecord) -> Finding | None:
    """A bound such as 1 - 1e-8, which float32 rounds to 1."""
    if _shadow.base_name(call.name) not in ROUNDED:
        return None
    dtype = getattr(torch, record.dtype)
    for value in _shadow.scalars(call, 0):
        if 0 < abs(abs(value) - 1) < 1e-2 and abs(float(torch.tensor(value, dtype=dtype))) == 1:
            text = f"{'-' if value < 0 else ''}1 {'-' if abs(value) < 1 else '+'} {short(abs(abs(value) - 1))}"
            text += f" was rounded to {short(math.copysign(1.0, value))}"
            return Finding("underflow", short(math.copysign(1.0, value)), text, exact=value)
    return None


def _rounded(call: OpCall, written: Sequence[torch.Tensor], scans: Sequence[Scan]) -> Finding | None:
    for position, (tensor, found) in enumerate(zip(written, scans)):
        if found.zero:
            which = position - len(call.outputs) if position >= len(call.outputs) else position
            finding = _cause.rounded_to_zero(call, tensor, which)
            if finding:
                return finding
    return None


def _suspicious(call: OpCall, record: OpRecord, scans: Sequence[Scan]) -> bool:
    base = _shadow.base_name(call.name)
    if record.place.phase == "backward":
        return False
    inherited = sum(parent.zero for parent in record.parents)
    if call.name in ("_to_copy", "copy_"):
        return record.zero > inherited
    if record.place.phase == "optimizer" and base in ("mul", "div"):
        return False
    if base in PRODUCTS:
        return record.zero > inherited
    if base in EXPONENTIALS:
        return True
    if base in BOUNDS:
        tiny = smallest(record.dtype)
        return any(0 < abs(value) < tiny for value in _shadow.scalars(call, 0))
    return False


def find(incident: Incident, history: History, step_size: float) -> None:
    """Fill in an earlier root of an incident, if the records show one."""
    finding, record = incident.finding, incident.record
    if finding.cause == "hyperparameter" and record.place.phase != "optimizer" and not record.derived:
        # A number that was written into data on purpose.
        finding.cause, record.op, record.place = "external", "input", record.place._replace(phase="source")
    elif finding.cause in _ZERO_CAUSES:
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
    seen: set[int] = set()
    while level and len(seen) < _MOST_SEEN:
        for candidate in level:
            if candidate.underflow is not None:
                return candidate
        seen.update(id(candidate) for candidate in level)
        further = (parent for candidate in level if candidate.zero for parent in candidate.parents)
        level = list({id(parent): parent for parent in further if id(parent) not in seen}.values())
    return None

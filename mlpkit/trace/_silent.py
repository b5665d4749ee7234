"""Failures without a NaN: parameters whose gradient is all zeros, or whose update rounds away, step after step.

A gradient of zeros is followed back, from zero result to zero operand, to the operation that first gave nothing but
zeros out of something. That is a failure where the zeros are a loss (numbers rounded to zero, an Inf that was divided
by, every unit of a layer off, an activation in its flat part everywhere) and none where they are meant (masks, zero
parameters, unused parts, a loss of zero).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from mlpkit.trace._history import History
from mlpkit.trace._intercept import is_plain
from mlpkit.trace._ledger import Ledger
from mlpkit.trace._numbers import limit, short
from mlpkit.trace._records import Finding, Incident, Link, OpRecord, Place, Sink
from mlpkit.trace._roots import FLAT
from mlpkit.trace._scan import scan
from mlpkit.trace._sinks import Sinks

_CONSTANTS = frozenset(
    {
        "param",
        "input",
        "empty",
        "zeros",
        "zeros_like",
        "zero_",
        "fill_",
        "full",
        "full_like",
        "scalar_tensor",
        "new_zeros",
    }
)
# Zero wherever the input is below a threshold.
_GATES = frozenset(
    {"relu", "relu_", "clamp_min", "clamp_min_", "hardtanh", "hardtanh_", "threshold", "linear_act_dropout"}
)
_GATES |= frozenset({"leaky_relu", "gelu", "silu", "hardswish", "_addmm_activation", "clamp", "maximum"})
_GATE_GRADIENTS = frozenset({"threshold_backward", "where", "mul", "masked_fill", "hardtanh_backward"})
_FLAT_NODES = {"ClampBackward0": "clamp", "ClampBackward1": "clamp", "HardtanhBackward0": "hardtanh"}
_NORMS = frozenset({"native_layer_norm", "native_group_norm", "native_batch_norm"})
_LOW = ("float16", "bfloat16")
_ENOUGH = 3  # steps in a row
_DEPTH = 4096
_SLIGHT = 1e-3  # gradients below it may round away in a run that has come to rest


class Origin(NamedTuple):
    """Where a gradient's zeros come from: ``underflow``, ``killed``, ``norm``, ``dead`` or ``flat``."""

    kind: str
    record: OpRecord
    through_weights: bool


@dataclass(slots=True, eq=False)
class Stall:
    """Parameters that stand still for one reason."""

    kind: str
    record: OpRecord
    first: int
    last: int
    steps: int = 1
    names: dict[str, None] = field(default_factory=dict)
    share: float = 1.0
    finding: Finding | None = None
    incident: Incident | None = None  # the Inf that became zeros


class Silence:
    """Watches gradients and updates for what stands still."""

    def __init__(self, ledger: Ledger, history: History, sinks: Sinks) -> None:
        self._ledger, self._history, self._sinks = ledger, history, sinks
        self._stalls: dict[tuple[str, str, str, str, str], Stall] = {}
        self._steps: dict[int, None] = {}  # steps with a backward pass

    # Gradients of zeros.

    def gradients(self, step: int, zeros: bool) -> None:
        """A backward pass is over. zeros: it left a parameter a gradient that was last written with zeros only."""
        self._steps[step] = None
        losses = self._history.losses
        if not losses or not zeros:
            return
        still: dict[int, tuple[Origin, list[str]]] = {}
        total = 0
        for parameter in self._ledger.leaves():
            gradient = parameter.grad
            if gradient is None or not is_plain(gradient):
                continue
            total += 1
            cell = self._ledger.find(gradient)
            if cell is None or cell.record is None or not cell.record.zero or cell.bad or scan(gradient).absmax:
                continue
            origin = _origin(cell.record)
            if origin is not None and (losses[-1][1] or origin.kind in ("underflow", "killed")):
                owner = self._ledger.find(parameter)
                # Numbers that shrink from layer to layer vanish in many places; the first one stands for all.
                group = 0 if origin.kind == "underflow" else id(origin.record)
                known = still.setdefault(group, (origin, []))
                better = origin.through_weights and not known[0].through_weights
                if better or (not group and origin.record.index < known[0].record.index):
                    still[group] = (origin, known[1])
                known[1].append(owner.name if owner is not None else "")
        for origin, names in still.values():
            if origin.kind != "dead" or origin.through_weights:
                self._note(origin.kind, origin.record, step, names, len(names) / total)

    def _note(
        self, kind: str, record: OpRecord, step: int, names: Sequence[str], share: float, finding: Finding | None = None
    ) -> None:
        place = record.place
        key = (kind, record.op, place.phase, place.module, place.location)
        stall = self._stalls.get(key)
        if stall is None or (step - stall.last > 1 and stall.steps < _ENOUGH):
            stall = self._stalls[key] = Stall(kind, record, step, step, share=share, finding=finding)
            stall.incident = next((parent.incident for parent in _bad_parents(record)), None)
        elif step > stall.last:
            stall.steps += 1
            stall.last = step
        stall.share = max(stall.share, share)
        stall.names.update(dict.fromkeys(names))

    # Updates that change nothing.

    def updated(self, step: int) -> None:
        """The optimizer has stepped."""
        still, total = self._ledger.unmoved()
        if still:
            self._frozen(still, total, step)

    def wrote(self, tensor: torch.Tensor, record: OpRecord) -> None:
        """A parameter was updated by hand, to what it was before."""
        if tensor.grad is None or all(parent.nothing or parent.subject for parent in record.parents):
            return
        self._frozen([tensor], 1, record.place.step)

    def _frozen(self, still: Sequence[torch.Tensor], total: int, step: int) -> None:
        zero: dict[int, tuple[Origin, list[str]]] = {}
        names, first = [], None
        for parameter in still:
            gradient = parameter.grad
            assert gradient is not None
            owner, cell = self._ledger.find(parameter), self._ledger.find(gradient)
            name = owner.name if owner is not None else ""
            if scan(gradient).absmax > 0:
                names.append(name)
                first = first or (parameter, gradient, owner.record if owner is not None else None)
            elif cell is not None and cell.record is not None and cell.record.place.phase == "optimizer":
                origin = _origin(cell.record)
                if origin is not None and origin.kind in ("killed", "underflow"):
                    zero.setdefault(id(origin.record), (origin, []))[1].append(name)
        for origin, owners in zero.values():
            self._note(origin.kind, origin.record, step, owners, len(owners) / total)
        if first is None:
            return
        parameter, gradient, record = first
        if record is None or record.place.phase != "optimizer":
            return
        low = record.dtype in _LOW
        if 2 * len(names) < total or not (low or (len(names) == total and self._begins(step))):
            return
        if scan(gradient).absmax < _SLIGHT:
            return  # close to a minimum nothing need move
        self._note("rounded", record, step, names, len(names) / total, self._rounded(parameter, gradient, record))

    def _begins(self, step: int) -> bool:
        known = [stall for stall in self._stalls.values() if stall.kind == "rounded"]
        return step == min(self._steps, default=step) or any(stall.last == step - 1 for stall in known)

    def _rounded(self, parameter: torch.Tensor, gradient: torch.Tensor, record: OpRecord) -> Finding:
        weight, slope = scan(parameter).absmax, scan(gradient).absmax
        rate = self._history.learning_rate
        at = f" at learning rate {short(rate)}" if rate is not None else ""
        text = f"the update rounds away: gradients up to {short(slope)}{at}, parameters up to {short(weight)}"
        operands = {"parameter": weight, "gradient": slope, **({"lr": rate} if rate is not None else {})}
        return Finding("underflow", "0", text, [], operands, limit=limit(record.dtype), shape=list(parameter.shape))

    # The end.

    def finish(self) -> None:
        """The program is over: what stood still to the end, or long enough, is told."""
        steps = list(self._steps)
        for stall in self._stalls.values():
            after = sum(step >= stall.first for step in steps)
            short_run = stall.kind != "rounded" and (stall.first <= min(steps, default=0) or stall.kind == "killed")
            needed = min(_ENOUGH, after) if short_run else _ENOUGH
            to_the_end = stall.last >= max(steps, default=0)
            if stall.steps < needed or not (to_the_end or stall.steps >= 2 * _ENOUGH):
                continue
            if stall.kind == "underflow" and stall.share < 1 / 3:
                continue
            self._tell(stall)

    def _tell(self, stall: Stall) -> None:
        record, place = stall.record, stall.record.place
        names = list(stall.names)
        incident = stall.incident
        if stall.kind == "killed" and incident is not None:
            if incident.live:
                return
            incident.links = [_birth(incident), _link(record, "contamination", "", "the Inf became 0")]
        else:
            finding = stall.finding or record.underflow or self._explained(stall)
            incident = Incident(record, finding, history=self._history.of(record))
            incident.links = [_link(record, "saturation", finding.cause, finding.text)]
        what = "did not move" if stall.kind == "rounded" else "got a gradient of zeros"
        many = f" and {len(names) - 1} more" if len(names) > 1 else ""
        spoken = "1 step" if stall.steps == 1 else f"{stall.steps} steps"
        incident.still = f"`{names[0]}`{many} {what} for {spoken}"
        last = Place(stall.last, "optimizer", "", place.file, place.line, "")
        incident.links.append(Link(stall.last, "optimizer", record.op, "", "persistence", "", incident.still))
        incident.sinks.extend(Sink("standstill", name, last, record.op) for name in names[:64])
        self._sinks.add(incident)

    def _explained(self, stall: Stall) -> Finding:
        record = stall.record
        size = "all elements"
        moved = self._history.leap() if stall.first > min(self._steps, default=0) else None
        if stall.kind == "norm":
            text, cause = (
                f"the variance passed {short(limit(record.dtype))}, so that every input is scaled to 0",
                "overflow",
            )
        elif stall.kind == "dead":
            text, cause = f"{size} are off (0)", "external"
        elif record.op in ("clamp", "hardtanh"):
            text, cause = f"{size} lie outside the bounds, where the slope is 0", "external"
        else:
            text, cause = f"{size} lie where the slope rounds to 0", "underflow"
        if moved is not None:
            text, cause = f"{text}; {moved.text}", "hyperparameter"
        return Finding(cause, "0", text, limit=limit(record.dtype))


def _origin(record: OpRecord) -> Origin | None:
    """The operation that gave all zeros first, from a gradient of zeros; None where the zeros are meant."""
    through = False
    for _ in range(_DEPTH):
        zeros = [parent for parent in record.parents if parent.nothing]
        computed = [parent for parent in zeros if parent.op not in _CONSTANTS and parent.parents and not parent.subject]
        if not computed:
            break
        earliest = min(computed, key=lambda parent: parent.index)
        if record.place.phase == "backward" and earliest.place.phase == "forward":
            through = record.op not in _GATE_GRADIENTS
        record = earliest
    if _passes_variance(record):
        return Origin("norm", _forward_of(record, record.op.removesuffix("_backward")) or record, through)
    if record.underflow is not None:
        return Origin("underflow", record, through)
    if _bad_parents(record):
        return Origin("killed", record, through)
    if record.flat:
        return Origin("flat", _forward_of(record, FLAT[record.op][0]) or record, through)
    node = record.place.node
    if node in _FLAT_NODES:
        return Origin("flat", _forward_of(record, _FLAT_NODES[node]) or record, through)
    if zeros or not record.parents:
        return None
    if record.op in _GATES and record.place.phase == "forward":
        return Origin("dead", record, through)
    return None


def _passes_variance(record: OpRecord) -> bool:
    """A normalisation of numbers whose squares are beyond the dtype."""
    if record.op.removesuffix("_backward") not in _NORMS or not record.parents:
        return False
    return max(parent.absmax for parent in record.parents) > math.sqrt(limit(record.dtype))


def _bad_parents(record: OpRecord) -> list[OpRecord]:
    return [p for p in record.parents if p.value and p.incident is not None and not p.incident.intended]


def _forward_of(record: OpRecord, op: str) -> OpRecord | None:
    """The forward operation whose gradient this is, found among the ancestors."""
    level: Iterable[OpRecord] = record.parents
    seen: set[int] = set()
    for _ in range(_DEPTH):
        found = [parent for parent in level if id(parent) not in seen]
        if not found:
            return None
        seen.update(id(parent) for parent in found)
        same = [p for p in found if p.op.removesuffix("_") == op and p.place.phase == "forward"]
        here = [p for p in same if (p.place.location, p.place.module) == (record.place.location, record.place.module)]
        if here:
            return here[0]
        level = [parent for child in found for parent in child.parents]
    return None


def _birth(incident: Incident) -> Link:
    return _link(incident.record, "saturation", incident.finding.cause, incident.finding.text)


def _link(record: OpRecord, stage: str, cause: str, detail: str) -> Link:
    place = record.place
    return Link(place.step, place.phase, record.op, place.module, stage, cause, detail)

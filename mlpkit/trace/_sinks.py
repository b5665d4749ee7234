"""Which incidents matter: those that reach a loss, parameter, optimizer state, buffer, gradient or returned value."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any
from weakref import ReferenceType, ref

import torch

from mlpkit.trace._chain import links
from mlpkit.trace._history import History
from mlpkit.trace._intercept import is_plain
from mlpkit.trace._ledger import Cell, Ledger
from mlpkit.trace._numbers import limit
from mlpkit.trace._records import Incident, Link, OpRecord, Place, Sink
from mlpkit.trace._scan import scan

# What can put a bad value into a tensor that the program then knows by name.
_COPIES = frozenset({"copy_", "clone", "_to_copy", "index_put_", "_index_put_impl_", "fill_", "masked_fill_", "full"})
_WRITERS = _COPIES | {"input", "scalar_tensor", "full_like", "masked_fill"}
_MOST_SINKS = 64
_FEW = 256


class Sinks:
    """All incidents of a run, and where each of them arrived."""

    def __init__(self, ledger: Ledger, history: History) -> None:
        self.incidents: list[Incident] = []
        self._ledger = ledger
        self._history = history
        self._trained = False
        self._escaped: list[tuple[OpRecord, Place]] = []
        self._gradients: list[tuple[ReferenceType[torch.Tensor], OpRecord, str]] = []
        self._tidy_at = _FEW

    def add(self, incident: Incident) -> None:
        """Keep an incident."""
        if incident.listed:
            return
        incident.listed = True
        self.incidents.append(incident)
        if len(self.incidents) > self._tidy_at:
            self.step_ended(-1)
            self._tidy_at = 2 * len(self.incidents) + _FEW

    def reach(self, record: OpRecord, kind: str, name: str, place: Place) -> None:
        """A bad value arrived where it matters."""
        incident = record.incident
        if incident is None or incident.intended:
            return
        if not incident.sinks:
            incident.links = links(record, incident)
            self.add(incident)
        if kind in ("parameter", "optimizer state"):
            incident.calibration = False  # no scaler held it back
        known = any((sink.kind, sink.name) == (kind, name) for sink in incident.sinks)
        if not known and len(incident.sinks) < _MOST_SINKS:
            incident.sinks.append(Sink(kind, name, place, record.op))

    def known(self, tensor: torch.Tensor) -> None:
        """A tensor got its name: a bad value that was merely copied into it is the tensor's own."""
        cell = self._bad_cell(tensor)
        if cell is None or cell.record is None or cell.record.incident is None:
            return
        incident, name = cell.record.incident, cell.name
        born = incident.record
        if born.op not in _WRITERS or not _only_copied(cell.record, incident) or born.subject == name:
            return
        if incident.finding.cause not in ("external", "hyperparameter"):
            return  # a copy that went wrong itself
        if incident.intended and cell.kind == "buffer":
            return  # a mask
        born.op, born.subject = "param", name
        born.place = born.place._replace(phase="source", module=name.rpartition(".")[0])
        incident.finding.cause, incident.intended = "external", False
        incident.finding.text = f"`{name}` was given {incident.finding.value}"
        self.add(incident)

    def reach_if_bad(self, tensor: torch.Tensor, kind: str, name: str = "") -> None:
        """As ``reach``, for a tensor that may be bad."""
        cell = self._bad_cell(tensor)
        if cell is not None and cell.record is not None:
            self.reach(cell.record, kind, name or cell.name, cell.record.place)

    def trained(self, step: int, loss: float) -> None:
        """A backward pass begins at a loss that is fine."""
        self._trained = True
        self._history.loss(step, loss)

    def backward_from(self, roots: Sequence[torch.Tensor], step: int) -> None:
        """A backward pass begins at these tensors: the loss."""
        self._trained = True
        for root in roots:
            if not is_plain(root) or torch._C._functorch.is_functorch_wrapped_tensor(root):
                continue  # inside torch.func a loss is a wrapper without a value of its own
            if root.numel() == 1:
                self._history.loss(step, self._unscaled_loss(root))
            cell = self._bad_cell(root)
            if cell is None or cell.record is None or cell.record.incident is None:
                continue
            record, incident = cell.record, cell.record.incident
            if incident.record is record and record.place.phase == "optimizer":
                continue  # the loss is finite, only its scaled copy is not
            if incident.intended:
                _blame_constant(record, incident)
            self.reach(record, "loss", "", record.place)

    def _unscaled_loss(self, root: torch.Tensor) -> float:
        """The magnitude of a loss before a loss scale multiplied it."""
        cell = self._ledger.find(root)
        record = cell.record if cell is not None else None
        value = abs(float(root.detach()))
        while record is not None and record.place.phase == "optimizer":
            value = value if record.multiplied is None else record.multiplied
            record = record.parents[0] if record.parents else None
        return value

    def backward_done(self, bad: bool) -> None:
        """A backward pass is over: remember the bad gradients it left, in case nobody clears or applies them.

        bad: whether anything that is known holds NaN or Inf.
        """
        self._gradients = []
        if not bad:
            return
        for parameter in self._ledger.leaves():
            cell = self._bad_cell(parameter.grad) if parameter.grad is not None else None
            if cell is not None and cell.record is not None:
                owner = self._ledger.find(parameter)
                self._gradients.append((ref(parameter), cell.record, owner.name if owner else ""))

    def escaped(self, records: Iterable[OpRecord], place: Place) -> None:
        """A value left for Python, by ``.item()`` or the like; it counts if the program never trains."""
        if len(self._escaped) < _FEW:
            self._escaped.extend((record, place) for record in records)

    def unscaled(self, incidents: Iterable[Incident], scale: float) -> None:
        """A gradient scaler looked at gradients that hold these."""
        for incident in incidents:
            incident.scale = scale
            incident.calibration = _is_calibration(incident)

    def skipped(self, event: dict[str, Any], step: int) -> None:
        """A guarded step was skipped as a whole."""
        for incident in list(self.incidents):
            if incident.record.place.step != step or incident.intended:
                continue
            if not incident.sinks:
                self.unscaled([incident], float(event.get("scale") or 1.0))
                if incident.calibration:
                    continue
                self.reach(incident.record, "gradient", str(event.get("culprit") or ""), incident.record.place)
            incident.skipped = True
            incident.saved = int(event.get("parameters") or self._ledger.parameters())

    def step_ended(self, step: int) -> None:
        """Of what came to nothing at one place in the program, step after step, keep the first with a count."""
        first: dict[tuple[str, str, str, str], Incident] = {}
        kept = []
        for incident in self.incidents:
            record = incident.record
            site = (record.op, record.place.module, record.place.location, incident.finding.cause)
            other = first.setdefault(site, incident)
            if other is incident or incident.live or record.place.step == step:
                kept.append(incident)
            else:
                other.repeats += incident.repeats
                incident.listed = False
        self.incidents = kept

    def finish(self, scaling: bool) -> None:
        """The program is over: what it still holds counts too. scaling: a gradient scaler was seen."""
        self.step_ended(-1)
        self._promote()
        for weak, record, name in self._gradients:
            parameter = weak()
            gradient = None if parameter is None else parameter.grad
            # With its owner gone, nobody can tell whether a gradient was cleared; a scaler clears those it found bad.
            left = not scaling if parameter is None else gradient is not None and self._bad_cell(gradient) is not None
            if left and record.incident is not None and not record.incident.calibration:
                self.reach(record, "gradient", name, record.place)
        if self._trained:
            return
        for record, place in self._escaped:
            self.reach(record, "returned value", record.op, place)
        for record in self._ledger.bad_records():
            if not record.consumed:
                self.reach(record, "returned value", "", record.place)

    def _promote(self) -> None:
        """A run that blew up did so at its first overflow, even if a later operation hid that one."""
        for root in ("hyperparameter", "explosion"):
            same = [
                one for one in self.incidents if one.root_cause == root and not one.intended and not one.calibration
            ]
            same.sort(key=lambda one: one.record.index)
            live = next((one for one in same if one.live), None)
            if live is not None and same[0] is not live:
                first = same[0]
                first.sinks, first.history = live.sinks, first.history or live.history
                grown = [link for link in live.links if link.stage == "explosion"]
                first.links = [*grown, _birth_of(first), *[link for link in live.links if link not in grown]]

    def _bad_cell(self, tensor: torch.Tensor) -> Cell | None:
        cell = self._ledger.find(tensor)
        return cell if cell is not None and cell.bad and scan(tensor).bad else None


def _birth_of(incident: Incident) -> Link:
    record, finding = incident.record, incident.finding
    place = record.place
    return Link(place.step, place.phase, record.op, place.module, "saturation", finding.cause, finding.text)


def _only_copied(record: OpRecord, incident: Incident) -> bool:
    """From its birth to this record the value went through copies alone."""
    while record is not incident.record:
        if record.op not in _COPIES:
            return False
        if record.bad_parent is None:
            return True  # older than the tracer remembers
        record = record.bad_parent
    return True


def _blame_constant(record: OpRecord, incident: Incident) -> None:
    """A constant that was meant to be infinite was picked by the loss after all."""
    incident.intended = False
    incident.finding.text = "an infinite constant was picked by the loss"
    origin: OpRecord | None = record
    while origin is not None and origin.op != "_log_softmax":
        origin = origin.bad_parent
    incident.finding.cause = "log_of_zero" if origin is not None else "domain"


def _is_calibration(incident: Incident) -> bool:
    """The scaled gradient overflowed; the gradient itself would not have."""
    if incident.scale is None or incident.scale <= 1.0 or incident.record.place.phase not in ("backward", "optimizer"):
        return False
    if incident.finding.cause not in ("overflow", "cast_overflow"):
        return False
    exact = incident.finding.exact
    return exact is None or math.isinf(incident.scale) or abs(exact) / incident.scale <= limit(incident.record.dtype)

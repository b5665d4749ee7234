"""Follows NaN and Inf from operation to operation: who made them, what they became, and whether they matter.

One record per operation. An *incident* begins where a result holds NaN or Inf and no input did; results that inherit it
belong to it; it counts once it reaches a loss, a parameter, optimizer state, a buffer or a returned value (a *sink*).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import torch

from mlpkit.trace import _cause, _roots, _shadow
from mlpkit.trace._history import History
from mlpkit.trace._intercept import OpCall
from mlpkit.trace._ledger import Ledger
from mlpkit.trace._records import Finding, Incident, OpRecord, Place, Scan
from mlpkit.trace._scan import scan, scan_all
from mlpkit.trace._silent import Silence
from mlpkit.trace._sinks import Sinks
from mlpkit.trace._where import Surroundings

_FILLS = frozenset({"fill_", "full", "full_like", "new_full", "scalar_tensor", "masked_fill", "masked_fill_"})
_FILLS |= {"constant_pad_nd", "where", "index_fill", "index_fill_"}
_UNSCALE = "_amp_foreach_non_finite_check_and_unscale_"
_MOST_RECORDS = 50_000  # a program without steps must not grow


class _Bad:
    """A non-finite input of the operation at hand."""

    __slots__ = ("incident", "record", "scan")

    def __init__(self, record: OpRecord, found: Scan) -> None:
        self.record, self.scan = record, found
        self.incident = record.incident


class Observer:
    """The sink of interception."""

    def __init__(self, where: Surroundings) -> None:
        self.where = where
        self.ledger = Ledger()
        self.history = History()
        self.sinks = Sinks(self.ledger, self.history)
        self.silence = Silence(self.ledger, self.history, self.sinks)
        self.operations = 0
        self._roots = _roots.Roots()
        self._records: deque[OpRecord] = deque()
        self._step_began = 0
        self._place: Place | None = None
        self._parents: tuple[OpRecord, ...] = ()
        self._bad: list[_Bad] = []

    # Before an operation: where it runs, which of its inputs are already bad.

    def before(self, call: OpCall) -> None:
        """Look at the inputs while they still hold their values."""
        records, bad = [], []
        unseen = []
        for tensor in call.reads:
            cell = self.ledger.find(tensor)
            if cell is None or cell.record is None:
                unseen.append(tensor)
            else:
                cell.record.consumed = True
                records.append(cell.record)
        self._place = self.where.place(call, (*records, *self._strangers(call, unseen)))
        for tensor in call.reads:
            cell = self.ledger.cell(tensor)
            if not cell.kind and self._place.phase != "backward" and _is_leaf(tensor):
                self.ledger.name(tensor, "parameter", "")
            if cell.record is None:
                self._meet(call, tensor, self._place)
            if cell.bad and cell.record is not None:
                found = scan(tensor)
                if found.bad:
                    bad.append(_Bad(cell.record, found))
        self._bad = bad
        self._parents = tuple({id(r): r for r in (self.ledger.cell(t).record for t in call.reads) if r}.values())

    def _strangers(self, call: OpCall, tensors: Sequence[torch.Tensor]) -> list[OpRecord]:
        """Stand-ins for inputs not met yet, so that their conversion is recognised as such."""
        nowhere = Place(self.where.step, "source", "", "", 0, "")
        return [OpRecord(-1, "input", "", nowhere) for tensor in tensors if self.ledger.find(tensor) is None]

    def _meet(self, call: OpCall, tensor: torch.Tensor, place: Place) -> None:
        """First sight of memory that no observed operation wrote."""
        cell = self.ledger.cell(tensor)
        if any(tensor is written for written in call.mutated) and not call.traits.keeps_old:
            return  # about to be overwritten: what it holds is of no interest
        found = scan(tensor)
        fresh = cell.bad
        known = bool(cell.kind)
        op = "empty" if fresh else "param" if known else "input"
        module = cell.name.rpartition(".")[0] if known else ""
        origin = Place(place.step, "source", module, place.file, place.line, "")
        record = self._record(op, tensor, origin, (), found)
        record.subject = cell.name
        cell.record, cell.bad = record, found.bad
        if cell.kind == "parameter":
            self.history.start(cell.name, found.absmax)
        if found.bad:
            self._external(tensor, record, found)

    def _external(self, tensor: torch.Tensor, record: OpRecord, found: Scan) -> None:
        index = _cause.first_bad(tensor, nan=found.nan > 0)
        value = float(tensor.detach()[tuple(index)])
        what = f"`{record.subject}` " if record.subject else ""
        text = f"{what}held {found.nan} NaN and {found.posinf + found.neginf} Inf of {tensor.numel()} elements"
        finding = Finding("external", _word(found), text, index, {"value": value}, shape=list(tensor.shape))
        # An additive mask (zeros and -Inf) is meant to be infinite.
        intended = not found.nan and not found.posinf and found.absmax == 0
        record.incident = Incident(record, finding, intended=intended)
        record.finding = finding
        if not intended:
            self.sinks.add(record.incident)

    def viewed(self) -> None:
        """Views hold nothing new, but backward operations are mapped to them."""
        self.where.note_view()

    # After an operation: what it wrote.

    def after(self, call: OpCall) -> None:
        """Record what an operation wrote and judge it."""
        place = self._place
        if place is None:
            return
        if call.traits.kind == "allocate":
            for tensor in call.outputs:
                self.ledger.allocated(tensor)
            return
        self.operations += 1
        written = [*call.outputs, *call.mutated]
        if not written:
            if call.name == "_local_scalar_dense":
                self.sinks.escaped([bad.record for bad in self._bad], place)
            return
        scans = scan_all(written)
        record = self._record(call.name, written[0], place, self._parents, *scans)
        if place.phase == "optimizer" and call.name == "mul":
            record.multiplied = _number(call.args[0])
        if any(found.bad for found in scans):
            self._judge(call, record, written, scans)
        else:
            self._roots.look(call, record, written, scans)
        self.history.operation(record)
        for tensor, found in zip(written, scans):
            self._write(call, tensor, record, found)
        if call.name == _UNSCALE:
            self._unscaled(float(call.args[2]))
        elif call.name == "_amp_update_scale_":
            self.where.ended = True  # the scaler ends a step even where it skipped the optimizer's

    def _record(
        self, op: str, tensor: torch.Tensor, place: Place, parents: tuple[OpRecord, ...], *scans: Scan
    ) -> OpRecord:
        record = OpRecord(self.operations, op, str(tensor.dtype).removeprefix("torch."), place, parents)
        record.zero = sum(found.zero for found in scans)
        record.absmax = max(found.absmax for found in scans)
        record.nothing = scans[0].zero > 0 and scans[0].absmax == 0 and not scans[0].bad
        record.derived = op == "param" or (op not in ("input", "empty") and _is_derived(place, parents))
        record.value = next((_word(found) for found in scans if found.bad), "")
        self._records.append(record)
        if len(self._records) > _MOST_RECORDS:
            self._records.popleft().forget()
        return record

    def _judge(self, call: OpCall, record: OpRecord, written: list[torch.Tensor], scans: list[Scan]) -> None:
        """Birth, change (Inf to NaN) or mere passing on of a bad value."""
        if not self._bad:
            self._meet_again(call)
        real = [bad for bad in self._bad if bad.incident and not bad.incident.intended]
        meant = [bad for bad in self._bad if bad.incident and bad.incident.intended]
        nan_in = any(bad.scan.nan for bad in self._bad)
        nan_out = any(found.nan for found in scans)
        if self._bad:
            source = min(real or meant or self._bad, key=lambda bad: bad.record.index)
            record.bad_parent, record.incident = source.record, source.incident
        born_inf = (
            not real and not nan_out and any(s.posinf for s in scans) and not any(b.scan.posinf for b in self._bad)
        )
        if self._bad and not (nan_out and not nan_in) and not born_inf:
            return
        first = next(i for i, s in enumerate(scans) if (s.nan if nan_out and self._bad else s.bad))
        which = first - len(call.outputs) if first >= len(call.outputs) else first
        finding = _cause.explain(call, written[first], which, first, nan=nan_out and bool(self._bad))
        if self._is_constant(call, finding) and not nan_out:
            record.incident = Incident(record, finding, intended=True)
            return
        if born_inf and self._bad and not _finite_operands(finding):
            return
        record.finding = finding
        if not real:
            finding.capture = self._roots.captures.take(call)
            self._begin(record, finding, self._step_size(call, which))

    def _meet_again(self, call: OpCall) -> None:
        """Inputs that went bad since they were last written: by NumPy, another library or another thread."""
        for tensor in call.reads:
            if not call.traits.keeps_old and any(tensor is written for written in call.mutated):
                continue
            found = scan(call.before(tensor))
            if found.bad and self._place is not None:
                cell = self.ledger.cell(tensor)
                op, module = ("param", cell.name.rpartition(".")[0]) if cell.kind else ("input", "")
                origin = Place(self._place.step, "source", module, self._place.file, self._place.line, "")
                record = self._record(op, tensor, origin, (), found)
                record.subject = cell.name
                cell.record, cell.bad = record, True
                self._external(call.before(tensor), record, found)
                self._bad.append(_Bad(record, found))

    def _step_size(self, call: OpCall, which: int) -> float:
        """The largest number passed to an operation that updates a parameter, such as the learning rate; else 0."""
        if self._place is None or self._place.phase != "optimizer":
            return 0.0
        cells = [self.ledger.find(tensor) for tensor in call.mutated]
        updates = any(cell is not None and cell.kind == "parameter" for cell in cells)
        return max((abs(value) for value in _shadow.scalars(call, which)), default=0.0) if updates else 0.0

    def _begin(self, record: OpRecord, finding: Finding, step_size: float) -> None:
        incident = Incident(record, finding, history=self.history.of(record))
        previous = record.bad_parent
        if previous is not None and previous.incident is not None and previous.incident.intended:
            incident.root_text = f"the Inf was put there by {previous.incident.record.op}"
        record.incident = incident
        _roots.find(incident, self.history, step_size)
        self.sinks.add(incident)

    def _is_constant(self, call: OpCall, finding: Finding) -> bool:
        if self._place is not None and self._place.phase == "optimizer":
            return False
        return finding.cause == "hyperparameter" or (call.name in _FILLS and not self._bad)

    def _write(self, call: OpCall, tensor: torch.Tensor, record: OpRecord, found: Scan) -> None:
        cell = self.ledger.wrote(tensor, record, found.bad)
        if not cell.kind:
            return
        record.subject = record.subject or cell.name or cell.kind
        if cell.kind == "parameter" and record.place.phase == "optimizer":
            self.where.ended = True
            if id(tensor) in call.old and not self.history.knows(cell.name):
                self.history.start(cell.name, scan(call.old[id(tensor)]).absmax)
            self.history.parameter(cell.name, record, found.absmax)
            if not self.where.in_optimizer and id(tensor) in call.old:
                self.silence.wrote(call, tensor, record)
        if found.bad:
            self.sinks.reach(record, cell.kind, cell.name, record.place)

    def _unscaled(self, inverse: float) -> None:
        incidents = [bad.incident for bad in self._bad if bad.incident is not None]
        self.sinks.unscaled(incidents, 1.0 / inverse if inverse else math.inf)

    def backward_done(self) -> None:
        """A backward pass is over."""
        self.sinks.backward_done()
        self.silence.gradients(self.where.step)

    def retire(self) -> None:
        """A step ended: records older than the previous step let go of each other."""
        self.sinks.step_ended(self.where.step)
        while self._records and self._records[0].index < self._step_began:
            self._records.popleft().forget()
        self._step_began = self.operations


def _is_leaf(tensor: torch.Tensor) -> bool:
    """What a program trains; views made without a graph look like leaves too."""
    return isinstance(tensor, torch.nn.Parameter) or (tensor.requires_grad and tensor.is_leaf and not tensor._is_view())


def _is_derived(place: Place, parents: tuple[OpRecord, ...]) -> bool:
    return bool(place.module) or place.phase not in ("forward", "source") or any(parent.derived for parent in parents)


def _finite_operands(finding: Finding) -> bool:
    return all(abs(value) != float("inf") for value in finding.operands.values()) and bool(finding.operands)


def _word(found: Scan) -> str:
    return "NaN" if found.nan else "Inf" if found.posinf else "-Inf" if found.neginf else ""


def _number(value: object) -> float | None:
    """The magnitude of a tensor that holds a single number, such as a loss."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        return None
    return abs(float(value.detach()))

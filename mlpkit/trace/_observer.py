"""Follows NaN and Inf from operation to operation: who made them, what they became, and whether they matter.

The native observer keeps one record per operation and calls here only where something is bad, may have been rounded to
zero, or is new to it. An *incident* begins where a result holds NaN or Inf and no input did; results that inherit it
belong to it; it counts once it reaches a loss, a parameter, optimizer state, a buffer or a returned value (a *sink*).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any
from weakref import proxy

import torch

from mlpkit import _C
from mlpkit.trace import _cause, _intercept, _roots, _shadow
from mlpkit.trace._intercept import OpCall, Traits
from mlpkit.trace._ledger import Ledger
from mlpkit.trace._recall import Recalled, Remembered
from mlpkit.trace._records import Finding, Incident, OpRecord, Place, Scan
from mlpkit.trace._silent import Silence
from mlpkit.trace._sinks import Sinks
from mlpkit.trace._where import Names, in_guard, kind_of_file, short

_FILLS = frozenset({"fill_", "full", "full_like", "new_full", "scalar_tensor", "masked_fill", "masked_fill_"})
_FILLS |= {"constant_pad_nd", "where", "index_fill", "index_fill_"}
_MOST_RECORDS = 50_000  # a program without steps must not grow

# As csrc/ops/observed.h numbers them.
_PHASES = ("forward", "backward", "optimizer", "source")
_KINDS = ("compute", "view", "allocate", "skip")
_ZEROS = ("none", "more", "any", "tiny")
_REACHES = ("unknown", "own", "sum", "product", "quotient", "lerp", "addcmul", "addcdiv", "adam", "sgd")
_UNKNOWN: dict[str, Any] = {
    "function": None,
    "traits": None,
    "name": "",
    "kind": 3,
    "keeps_old": False,
    "zeros": 0,
    "reach": 0,
    "rounds_ones": False,
    "scales": False,
    "writes": [],
}


class _Bad:
    """A non-finite input of the operation at hand."""

    __slots__ = ("incident", "record", "scan")

    def __init__(self, record: OpRecord, found: Scan) -> None:
        self.record, self.scan = record, found
        self.incident = record.incident


class Observer:
    """What the native observer calls, and all that was found."""

    def __init__(self) -> None:
        # The native observer lives no longer than this one, and must not keep it alive.
        me = proxy(self)
        self.native = _C.Observer(me, kind_of_file, _MOST_RECORDS)
        self.names = Names(self.native)
        self.ledger = Ledger(self.native)
        self.history = Remembered(self.native, self._place, self.names.name)
        self.sinks = Sinks(self.ledger, self.history)
        self.silence = Silence(self.ledger, self.history, self.sinks)
        self._roots = _roots.Roots()
        self._recall: Callable[[Any], OpRecord] = lambda record: me.native.twin(record)
        self._files: dict[str, str] = {}
        self._place_now: Place | None = None
        self._bad: list[_Bad] = []
        self.on_root: Callable[[torch.nn.Module], None] = lambda root: None
        self.on_output: Callable[[torch.nn.Module, Any], None] = lambda root, output: None
        self.on_step: Callable[[], None] = lambda: None

    @property
    def operations(self) -> int:
        """Operations seen so far."""
        return int(self.native.operations)

    # What the native observer must know, and how its records look here.

    def learn(self, name: str, overload: str) -> dict[str, Any]:
        """What an operation is; asked once for each."""
        func = _intercept.find(name, overload)
        if func is None:
            return _UNKNOWN
        traits, positions = _intercept.describe(func)
        return {
            "function": func,
            "traits": traits,
            "name": traits.name,
            "kind": _KINDS.index(traits.kind),
            "keeps_old": traits.keeps_old,
            "zeros": _ZEROS.index(_zeros(traits.name)),
            "reach": _REACHES.index(_intercept.reach(traits.name)),
            "rounds_ones": _shadow.base_name(traits.name) in _roots.ROUNDED,
            "scales": _shadow.base_name(traits.name) in ("mul", "div"),
            "writes": positions,
        }

    def recall(self, native: Any) -> OpRecord:
        """A record as the diagnosing half reads it."""
        return Recalled(native, self._place(native.place), self._recall)

    def _place(self, place: tuple[int, str, int, int, int]) -> Place:
        step, phase, module, number, node = place
        file, line = self.native.line(number)
        if file not in self._files:
            self._files[file] = short(file) if file else ""
        return Place(step, phase, self.names.name(module), self._files[file], line, self.native.node(node))

    def number_of(self, module: str) -> int:
        """The number of a module's name."""
        return self.names.number(module)

    def call(
        self,
        func: Any,
        traits: Traits,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        reads: list[torch.Tensor],
        mutated: list[torch.Tensor],
        builds_graph: bool,
        outputs: list[torch.Tensor],
        old: list[torch.Tensor],
    ) -> OpCall:
        """An operation and all that it read and wrote."""
        before = {id(tensor): value for tensor, value in zip(mutated, old)}
        return OpCall(func, traits, args, kwargs, reads, mutated, builds_graph, outputs, before)

    # What the program does.

    def stepped(self) -> None:
        """A step ended."""
        self.sinks.step_ended(self.native.step)
        self.on_step()

    def unknown_leaf(self, tensor: torch.Tensor) -> None:
        """Something that the program trains, of no module that is known yet."""
        self.ledger.name(tensor, "parameter", "")

    def trained(self, loss: float) -> None:
        """A backward pass begins at a loss that is fine."""
        self.sinks.trained(self.native.step, loss)

    def backward_from(self, roots: Sequence[torch.Tensor]) -> None:
        """A backward pass begins at what may be bad, or is more than one number."""
        self.sinks.backward_from(roots, self.native.step)

    def backward_done(self, bad: bool, zeros: bool) -> None:
        """A backward pass is over. bad, zeros: what the program holds now, and a gradient of it."""
        self.sinks.backward_done(bad)
        self.silence.gradients(self.native.step, zeros)

    # What is wrong.

    def external(self, record: OpRecord, tensor: torch.Tensor, seen: tuple[Any, ...]) -> None:
        """Memory that no observed operation wrote holds NaN or Inf."""
        found = Scan(*seen)
        index = _cause.first_bad(tensor, nan=found.nan > 0)
        value = float(tensor.detach()[tuple(index)])
        what = f"`{record.subject}` " if record.subject else ""
        text = f"{what}held {found.nan} NaN and {found.posinf + found.neginf} Inf of {tensor.numel()} elements"
        finding = Finding("external", _word(found), text, index, {"value": value}, shape=list(tensor.shape))
        # An additive mask (zeros and -Inf) is meant to be infinite.
        intended = not found.nan and not found.posinf and found.absmax == 0
        # What the guard's native update found out, such as the norm of the gradients, is no value of the program's.
        intended = intended or (record.op == "empty" and in_guard())
        record.incident = Incident(record, finding, intended=intended)
        record.finding = finding
        if not intended:
            self.sinks.add(record.incident)

    def judge(self, record: OpRecord, call: OpCall, seen: list[Any], bad: list[Any]) -> None:
        """An operation wrote NaN or Inf."""
        self._place_now = record.place
        self._bad = [_Bad(source, Scan(*found)) for source, found in bad]
        self._judge(call, record, [*call.outputs, *call.mutated], [Scan(*found) for found in seen])

    def rounded(self, record: OpRecord, call: OpCall, seen: list[Any], bad: list[Any]) -> None:
        """An operation wrote zeros that may have been rounded."""
        self._roots.look(call, record, [*call.outputs, *call.mutated], [Scan(*found) for found in seen])

    def unmoved(self, record: OpRecord, call: OpCall, tensor: torch.Tensor) -> None:
        """A parameter was updated by hand, to what it was before."""
        self.silence.wrote(tensor, record)

    def reached(self, record: OpRecord, kind: str, name: str) -> None:
        """A bad value was written where it matters."""
        self.sinks.reach(record, kind, name, record.place)

    def escaped(self, records: Sequence[OpRecord], step: int, phase: int, module: int, line: int) -> None:
        """A bad value left for Python."""
        self.sinks.escaped(records, self._place((step, _PHASES[phase], module, line, 0)))

    def unscaled(self, records: Sequence[OpRecord], inverse: float) -> None:
        """A gradient scaler met bad gradients."""
        incidents = [record.incident for record in records if record.incident is not None]
        self.sinks.unscaled(incidents, 1.0 / inverse if inverse else math.inf)

    def _judge(self, call: OpCall, record: OpRecord, written: list[torch.Tensor], scans: list[Scan]) -> None:
        """Birth, change (Inf to NaN) or mere passing on of a bad value."""
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

    def _step_size(self, call: OpCall, which: int) -> float:
        """The largest number passed to an operation that updates a parameter, such as the learning rate; else 0."""
        if self._place_now is None or self._place_now.phase != "optimizer":
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
        if self._place_now is not None and self._place_now.phase == "optimizer":
            return False
        return finding.cause == "hyperparameter" or (call.name in _FILLS and not self._bad)


def _zeros(name: str) -> str:
    """Which zeros in an operation's results may have been rounded."""
    base = _shadow.base_name(name)
    if name in ("_to_copy", "copy_") or base in _roots.PRODUCTS:
        return "more"
    if base in _roots.EXPONENTIALS:
        return "any"
    return "tiny" if base in _roots.BOUNDS else "none"


def _finite_operands(finding: Finding) -> bool:
    return all(abs(value) != float("inf") for value in finding.operands.values()) and bool(finding.operands)


def _word(found: Scan) -> str:
    return "NaN" if found.nan else "Inf" if found.posinf else "-Inf" if found.neginf else ""

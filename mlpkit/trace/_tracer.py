"""``Tracer``: the context manager that users see."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any
from weakref import proxy

import torch

from mlpkit import _events
from mlpkit.errors import ArgumentError
from mlpkit.report import write_whole
from mlpkit.trace._allowed import is_allowed
from mlpkit.trace._capture import Capture, bundle
from mlpkit.trace._diagnosis import Diagnosis, diagnose, healthy
from mlpkit.trace._intercept import tensors_in
from mlpkit.trace._log import write_events, write_lines
from mlpkit.trace._observer import Observer
from mlpkit.trace._watching import Watching
from mlpkit.trace._where import Quiet, Surroundings

_LEVELS = ("observe", "watch")


class Tracer:
    """Watches training code and explains the first NaN or Inf that matters.

    Usage::

        with mlpkit.trace.Tracer() as tracer:
            train()
        print(tracer.diagnosis)

    model: names modules as its ``named_modules()`` does; without it the first module called from outside is taken as
    root. level: ``"observe"``, every operation; ``"watch"``, module outputs, gradients, parameters and buffers once a
    step, and the operations of a step only once it went wrong. Tracing changes no loss, gradient, parameter or random
    number.
    """

    def __init__(self, model: torch.nn.Module | None = None, level: str = "observe") -> None:
        if level not in _LEVELS:
            raise ArgumentError(f"Tracer: level is {level!r}, must be one of {', '.join(_LEVELS)}")
        if model is not None and not isinstance(model, torch.nn.Module):
            raise ArgumentError(f"Tracer: model is a {type(model).__name__}, must be a torch.nn.Module or None")
        self._observer = Observer()
        self._native = self._observer.native
        self._where = where = Surroundings(self._native)
        self._entered = False
        self._unsubscribe: Any = None
        self.raised: str | None = None  # the exception that ended the block, by name
        self._stepped = False
        self._verified: Diagnosis | None = None
        # The observer lives as long as its hooks; none of them may keep the tracer alive.
        me = proxy(self)
        self._observer.on_root = lambda root: me._know_module(root)
        self._observer.on_output = lambda root, output: me._check_output(root, output)
        where.on_optimizer = self._know_optimizer
        if model is not None:
            self._know_module(model)
        self._watching = Watching(model, self._observe) if level == "watch" else None
        self.stopped = False  # whether ``stop_at_first`` ended the program

    def stop_at_first(self, stop: Callable[[], None]) -> None:
        """Call ``stop`` once, at the end of the first step with a failure; for a runner, before it enters."""
        me = proxy(self)

        def look() -> None:
            if not me.stopped and me._found_any and me.diagnosis.verdict == "failure":
                me.stopped = True
                stop()

        (self._observer if self._watching is None else self._watching).on_step = look

    @property
    def _found_any(self) -> bool:
        return bool(self._observer.sinks.incidents if self._watching is None else self._watching.diagnoses())

    def __enter__(self) -> Tracer:
        if self._entered:
            raise ArgumentError("Tracer: already entered; make a new Tracer for another run")
        if self._watching is None and not self._native.start():
            raise ArgumentError("Tracer: eight tracers are at work already, inside each other")
        self._entered = True
        try:
            self._open()
        except BaseException:  # an interrupt must not leave half of the hooks behind
            self._close()
            raise
        return self

    def start(self) -> Tracer:
        """Enter, for a notebook: from here on every cell is traced, until ``stop()``."""
        return self.__enter__()

    def stop(self) -> Diagnosis:
        """Leave what ``start()`` entered; returns the diagnosis."""
        self.__exit__(None, None, None)
        return self.diagnosis

    def _open(self) -> None:
        if self._watching is not None:
            self._watching.open()
            return
        self._unsubscribe = _events.subscribe(self._hear)
        self._where.open()

    def _close(self) -> None:
        if self._watching is not None:
            self._watching.close()
            return
        self._native.stop()
        self._where.close()
        if self._unsubscribe is not None:
            self._unsubscribe()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A SystemExit is an ending that a program chose.
        self.raised = kind.__name__ if kind is not None and not issubclass(kind, SystemExit) else None
        self._close()
        if self._watching is not None:
            return
        with torch.no_grad():
            self._observer.silence.finish()
            self._observer.sinks.finish(self._native.scaling)

    def next_step(self) -> None:
        """Begin a step; the first call opens step 0, and from then on optimizer steps no longer count."""
        if self._watching is not None:
            self._watching.counting = False
            if self._stepped:
                self._watching.next_step()
        self._native.counting = False
        if self._stepped:
            self._native.next_step()
            with Quiet(self._native):
                self._observer.stepped()
        self._stepped = True

    @property
    def steps(self) -> int:
        """Steps seen so far."""
        return self._where.step + 1 if self._watching is None else self._watching.steps

    @property
    def operations(self) -> int:
        """Operations seen so far."""
        return self._observer.operations

    def _repr_html_(self) -> str:
        return self.diagnosis._repr_html_()

    @property
    def diagnosis(self) -> Diagnosis:
        """The first failure, else the first warning, else the healthy verdict."""
        if self._verified is not None:
            return self._verified
        found = self.diagnoses
        for verdict in ("failure", "warning"):
            first = next((one for one in found if one.verdict == verdict), None)
            if first is not None:
                return first
        if self._watching is not None:
            return self._watching.healthy(self.raised)
        return healthy(self.steps, self._observer.operations, self.raised)

    @property
    def diagnoses(self) -> list[Diagnosis]:
        """Everything found, in the order in which it began; benign findings included. Empty for a clean run."""
        if self._watching is not None:
            return self._watching.diagnoses()
        incidents = sorted(self._observer.sinks.incidents, key=lambda incident: incident.record.index)
        found = [diagnose(incident) for incident in incidents if not incident.intended]
        unique: dict[tuple[object, ...], Diagnosis] = {}
        for one in found:
            key = (one.verdict, one.step, one.phase, one.op, one.module, one.location, one.node, one.cause)
            unique.setdefault(key, one)
        return list(unique.values())

    def to_dict(self) -> dict[str, Any]:
        """What ``diagnosis.json`` holds: the first diagnosis, all of them, and the environment."""
        return {
            **self.diagnosis.to_dict(),
            "diagnoses": [found.to_dict() for found in self.diagnoses],
            "steps": self.steps,
            "operations": self._observer.operations,
            "raised": self.raised,
            "environment": {"torch": torch.__version__, "threads": torch.get_num_threads()},
        }

    def write_json(self, path: str | os.PathLike[str]) -> Path:
        """Write ``diagnosis.json`` whole or not at all; raises OutputError where it cannot be written."""
        return write_whole(path, json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n")

    def write_jsonl(self, path: str | os.PathLike[str]) -> Path:
        """Write a log: a line of JSON for each step (loss, largest magnitudes) and for each diagnosis."""
        return write_lines(path, self._observer.history, self.diagnoses)

    def write_tensorboard(self, folder: str | os.PathLike[str]) -> Path:
        """Write the same as TensorBoard events; raises MissingExtraError without tensorboard."""
        return write_events(folder, self._observer.history, self.diagnoses)

    def bundle(self, path: str | os.PathLike[str]) -> Path | None:
        """Write the first bad operation with all it was given, for ``mlpkit replay``; at most 50 MB.

        None where there is nothing to run again: no failure, a value that came from outside, a random operation, or
        one of more than 50 MB. Raises MissingExtraError without safetensors.
        """
        capture = self.capture
        if capture is None or not is_allowed(capture.op):
            return None
        return write_whole(path, bundle(capture, self.diagnosis.to_dict()))

    @property
    def capture(self) -> Capture | None:
        """The call that went wrong first, with what it was given; None where none was kept."""
        live = [incident for incident in self._observer.sinks.incidents if incident.live and not incident.intended]
        if not live:
            return None
        first = min(live, key=lambda incident: incident.record.index)
        root = first.root or first.record
        finding = root.underflow if first.root is not None and root.underflow is not None else first.finding
        return finding.capture if finding.capture is not None and finding.capture.tensors else None

    def verify(self, program: Callable[[], Any]) -> Diagnosis:
        """Run ``program``, the traced work again from its start, once with each proposal that can be carried out.

        Returns the diagnosis with ``verified`` filled in: True where the failure is gone by the step it came at.
        """
        from mlpkit.trace._verify import verify

        self._verified = verify(program, self.diagnosis)
        return self._verified

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the report as one HTML page; raises MissingExtraError without the ``report`` extra."""
        from mlpkit.trace._page import page

        history = self._observer.history if self._watching is None else self._watching.watch.history()
        return write_whole(path, page(self, history))

    def _observe(self, step: int, model: torch.nn.Module | None) -> Tracer:
        """A tracer of every operation, for a step that watch found."""
        tracer = Tracer(model)
        tracer._native.step = step
        tracer._native.counting = False
        return tracer

    def _reached(self, tensors: Sequence[torch.Tensor], kind: str) -> None:
        """What a replayed call gave: a bad value in it is one that mattered."""
        with Quiet(self._native):
            for tensor in tensors:
                self._observer.sinks.reach_if_bad(tensor, kind)

    # What the program tells about itself.

    def _know_module(self, root: torch.nn.Module) -> None:
        names, ledger = self._observer.names, self._observer.ledger
        if names.prefix(root) is None:
            names.adopt(root)
        prefix = names.prefix(root)
        parameters, buffers = list(root.named_parameters()), list(root.named_buffers())
        for name, parameter in parameters:
            ledger.name(parameter, "parameter", f"{prefix}{name}")
            self._observer.sinks.known(parameter)
        for name, buffer in buffers:
            ledger.name(buffer, "buffer", f"{prefix}{name}")
            self._observer.sinks.known(buffer)
        self._native.remember(root, [tensor for _, tensor in (*parameters, *buffers)])

    def _know_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """An optimizer that is new, has changed, or left parameters where they were."""
        ledger = self._observer.ledger
        states: Mapping[Any, Any] = optimizer.state
        if not self._native.in_optimizer:
            self._observer.silence.updated(self._where.step)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                ledger.name(parameter, "parameter", "")
        for parameter, state in states.items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    ledger.name(value, "optimizer state", f"{key} of {self._name_of(parameter)}")
                    self._observer.sinks.known(value)
                    self._observer.sinks.reach_if_bad(value, "optimizer state")

    def _name_of(self, tensor: torch.Tensor) -> str:
        cell = self._observer.ledger.find(tensor)
        return cell.name if cell is not None else ""

    def _check_output(self, module: torch.nn.Module, output: Any) -> None:
        """Without a graph nothing follows the output: it is what the program gets."""
        if torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        if next(module.parameters(), None) is not None:
            values = output if isinstance(output, (list, tuple)) else [output]
            for tensor in tensors_in(values):
                self._observer.sinks.reach_if_bad(tensor, "returned value", type(module).__name__)

    # Announcements of the guarded step.

    def _hear(self, event: dict[str, Any]) -> None:
        if event["kind"] == "skip":
            self._tell(event)
        if event["kind"] != "step":
            return
        if event.get("skipped"):
            self._observer.sinks.skipped(event, self._where.step)
        self._native.ended = True

    def _tell(self, event: dict[str, Any]) -> None:
        """Where a step that is being skipped first went wrong, for the guard's record."""
        incidents = self._observer.sinks.incidents
        here = [one for one in incidents if one.record.place.step == self._where.step and not one.intended]
        if here:
            found = diagnose(min(here, key=lambda one: one.record.index))
            event.update(op=found.op, module=found.module, cause=found.cause)

"""What the callbacks share: a tracer around a run, and a guarded scaler in the place of the loop's own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from mlpkit.errors import ArgumentError
from mlpkit.guard import GradScaler, SkipRecord
from mlpkit.trace import Diagnosis, Tracer


class Companion:
    """Goes along with a run that another library drives.

    trace: a level of ``trace.Tracer``, or None. guard: whether the loop's gradient scaler is replaced. out: a folder
    for ``diagnosis.json``, written when the run ends. settings: those of ``guard.GradScaler`` that torch's lacks
    (``on_nonfinite``, ``max_consecutive_skips``, ``history``, ...).
    """

    def __init__(
        self,
        *,
        trace: str | None = "observe",
        guard: bool = True,
        out: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        if trace is not None:
            Tracer(level=trace)  # raises where the level is unknown: here, and not when training begins
        if "model" in settings:
            raise ArgumentError(f"{type(self).__name__}: model is the loop's; leave it out")
        GradScaler("cpu", **settings)
        self._trace, self._guard, self._out, self._settings = trace, guard, out, settings
        self.tracer: Tracer | None = None
        self.scaler: GradScaler | None = None
        self._open = False

    @property
    def diagnosis(self) -> Diagnosis | None:
        """What the tracer found; None without one."""
        return self.tracer.diagnosis if self.tracer is not None else None

    @property
    def records(self) -> list[SkipRecord]:
        """A record for each step that was skipped; empty where nothing is guarded."""
        return self.scaler.records if self.scaler is not None else []

    def close(self, error: BaseException | None = None) -> None:
        """End the trace and write what ``out`` asks for; the callbacks do it, after an error where they are told."""
        if not self._open or self.tracer is None:
            return
        self._open = False
        self.tracer.__exit__(type(error) if error is not None else None, error, None)
        if self._out is not None:
            Path(self._out).mkdir(parents=True, exist_ok=True)
            self.tracer.write_json(Path(self._out) / "diagnosis.json")

    def _begin(self, model: torch.nn.Module) -> None:
        if self._trace is not None and not self._open:
            self.tracer = Tracer(model, level=self._trace)
            self.tracer.__enter__()
            self._open = True

    def _next_step(self) -> None:
        if self._open and self.tracer is not None:
            self.tracer.next_step()

    def _guarded(self, scaler: object, model: torch.nn.Module, why_not: str, kind: type[GradScaler]) -> Any:
        """The scaler to use instead of ``scaler``; None, and a warning, where there is nothing to replace."""
        if isinstance(scaler, GradScaler):
            scaler.protect(model)
            self.scaler = scaler
            return scaler
        if not why_not and not (isinstance(scaler, torch.amp.GradScaler) and type(scaler).__name__ == "GradScaler"):
            why_not = f"the loop's scaler is {type(scaler).__name__}, not torch.amp.GradScaler"
        if why_not:
            warnings.warn(f"{type(self).__name__} guards nothing: {why_not}", UserWarning, stacklevel=4)
            return None
        assert isinstance(scaler, torch.amp.GradScaler)
        self.scaler = kind(scaler._device, scaler.get_scale(), model=model, **self._settings)
        self.scaler.load_state_dict(scaler.state_dict())
        return self.scaler

"""The steps of a ``GradScaler``: by one native call, queued on a device, or with all the means there are."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState

from mlpkit.guard.aftermath import Follower
from mlpkit.guard.attempt import MAY_OVERFLOW, Attempt, Verdict, fused_update
from mlpkit.guard.census import Readings
from mlpkit.guard.checks import check_settings
from mlpkit.guard.culprit import names_or_places
from mlpkit.guard.gate import Gate
from mlpkit.guard.history import History
from mlpkit.guard.ranks import Ranks
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.scaled_losses import ScaledLosses
from mlpkit.guard.scaled_optimizer import ScaledOptimizer
from mlpkit.guard.scaler_queue import ScalerQueue, why_not
from mlpkit.guard.scaler_record import Skip, refuse_bad_state
from mlpkit.guard.state import parameters_of

_OWNER = "GradScaler"


class ScalerSteps(torch.amp.GradScaler):
    """What ``GradScaler`` sets up, and does when ``step`` and ``unscale_`` are called."""

    history: History | None
    steps: int
    _floor: float
    _follower: Follower
    _gate: Gate | None
    _ranks: Ranks | None
    _names: dict[int, str]
    _losses: ScaledLosses
    _optimizers: weakref.WeakKeyDictionary[Any, ScaledOptimizer]
    _unscaled: weakref.ref[Any] | None  # the optimizer that was unscaled last
    _records: list[SkipRecord]
    _iteration: list[SkipRecord]
    _backs_off: bool  # a skip of this iteration asks for a lower scale
    _hold: Tensor | None  # on a device: whether the scale must stay, after a step that was queued
    _norm: Tensor | float | None

    def _taken_quickly(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step was good, and has been taken by one native call; if not, only gradients were unscaled."""
        kept, alone = self._optimizers.get(optimizer), self._ranks is None or self._ranks.alone
        if kept is None or kept.fused is None or not alone or not self._on_cpu or self._scale is None:
            return False
        ready = self._stage(optimizer) is OptState.READY
        state = self._per_optimizer_states[id(optimizer)]
        if not ready and any(flag.item() for flag in state["found_inf_per_device"].values()):
            return False
        if not all(math.isfinite(loss.item()) for loss in self._losses.step()) or not self._buffers_are_good():
            return False
        if not ready and (kept.largest is None or kept.largest > MAY_OVERFLOW):
            return False  # whether the caller has clipped everything away is to be seen
        taken = kept.take(optimizer, self._scale, state, ready)
        if state["found_inf_per_device"]:
            state["stage"] = OptState.STEPPED if taken else OptState.UNSCALED
            self._unscaled = weakref.ref(optimizer)
        if ready:
            kept.unscaled_by_caller = False
        self._norm = kept.norm if taken and self.history is not None else None
        return taken

    def _put_in_queue(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether the step is now the device's to take or to skip."""
        alone = self._ranks is None or self._ranks.alone
        if self._on_cpu or not alone or self.history is not None or why_not(optimizer, self._follower.policy):
            return False
        kept = self._kept(optimizer)
        if kept.queue is None:
            kept.queue = ScalerQueue(optimizer)
        if self._stage(optimizer) is OptState.READY:
            check_settings(optimizer, _OWNER)
            self._unscale(optimizer, by_caller=False)
        flags = list(self._found_inf_per_device(optimizer).values())
        gate = self._gate if self._gate is not None and self._gate.open else None
        losses = self._losses.step()
        hold = kept.queue.queue(optimizer, flags, losses, gate, self.steps, self._names) if flags else None
        if hold is None:
            return False
        self._hold = hold if self._hold is None else self._hold | hold
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.STEPPED
        return True

    def _buffers_are_good(self) -> bool:
        if self._gate is None or not self._gate.open:
            return True
        readings = Readings()
        readings.add_norms(self._gate.buffers.checked(_OWNER))
        return not readings.exceeded()

    def _step(self, optimizer: torch.optim.Optimizer, update: Callable[[], Any], *, plain: bool) -> float | None:
        if self._stage(optimizer) is OptState.READY:
            self._unscale(optimizer, by_caller=False)
        if not self._found_inf_per_device(optimizer):
            raise AssertionError("No inf checks were recorded for this optimizer.")
        value = self._attempt(optimizer, update, may_fuse=plain)
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.STEPPED
        return value

    def _attempt(
        self, optimizer: torch.optim.Optimizer, update: Callable[[], Any], *, may_fuse: bool = False
    ) -> float | None:
        kept, names = self._kept(optimizer), names_or_places(optimizer, self._names)
        attempt = Attempt(optimizer, update, names, kept.saved, self._ranks, self._losses.step())
        attempt.found = list(self._found_inf_per_device(optimizer).values())
        if kept.unscaled_by_caller:
            attempt.largest = kept.absmax.last()
        gate = self._gate if self._gate is not None and self._gate.open else None
        if gate is not None:
            attempt.buffers, attempt.live_buffers = gate.buffers, gate.buffers.checked(_OWNER)
        if may_fuse and (self._ranks is None or self._ranks.alone):
            attempt.fused = kept.fused = fused_update(optimizer, kept.fused)
        verdict = attempt.make()
        kept.fused = attempt.fused
        self._norm = attempt.norm if self.history is not None else None
        if verdict is None:
            value: float | None = attempt.value
            return value
        if gate is not None:
            gate.buffers.restore()
        refuse_bad_state(_OWNER, optimizer, names, self._gate, self._ranks)
        found = any(bool(flag) for flag in attempt.found)
        record = self._record(verdict, optimizer, kept, found)
        # Scales move by the record's nature, and must stay equal: the guilty rank's word holds on all.
        record = self._ranks.told(record) if self._ranks else record
        self._backs_off |= found and record.nature in ("calibration", "gradient")
        self._per_optimizer_states[id(optimizer)]["stage"] = OptState.STEPPED
        self._iteration.append(record)
        self._records.append(record)
        return None

    def _record(
        self, verdict: Verdict, optimizer: torch.optim.Optimizer, kept: ScaledOptimizer, found: bool
    ) -> SkipRecord:
        skip = Skip(verdict, self.steps, self.get_scale(), self.get_scale() <= self._floor, found)
        record = skip.record(self._losses, self._gate, self._ranks, len(parameters_of(optimizer)))
        return replace(record, absmax=kept.absmax.of(kept.place(optimizer, record.culprit, self._names)))

    def _unscale(self, optimizer: torch.optim.Optimizer, *, by_caller: bool) -> None:
        if self._enabled and self._stage(optimizer) is OptState.READY and self._scale is not None:
            kept = self._kept(optimizer)
            kept.unscaled_by_caller = by_caller
            self._unscaled = weakref.ref(optimizer)
            flags = kept.unscale(optimizer, self._scale)
            if flags is not None:
                state = self._per_optimizer_states[id(optimizer)]
                state["found_inf_per_device"], state["stage"] = flags, OptState.UNSCALED
                return
            kept.look(optimizer, self._scale, self._names)
        super().unscale_(optimizer)

    def _stage(self, optimizer: torch.optim.Optimizer) -> Any:
        return (
            self._per_optimizer_states[id(optimizer)]["stage"]
            if id(optimizer) in self._per_optimizer_states
            else OptState.READY
        )

    def _kept(self, optimizer: torch.optim.Optimizer) -> ScaledOptimizer:
        kept = self._optimizers.get(optimizer)
        if kept is None:
            kept = self._optimizers[optimizer] = ScaledOptimizer(optimizer)
        return kept

    @property
    def _on_cpu(self) -> bool:
        return self._scale is not None and self._scale.device.type == "cpu"

"""A guarded step of any model on CUDA that waits for nothing: forward, backward, and an update that the device decides.

For ``mlpkit.guard.optim`` on CUDA with ``MLPKIT_CUDA_KERNELS=all``. Loss and buffers are looked at on the device, the
buffers restored there; what a skipped step leaves of a record is made when its result is first looked at.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import optimizer as _torch

from mlpkit._events import listened_to
from mlpkit._ext import _C
from mlpkit.errors import ArgumentError
from mlpkit.guard.census import Finding
from mlpkit.guard.culprit import parameter_names
from mlpkit.guard.device import DeviceUpdate, Queued
from mlpkit.guard.policy import Policy
from mlpkit.guard.record import SkipRecord, Window
from mlpkit.guard.update import Outcome
from mlpkit.ops.guarded_update import Reason

if TYPE_CHECKING:
    from mlpkit.guard.step import TrainStep


class QueuedWindow(Window):
    """The fate of one step, on the device until somebody asks: then one sync."""

    def __init__(self, queued: Queued, loss: Tensor, step: TrainStep) -> None:
        self._queued, self._loss = queued, loss
        self._owner = weakref.ref(step)
        self._index = step.steps
        self._read: tuple[SkipRecord | None] | None = None
        super().__init__(done=True, norm=queued.outcome[2])

    @property
    def record(self) -> SkipRecord | None:
        """What is known of the skip; None when the step was taken. The first look syncs."""
        if self._read is None:
            self._read = (self._record(),)
        return self._read[0]

    @record.setter
    def record(self, value: SkipRecord | None) -> None:
        # The general way sets it; here the device has decided.
        assert value is None

    def _record(self) -> SkipRecord | None:
        queued, owner = self._queued, self._owner()
        outcome = queued.read()
        if outcome.taken:
            return None
        loss = float(self._loss)
        names = parameter_names(owner.model) if owner else {}
        where, finding = _found(queued, outcome, loss, names)
        record = SkipRecord.of(finding, step=self._index, where=where, parameters=len(names), loss=loss)
        if owner is not None:
            owner.records.append(record)
            owner.skipped += 1
        return record


def _found(queued: Queued, outcome: Outcome, loss: float, names: dict[int, str]) -> tuple[str, Finding]:
    """(where, finding) of a step that was not taken."""
    tensors = max(outcome.rows, 1)
    if not math.isfinite(loss):
        return "loss", Finding.of_number("loss", loss, tensors)
    if outcome.row >= 0 and outcome.reason in (Reason.GRADIENT, Reason.UPDATE):
        parameter = queued.parameters[outcome.row]
        nans, infs, first = (int(number) for number in queued.census[outcome.row, :3].tolist())
        name = names.get(id(parameter), "a parameter")
        where = "gradient" if outcome.reason == Reason.GRADIENT else "update"
        return where, Finding(name, nans, infs, tuple(parameter.shape), tensors, first)
    if outcome.reason == Reason.GRADIENT:
        return "buffer", Finding("a buffer", 0, 1, (), tensors)
    return "norm", Finding.of_number("gradient norm", outcome.norm, tensors)


class QueuedStep:
    """Tries this way; ``why_not`` says why the last step (or all of them) went another."""

    def __init__(self, step: TrainStep, policy: Policy) -> None:
        self.never = _never(step, policy)
        self.why_not: str | None = self.never or "no step was taken yet"
        self._update: DeviceUpdate | None = None

    def attempt(self, step: TrainStep, inputs: Any, target: Any) -> tuple[Tensor, QueuedWindow] | None:
        """Take the step and return its loss and fate; None: another way, and nothing has been done."""
        self.why_not = self.never or _not_now(step.optimizer)
        if self.why_not:
            return None
        step._clear_gradients()
        step._buffers.take()
        try:
            loss, live_buffers = step._loss_and_gradients(inputs, target)
            queued = self._queue(step, loss, live_buffers)
        except BaseException:
            step._restore()
            raise
        step._buffers.restore_unless(queued.taken)
        return loss, QueuedWindow(queued, loss, step)

    def _queue(self, step: TrainStep, loss: Tensor, live_buffers: Sequence[Tensor]) -> Queued:
        optimizer = step.optimizer
        found = (~torch.isfinite(loss)).to(torch.float32).reshape(())
        for buffer in live_buffers:
            if buffer.is_floating_point():
                found = found + (~torch.isfinite(buffer)).any()
        own = getattr(optimizer, "clip_norm", None)
        clip = min(math.inf if step.clip_norm is None else step.clip_norm, math.inf if own is None else own)
        if self._update is None:
            self._update = DeviceUpdate(optimizer)
        queued = self._update.queue(optimizer, clip_norm=clip, found_inf=found)
        if queued is None:
            raise ArgumentError("TrainStep: no parameter received a gradient; the loss ignores them")
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks at
        return queued


def _never(step: TrainStep, policy: Policy) -> str | None:
    """Why no step of these parts can go this way; None if some can."""
    optimizer: Any = step.optimizer
    if not hasattr(optimizer, "guarded_kind") or optimizer.steps_itself():
        return "the optimizer is not one of mlpkit.guard.optim"
    if any(not one.is_cuda for one in step.model.parameters()):
        return "the model is not on CUDA"
    if _C.cuda_kernels() != "all":
        return "the CUDA kernels of the update wait for their proof on a device: MLPKIT_CUDA_KERNELS=all takes them"
    if step.precision == "fp16" or step.accumulate != 1 or step.scheduler is not None or step.history is not None:
        return "there is a loss scale, accumulation, a scheduler or a history, which are kept on the host"
    if policy != Policy(policy.owner):
        return "a policy acts on every step, which would have to be read for it"
    if not step._ranks.alone:
        return "several ranks decide together"
    return None


def _not_now(optimizer: torch.optim.Optimizer) -> str | None:
    """Why this step cannot go this way; None if it can."""
    hooks = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _torch._global_optimizer_pre_hooks,
        _torch._global_optimizer_post_hooks,
    )
    if any(hooks) or listened_to():
        return "somebody watches the optimizer's steps"
    return None

"""A guarded step of any model on CUDA that waits for nothing: forward, backward, and an update that the device decides.

For ``mlpkit.guard.optim`` on CUDA with ``MLPKIT_CUDA_KERNELS=all``. Loss and buffers are looked at on the device, the
buffers restored there, and the loss scale of fp16 moved there; what a skipped step leaves of a record is made when its
result is first looked at.
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
from mlpkit.guard import headroom
from mlpkit.guard.census import Finding
from mlpkit.guard.checks import warn_of_idle_parameters
from mlpkit.guard.culprit import parameter_names
from mlpkit.guard.device import DeviceUpdate, Queued
from mlpkit.guard.policy import Policy
from mlpkit.guard.record import SkipRecord, Window
from mlpkit.guard.scale import LossScale
from mlpkit.guard.update import DeviceScale, Outcome
from mlpkit.ops.guarded_update import Reason, ScaleRule

if TYPE_CHECKING:
    from mlpkit.guard.step import TrainStep


class QueuedWindow(Window):
    """The fate of one step, on the device until somebody asks: then one sync."""

    def __init__(self, queued: Queued, loss: Tensor, scale: Tensor | float, step: TrainStep) -> None:
        self._queued, self._loss, self._scale = queued, loss, scale
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
        scale = float(self._scale)
        rule = owner._loss_scale if owner else None
        record = SkipRecord.of(
            finding,
            step=self._index,
            where=where,
            parameters=len(names),
            loss=loss,
            scale=scale,
            nature=headroom.nature(where, scale, rule is None or scale <= rule.floor),
        )
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
        self._scale: DeviceScale | None = None

    def attempt(self, step: TrainStep, inputs: Any, target: Any) -> tuple[Tensor, Tensor | float, QueuedWindow] | None:
        """Take the step and return its loss, scale and fate; None: another way, and nothing has been done."""
        self.why_not = self.never or not_now(step.optimizer)
        if self.why_not:
            return None
        if self._scale is None and step._loss_scale is not None:
            self._scale = _on_device(step._loss_scale, step._device)
        used: Tensor | float = 1.0 if self._scale is None else self._scale.value.clone()
        step._clear_gradients()
        step._buffers.take()
        try:
            loss, live_buffers = step._loss_and_gradients(inputs, target, self._scale)
            queued = self._queue(step, loss, live_buffers)
        except BaseException:
            step._restore()
            raise
        step._buffers.restore_unless(queued.taken)
        return loss, used, QueuedWindow(queued, loss, used, step)

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
            warn_of_idle_parameters(step._inner, optimizer)
        scale = self._scale
        before = None if scale is None else (scale.value.clone(), scale.clean_steps.clone())
        bad_forward = found != 0  # the update puts its own finding into found
        queued = self._update.queue(optimizer, clip_norm=clip, found_inf=found, scale=scale)
        if queued is None:
            first = next(iter(parameter_names(step._inner).values()))
            raise ArgumentError(
                f"TrainStep: no parameter received a gradient (the first is {first!r}); the loss ignores them"
            )
        if scale is not None and before is not None:
            # Only scaled gradients are the scale's doing: an Inf in the forward comes back at any scale.
            scale.value.copy_(torch.where(bad_forward, before[0], scale.value))
            scale.clean_steps.copy_(torch.where(bad_forward, before[1], scale.clean_steps))
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks at
        return queued


def _on_device(scale: LossScale, device: torch.device) -> DeviceScale:
    """The same scale, moved by the device from now on."""
    rule = ScaleRule(scale.growth, scale.backoff, scale.growth_interval, scale.floor, scale.ceiling)
    lent = DeviceScale(scale.value, rule, device)
    scale.lend(lent)
    return lent


def _never(step: TrainStep, policy: Policy) -> str | None:
    """Why no step of these parts can go this way; None if some can."""
    optimizer: Any = step.optimizer
    if not hasattr(optimizer, "guarded_kind") or optimizer.steps_itself():
        return "the optimizer is not one of mlpkit.guard.optim"
    if any(not one.is_cuda for one in step.model.parameters()):
        return "the model is not on CUDA"
    if _C.cuda_kernels() != "all":
        return "the CUDA kernels of the update wait for their proof on a device: MLPKIT_CUDA_KERNELS=all takes them"
    if step.accumulate != 1 or step.scheduler is not None or step.history is not None:
        return "there is accumulation, a scheduler or a history, which are kept on the host"
    if policy != Policy(policy.owner):
        return "a policy acts on every step, which would have to be read for it"
    if not step._ranks.alone:
        return "several ranks decide together"
    return None


def not_now(optimizer: torch.optim.Optimizer) -> str | None:
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

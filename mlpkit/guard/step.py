"""The guarded training step: forward, backward, decision, update; taken whole or skipped whole."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit._events import announce, listened_to
from mlpkit.errors import ArgumentError
from mlpkit.guard import checks, headroom
from mlpkit.guard.aftermath import Aftermath
from mlpkit.guard.culprit import parameter_names
from mlpkit.guard.decision import Decision
from mlpkit.guard.history import History
from mlpkit.guard.losses import Loss, describe, own_loss, resolve
from mlpkit.guard.native import NativeStep
from mlpkit.guard.policy import Policy
from mlpkit.guard.queued import QueuedStep
from mlpkit.guard.ranks import Ranks, unwrapped
from mlpkit.guard.record import SkipRecord, StepResult, Window
from mlpkit.guard.replay import MicroBatch, call, random_state, set_random_state
from mlpkit.guard.scale import LossScale, ScaleChange, check_scale, scaled
from mlpkit.guard.small import SmallStep, SmallWindow
from mlpkit.guard.state import Buffers, OptimizerCopy, Places, parameters_of
from mlpkit.guard.update import DeviceScale


class TrainStep:
    """One training step of any module, loss and optimizer that Inf and NaN cannot ruin.

    Same as ``zero_grad``, ``loss(model(inputs), target).backward()``, ``clip_grad_norm_``, ``optimizer.step()`` and
    ``scheduler.step()``, under autocast and a loss scale for half precision, with one promise more: a batch that makes
    Inf or NaN, in the forward, the loss, the gradients or the update itself, leaves parameters, optimizer state, step
    counts, scheduler and registered buffers bit for bit as they were. Random numbers stay consumed, the loss scale
    backs off where its gradients overflowed, and a ``SkipRecord`` names the culprit.

    loss: ``cross_entropy | bce | mse | l1 | huber | log_mse`` (their means), a callable (output, target) such as
    ``nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum")``, or None: ``output.loss``.
    precision: ``"fp32"`` as the model is; ``"fp16"``, ``"bf16"``: autocast over float32 parameters. clip_norm: largest
    global gradient norm. accumulate: calls that make one step, their losses averaged. scheduler: moves on taken steps.
    init_scale: first loss scale (fp16), or a ``LossScale``.

    on_nonfinite: ``"skip"``; ``"raise"`` NonFiniteError; ``"rollback"``: after a fault that is not the scale's doing,
    back to the last good snapshot. on_collapse: what to do when the forward itself held Inf or NaN: ``"skip"``,
    ``"raise"``, or ``"fp32_step"``: take this one step without autocast. max_consecutive_skips: NonFiniteError after so
    many in a row. check_every: these act on every N-th step; snapshot_every: steps between snapshots, which are in
    memory, or with snapshot_path in a file (one a rank). history: a ``History`` that is told every step.

    A model in DistributedDataParallel, or sharded by ``fully_shard``, takes every decision with all ranks; the records
    of all say on which one it began.

    Gradients belong to the step. Where ``path`` is ``"native"`` they never become tensors and every ``.grad`` is None
    afterwards; ``grad_norm`` of the result is their norm before clipping. Whoever wants to read them registers a hook
    on a parameter (``register_post_accumulate_grad_hook``), with which steps go the general way.

    Raises ArgumentError, DtypeError or DeviceError, here or at a call, for parts that do not fit, and NonFiniteError
    naming a parameter, optimizer state or buffer that held Inf or NaN before the step: that is never skipped over.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | Loss | None,
        optimizer: torch.optim.Optimizer,
        *,
        precision: str = "fp32",
        clip_norm: float | None = None,
        accumulate: int = 1,
        scheduler: Any = None,
        init_scale: float | LossScale = 65536.0,
        on_nonfinite: str = "skip",
        on_collapse: str = "skip",
        max_consecutive_skips: int | None = None,
        check_every: int = 1,
        snapshot_every: int = 100,
        snapshot_path: str | os.PathLike[str] | None = None,
        history: History | None = None,
    ) -> None:
        checks.check_options(precision, clip_norm, accumulate)
        policy = Policy(
            "TrainStep", on_nonfinite, on_collapse, max_consecutive_skips, check_every, snapshot_every, snapshot_path
        )
        policy.check_precision(precision)
        self._loss_scale = checks.loss_scale(precision, init_scale)
        self._device = checks.check_parts(model, optimizer, scheduler, precision)
        self._reads_are_free = self._device.type == "cpu"
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self._precision, self.clip_norm, self._accumulate = precision, clip_norm, accumulate
        self.history = history
        self.records: list[SkipRecord] = []
        self.steps = 0  # taken and skipped
        self.skipped = 0
        self._loss = resolve(loss)
        self._places = Places(model)
        self._inner = unwrapped(model)
        self._ranks = Ranks(model)
        self._buffers = Buffers(self._inner)
        self._aftermath = Aftermath(policy, self, self._ranks, self._buffers.sentinels)
        self._absmax = headroom.AbsmaxHistory()
        self._saved = OptimizerCopy(optimizer)
        self._decision = Decision(self)
        self._batches: list[MicroBatch] = []
        self._live_buffers: list[Tensor] = []
        self._window = Window()
        self._full_precision = False
        self._native = NativeStep(model, loss, optimizer, precision, accumulate)
        self._small = SmallStep(self, loss, policy)
        self._queued = QueuedStep(self, policy)

    @property
    def path(self) -> str:
        """``"native"`` where the last step was one native call, ``"small"`` where it was the CUDA kernels of small
        networks, ``"queued"`` where a CUDA device decided about a general model's; ``"general"`` otherwise:
        ``path_reason`` says why.
        """
        if self._small.why_not is None:
            return "small"
        if self._queued.why_not is None:
            return "queued"
        return "general" if self._native.why_not else "native"

    @property
    def path_reason(self) -> str | None:
        """Why the last step went the general way; None where it did not."""
        if self._small.why_not is None or self._small.never is None:
            return self._small.why_not
        if self._queued.why_not is None or self._queued.never is None:
            return self._queued.why_not
        return self._native.why_not

    @property
    def precision(self) -> str:
        """As given: ``"fp32"``, ``"fp16"`` or ``"bf16"``."""
        return self._precision

    @property
    def accumulate(self) -> int:
        """As given: how many calls make one step."""
        return self._accumulate

    @property
    def on_nonfinite(self) -> str:
        """As given."""
        return self._aftermath.policy.on_nonfinite

    @property
    def headroom(self) -> dict[str, float]:
        """Bits between each gradient of the last general step, scaled, and its dtype's largest number. Syncs."""
        return self._absmax.headroom(self._parameter_names(), checks.PRECISIONS[self.precision] or torch.float32)

    @property
    def scale(self) -> float:
        """The loss scale of the next step; 1 unless precision is fp16."""
        return self._loss_scale.value if self._loss_scale else 1.0

    @property
    def scale_changes(self) -> list[ScaleChange]:
        """Every growth and back-off of the loss scale that was not a device's own (``path`` is ``"queued"``)."""
        return self._loss_scale.changes if self._loss_scale else []

    @property
    def syncs(self) -> int:
        """Flags that a clean step reads from the device: none on the CPU, where there is no waiting, nor where the
        device decides (``path`` is ``"small"`` or ``"queued"``); else one. And one more for each all-reduce under DDP
        or FSDP2.
        """
        return 0 if self._reads_are_free or self.path in ("small", "queued") else 1 + self._ranks.reductions

    def __call__(self, inputs: Tensor | Sequence[Any] | Mapping[str, Any], target: Any = None) -> StepResult:
        """Take one step, or with ``accumulate`` a part of one; inputs: a tensor, or a tuple or dict of arguments."""
        if self._aftermath.keeps and not self._batches:
            self._aftermath.before(self.steps)
        if self._small.never is None:
            self._check_call(target)
            decided = self._small.attempt(self, inputs, target)
            if decided is not None:
                return self._decided_on_device(decided)
        if self._queued.never is None:
            self._check_call(target)
            queued = self._queued.attempt(self, inputs, target)
            if queued is not None:
                value, scale, self._window = queued
                self.steps += 1
                return StepResult(value, scale, self._window)
        outcome = self._native.again(inputs, target, self.clip_norm, self.scale)
        if outcome is None:
            self._check_call(target)
            outcome = self._native.attempt(inputs, target, self.clip_norm, self.scale, self._show)
        if isinstance(outcome, tuple):
            return self._taken_natively(*outcome)
        if not self._batches:
            self._window = Window()
            self._clear_gradients()
            self._buffers.take()
        result = StepResult(self._forward_backward(inputs, target, self.scale), self.scale, self._window)
        if len(self._batches) == self.accumulate:
            self._finish()
        return result

    def _parameter_names(self) -> list[str]:
        names = parameter_names(self._inner)
        return [names[id(parameter)] for parameter in parameters_of(self.optimizer)]

    def _check_call(self, target: Any) -> None:
        if self._loss is None and target is not None:
            raise ArgumentError(
                "TrainStep: a target came, but loss=None takes the output's .loss; put it into the inputs"
            )
        if target is None and describe(self._loss):
            raise ArgumentError("TrainStep: no target came; call step(inputs, target), or give loss=None or a callable")
        checks.check_settings(self.optimizer)
        # What fully_shard puts in a parameter's place comes and goes.
        if not (self._batches or self._ranks.sharded or self._places.same()):
            checks.check_parameters(self.model, self.optimizer, self._precision)
            self._places.look()

    def _show(self, inputs: Any, target: Any) -> None:
        try:
            assert self._loss is not None
            with self._autocast():
                loss = self._loss(call(self.model, inputs), target)
            scaled(loss, self.scale).backward()  # type: ignore[no-untyped-call]
        finally:
            self._clear_gradients()

    def _taken_natively(self, loss: float, norm: float) -> StepResult:
        self._window = Window(done=True, norm=norm)
        step, scale = self.steps, self.scale
        self.steps += 1
        if self.scheduler is not None:
            # What a scheduler looks at to warn those who step it before the optimizer.
            self.optimizer._opt_called = True  # type: ignore[attr-defined]
        self._after_update(step, scaled=True)
        if listened_to():
            saved = len(parameters_of(self.optimizer))
            announce("step", step=step, skipped=False, culprit=None, scale=scale, parameters=saved)
        if self.history is not None:
            self.history.add(step, loss, norm, scale)
        if self._aftermath.awake:
            self._act(None)
        return StepResult(loss, scale, self._window)

    def _decided_on_device(self, outcome: Tensor) -> StepResult:
        self._window = SmallWindow(outcome, self)
        self.steps += 1
        return StepResult(outcome[0], 1.0, self._window)

    def _forward_backward(self, inputs: Any, target: Any, scale: float) -> Tensor:
        before = random_state(self._device)
        try:
            with self._ranks.without_sync(last=len(self._batches) == self.accumulate - 1):
                with self._autocast():
                    output = call(self.model, inputs)
                    loss = checks.check_loss(own_loss(output) if self._loss is None else self._loss(output, target))
                scaled(loss, scale / self.accumulate).backward()  # type: ignore[no-untyped-call]
            self._live_buffers = self._buffers.checked()
        except BaseException:
            self._abandon()
            raise
        # A copy: the memory of a captured graph's output is the next replay's.
        value = loss.detach().clone()
        self._batches.append(MicroBatch(inputs, target, value, before))
        return value

    def _loss_and_gradients(self, inputs: Any, target: Any, scale: DeviceScale | None) -> tuple[Tensor, list[Tensor]]:
        """A forward and backward that nothing has to be remembered of; the loss and the buffers to be looked at."""
        with self._autocast():
            output = call(self.model, inputs)
            loss = checks.check_loss(own_loss(output) if self._loss is None else self._loss(output, target))
        (loss if scale is None else scale.scale(loss)).backward()  # type: ignore[no-untyped-call]
        return loss.detach().clone(), self._buffers.checked()

    def _finish(self) -> None:
        """Decide on the whole step, then let it stand or put everything back."""
        step, scale = self.steps, self.scale
        try:
            record = self._decision.make(self._batches, self._live_buffers, scale, self._window)
            if record is not None and self._aftermath.wants_fp32(record):
                record = self._again_in_fp32(record)
        except BaseException:
            self._abandon()
            raise
        self._saved.keep()
        losses = [batch.loss for batch in self._batches]
        self._batches = []
        self._window.done, self._window.record = True, record
        self.steps += 1
        skipped = record is not None and not record.taken
        if record is not None and skipped:
            self._after_skip(record)
        else:
            self._after_update(step, scaled=record is None)
        culprit = record.culprit if record else None
        saved = len(parameters_of(self.optimizer))
        announce("step", step=step, skipped=skipped, culprit=culprit, scale=scale, parameters=saved)
        self._remember(step, losses, scale, record)

    def _remember(self, step: int, losses: list[Tensor], scale: float, record: SkipRecord | None) -> None:
        """Write the step down, then let the policies act, which may raise."""
        if record is not None:
            self.records.append(record)
        if self.history is not None:
            bits = headroom.least(self.headroom) if self._reads_are_free else None
            self.history.add(step, torch.stack(losses).mean(), self._window.norm, scale, record, bits)
        self._act(record)

    def _act(self, record: SkipRecord | None) -> None:
        """Let the policies act, and say so in the record of the skip that they acted on."""
        acted = self._aftermath.after(self.steps, record)
        if acted is None:
            return
        old, amended = acted
        self.records[:] = [amended if one is old else one for one in self.records]
        if self._window.record is old:
            self._window.record = amended
        if self.history is not None:
            self.history.amend(amended)

    def _again_in_fp32(self, record: SkipRecord) -> SkipRecord:
        """The same batches and random numbers without autocast and scale; the record of what came of it."""
        batches, self._batches = self._batches, []
        drawn = random_state(self._device)
        self._full_precision = True
        try:
            for batch in batches:
                set_random_state(batch.random_state, self._device)
                batch.loss.copy_(self._forward_backward(batch.inputs, batch.target, 1.0))
            again = self._decision.make(self._batches, self._live_buffers, 1.0, self._window)
        finally:
            self._full_precision = False
            set_random_state(drawn, self._device)
        if again is None:
            return replace(record, action="fp32 step")
        return replace(record, note=f"{record.note} The step in float32 failed too.".strip())

    def _after_update(self, step: int, *, scaled: bool) -> None:
        if self._loss_scale and scaled:
            # Learning that has stopped without any Inf or NaN: nothing survived float16's smallest number.
            flushed = self._reads_are_free and self._window.norm is not None and float(self._window.norm) == 0
            (self._loss_scale.underflowed if flushed else self._loss_scale.step_taken)(step)
        if self.scheduler is not None:
            self.scheduler.step()

    def _after_skip(self, record: SkipRecord) -> None:
        self.skipped += 1
        # Only scaled gradients are the scale's doing: an Inf in the forward comes back at any scale.
        if self._loss_scale and record.where == "gradient":
            self._loss_scale.overflowed(record.step)

    def _abandon(self) -> None:
        """After an error: put everything back and forget the step."""
        self._restore()
        self._ranks.forget()
        self._batches = []

    def _restore(self) -> None:
        self._saved.restore()
        self._buffers.restore()
        self._clear_gradients()

    def _clear_gradients(self) -> None:
        for parameter in chain(self._places.parameters(), parameters_of(self.optimizer)):
            parameter.grad = None

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = None if self._full_precision else checks.PRECISIONS[self.precision]
        return torch.autocast(self._device.type, dtype) if dtype else nullcontext()

    def state_dict(self) -> dict[str, Any]:
        """Counters and loss scale, plain numbers; model, optimizer and scheduler save their own."""
        clean = self._loss_scale.clean_steps if self._loss_scale else 0
        scale = self._loss_scale.value if self._loss_scale else None
        counts = {"steps": self.steps, "skipped": self.skipped, "consecutive_skips": self._aftermath.consecutive}
        return {"version": 1, **counts, "scale": scale, "clean_steps": clean}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict()``; a step under way is abandoned, and the scale brought within its bounds.

        Raises ArgumentError for a state that is none.
        """
        missing = [key for key in ("version", "steps", "skipped", "scale", "clean_steps") if key not in state]
        if missing or state["version"] != 1:
            found = f"it lacks {', '.join(missing)}" if missing else f"its version is {state['version']!r}"
            raise ArgumentError(f"TrainStep.load_state_dict: not a state of version 1: {found}")
        if self._loss_scale and state["scale"] is not None:
            value = check_scale("TrainStep.load_state_dict: scale", state["scale"])
            self._loss_scale.value = min(max(value, self._loss_scale.floor), self._loss_scale.ceiling)
            self._loss_scale.clean_steps = int(state["clean_steps"])
        # Buffers stay as they are: the model may have been loaded already.
        self._batches = []
        self._clear_gradients()
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self._aftermath.consecutive = int(state.get("consecutive_skips", 0))

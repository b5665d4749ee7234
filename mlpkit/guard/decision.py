"""What becomes of one general step's gradients: an update, or everything put back and a record of who was guilty."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mlpkit.guard import bounds, census, checks, headroom
from mlpkit.guard.census import Finding
from mlpkit.guard.culprit import Evidence, bad_state_error, bad_state_of, explained, forward_culprit, make_record
from mlpkit.guard.direct import DirectUpdate
from mlpkit.guard.record import SkipRecord, Window
from mlpkit.guard.replay import MicroBatch
from mlpkit.guard.state import parameters_of, state_of

if TYPE_CHECKING:
    from mlpkit.guard.step import TrainStep


class Decision:
    """Decides for a ``TrainStep``, with its parts. direct: takes good steps of some optimizers by one native call."""

    def __init__(self, step: TrainStep) -> None:
        self._step = step
        self.direct = DirectUpdate(step.optimizer)
        self._first = True

    def make(
        self, batches: list[MicroBatch], live_buffers: list[Tensor], scale: float, window: Window
    ) -> SkipRecord | None:
        """None when the update was made and is finite; otherwise the record, with everything put back.

        live_buffers: those that must be finite. window: gets the norm of the gradients.
        """
        step, ranks = self._step, self._step._ranks
        losses = [batch.loss for batch in batches]
        if self._first:
            self._first = False
            checks.warn_of_idle_parameters(step._inner, step.optimizer)
        if ranks.alone and not ranks.sharded:
            norm = self.direct.take(losses, live_buffers, scale, step.clip_norm, step._absmax)
            if norm is not None:
                window.norm = norm
                return None
        evidence = Evidence(step._inner, step.optimizer, batches, step._buffers)
        readings = census.Readings()
        provable = bounds.provable(step.optimizer)
        update_norm = self._prepare_gradients(evidence, scale)
        window.norm = evidence.norm
        readings.add(update_norm, bounds.LARGEST if provable else census.FINITE)
        readings.add(torch.stack([loss.reshape(()) for loss in losses]).abs())
        readings.add_norms(live_buffers)
        # Read once: before the update where its formula can vouch for it, and on the CPU, where reading is free.
        if provable or step._reads_are_free:
            if provable:
                bounds.add_readings(readings, step.optimizer)
            if ranks.exceeded(readings, losses):
                verdict = ranks.common(evidence.verdict())
                if verdict:
                    return self._roll_back(evidence, verdict, scale)
            elif provable:
                step.optimizer.step()
                return None
            readings = census.Readings()
        return self._try_update(evidence, readings, scale)

    def _try_update(self, evidence: Evidence, readings: census.Readings, scale: float) -> SkipRecord | None:
        """Update with a copy to fall back on."""
        step, optimizer = self._step, self._step.optimizer
        step._saved.take()
        evidence.updated = True
        try:
            # Ours would skip a bad step by themselves, and what would come of it is to be seen.
            self.direct.force()
        except Exception:
            # An optimizer may itself refuse bad gradients; what it refuses otherwise is the caller's to see.
            verdict = evidence.verdict()
            if not verdict:
                raise
            return self._roll_back(evidence, verdict, scale)
        readings.add_norms([*parameters_of(optimizer), *(tensor for _, tensor in state_of(optimizer, {}))])
        exceeded = step._ranks.exceeded(readings, [batch.loss for batch in evidence.batches])
        verdict = step._ranks.common(evidence.verdict()) if exceeded else None
        return self._roll_back(evidence, verdict, scale) if verdict else None

    def _prepare_gradients(self, evidence: Evidence, scale: float) -> Tensor:
        """Unscale and clip in place; returns the norm that the update will see, 0-dim float64, not finite if bad."""
        step, clip_norm = self._step, self._step.clip_norm
        named = checks.check_gradients(step._inner, step.optimizer)
        gradients = [census.local(gradient) for _, gradient in named]
        present = [None if one.grad is None else census.local(one.grad) for one in parameters_of(step.optimizer)]
        step._absmax.add(headroom.absmax(present), scale)
        free = step._reads_are_free
        measure = partial(census.whole_norm, exact=clip_norm is not None or not free, free=free)
        norm = step._ranks.global_norm([gradient for _, gradient in named], measure)
        evidence.norm = norm = norm / scale
        if clip_norm is None and scale == 1:
            return norm
        factor = torch.full_like(norm, 1 / scale)
        if clip_norm is not None:
            factor = factor * (clip_norm / norm).clamp(max=1.0)
        # Bad gradients stay as they are, so that an Inf is still an Inf when the culprit is looked for.
        finite = torch.isfinite(norm)
        factor = torch.where(finite, factor, 1.0)
        if not (free and factor == 1):
            census.multiply(gradients, factor)
        return norm if clip_norm is None else torch.where(finite, norm.clamp(max=clip_norm), norm)

    def _roll_back(self, evidence: Evidence, verdict: tuple[str, Finding, int], scale: float) -> SkipRecord:
        """Put everything back and name the culprit; raises NonFiniteError when the state was bad before the step."""
        step, ranks = self._step, self._step._ranks
        step._restore()
        found = ranks.common(bad_state_of(step._inner, step.optimizer, step._buffers))
        if found and not step._aftermath.can_go_back:
            raise bad_state_error("TrainStep", *found)
        if found:
            place, finding = found
            verdict = ("state", replace(finding, name=f"{place} {finding.name!r}"), 0)

        def trace_forward(batch: MicroBatch, finding: Finding) -> tuple[str, str, Finding, str]:
            together, itself = not ranks.alone, ranks.sharded
            return forward_culprit(
                step._inner, batch, finding, step._device, step._autocast, together=together, itself=itself
            )

        record = make_record(step.steps, verdict, evidence, scale, trace_forward)
        if ranks.sharded:
            step._buffers.restore()
        places = step._parameter_names()
        past = step._absmax.of(places.index(record.culprit) if record.culprit in places else None)
        return ranks.told(explained(record, step._loss_scale, past))

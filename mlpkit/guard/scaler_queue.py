"""Steps of a ``GradScaler`` on CUDA that wait for nothing: the device decides, and remembers what it skipped.

For ``mlpkit.guard.optim`` with ``MLPKIT_CUDA_KERNELS=all``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.guard import headroom
from mlpkit.guard.census import Finding
from mlpkit.guard.culprit import names_or_places
from mlpkit.guard.device import DeviceUpdate, Skip
from mlpkit.guard.gate import Gate
from mlpkit.guard.policy import Policy
from mlpkit.guard.queued import not_now
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.state import parameters_of
from mlpkit.ops.guarded_update import Reason

_OWNER = "GradScaler"


def why_not(optimizer: Any, policy: Policy) -> str | None:
    """Why this optimizer's steps are not queued; None where they are."""
    if not hasattr(optimizer, "guarded_kind") or optimizer.steps_itself():
        return "the optimizer is not one of mlpkit.guard.optim"
    if not all(parameter.is_cuda for parameter in parameters_of(optimizer)):
        return "the parameters are not on CUDA"
    if _C.cuda_kernels() != "all":
        return "the CUDA kernels of the update wait for their proof on a device: MLPKIT_CUDA_KERNELS=all takes them"
    if policy != Policy(policy.owner):
        return "a policy acts on every step, which would have to be read for it"
    return not_now(optimizer)


class ScalerQueue:
    """Of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._update = DeviceUpdate(optimizer)
        self._queued = 0
        self._offset: int | None = None  # from its steps to those of the scaler
        self._records: list[SkipRecord] = []

    def queue(
        self,
        optimizer: torch.optim.Optimizer,
        flags: Sequence[Tensor],
        losses: Sequence[Tensor],
        gate: Gate | None,
        step: int,
        names: dict[int, str],
    ) -> Tensor | None:
        """Queue a step of gradients that have been unscaled.

        flags: of that, left as they are. Returns whether the scale must stay as it is, 0-dim bool on the device: after
        a skip that no scale could have helped. None where there is nothing to update.
        """
        overflowed = torch.stack([flag.to(flags[0]) for flag in flags]).sum() != 0
        bad_loss = torch.zeros_like(overflowed)
        for loss in losses:
            bad_loss = bad_loss | ~torch.isfinite(loss.to(overflowed.device))
        found = overflowed | bad_loss
        for buffer in gate.buffers.checked(_OWNER) if gate is not None else ():
            if buffer.is_floating_point():
                found = found | ~torch.isfinite(buffer).all()
        clip = getattr(optimizer, "clip_norm", None)
        queued = self._update.queue(
            optimizer, clip_norm=math.inf if clip is None else clip, found_inf=found.to(torch.float32)
        )
        if queued is None:
            return None
        if gate is not None:
            gate.buffers.restore_unless(queued.taken)
        if self._offset is not None and step - self._queued != self._offset:
            self._records += self._read(optimizer, names)
        self._offset = step - self._queued
        self._queued += 1
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks at
        return (queued.taken == 0) & ~(overflowed & ~bad_loss)

    def records(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> list[SkipRecord]:
        """Of the skips since the last call, or the 32 latest of them. Syncs."""
        found, self._records = [*self._records, *self._read(optimizer, names)], []
        return found

    def _read(self, optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[SkipRecord]:
        known = names_or_places(optimizer, names)
        for skip in self._update.skips():
            yield self._record(skip, known)

    def _record(self, skip: Skip, names: dict[int, str]) -> SkipRecord:
        step, outcome, (nans, infs, first, _, _), parameter, _ = skip
        where, finding = "norm", Finding.of_number("gradient norm", outcome.norm)
        if parameter is not None:
            where = "gradient" if outcome.reason == Reason.GRADIENT else "update"
            shape = tuple(parameter.shape)
            finding = Finding(names[id(parameter)], nans, infs, shape, max(outcome.rows, 1), first)
        elif outcome.reason == Reason.GRADIENT:
            where, finding = "loss", Finding("loss", 0, 1, (), 1)
        return SkipRecord.of(
            finding,
            step=(self._offset or 0) + step,
            where=where,
            parameters=len(names),
            nature=headroom.nature(where, 2.0, False),
        )

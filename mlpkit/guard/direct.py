"""The update of a general TrainStep by one native call, where its optimizer is one that has it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _torch

from mlpkit.guard import census
from mlpkit.guard.headroom import AbsmaxHistory
from mlpkit.guard.update import FusedUpdate, as_torch_now, why_not


class DirectUpdate:
    """Takes good steps; of any other it changes nothing, and leaves it to be looked at with all the means there are."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._update: FusedUpdate | None = None
        self._reason: str | None = None
        self._scale = torch.ones(())

    def take(
        self,
        losses: Sequence[Tensor],
        live_buffers: Sequence[Tensor],
        scale: float,
        clip_norm: float | None,
        absmax: AbsmaxHistory,
    ) -> float | None:
        """The norm of the gradients, where the step was taken; None where nothing has been changed."""
        optimizer = self._optimizer
        if self._update is None and why_not(optimizer) is not None:
            return None
        # What the native side does not look at: it sees parameters, state, settings and gradients.
        if self._hooked() or not all(math.isfinite(loss.item()) for loss in losses):
            return None
        if live_buffers:
            readings = census.Readings()
            readings.add_norms(live_buffers)
            if readings.exceeded():
                return None
        update = self._update or FusedUpdate(optimizer)
        if update.torch and not as_torch_now(optimizer):
            return None
        if all(parameter.grad is None for group in optimizer.param_groups for parameter in group["params"]):
            return None
        own = getattr(optimizer, "clip_norm", None)
        clip = min(math.inf if clip_norm is None else clip_norm, math.inf if own is None else own)
        try:
            outcome = update.step(
                optimizer, clip_norm=clip, grad_scale=self._scale.fill_(scale) if scale != 1 else None
            )
        except (TypeError, ValueError):
            # Gradients or parameters of another kind than before: the other way says what is wrong, or takes them.
            self._update = None
            return None
        self._update = update if update.prepared else None
        if not outcome.taken:
            return None
        optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks at
        absmax.add(update.absmax(), scale)
        return outcome.norm

    def force(self) -> None:
        """The optimizer's own step, whatever comes of it."""
        optimizer: Any = self._optimizer
        (optimizer.force if hasattr(optimizer, "guarded_kind") else optimizer.step)()

    def _hooked(self) -> bool:
        optimizer = self._optimizer
        return bool(
            optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _torch._global_optimizer_pre_hooks
            or _torch._global_optimizer_post_hooks
        )

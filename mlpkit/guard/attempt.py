"""One update that is made whole or not at all: gradients looked at before it, parameters and state after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _torch

from mlpkit.guard import bounds, census
from mlpkit.guard.census import Finding, Readings, first_bad
from mlpkit.guard.ranks import Ranks
from mlpkit.guard.state import Buffers, OptimizerCopy, parameters_of, state_of
from mlpkit.guard.update import FusedUpdate, as_torch_now, why_not

Verdict = tuple[str, Finding]
MAY_OVERFLOW = 1e12  # squares of larger numbers may sum up past float32's range


@dataclass
class Attempt:
    """What one optimizer is about to do with gradients that have been unscaled, and what else must be finite.

    update: calls the optimizer. names: of its parameters by identity. saved: room for the copy that an update without a
    proven bound falls back on. losses and buffers: looked at as the gradients are. found: flags that must be zero, of
    an earlier look at the gradients; largest: their unscaled absmax at that look, where the caller may have clipped.
    fused: the native update that takes good steps in the optimizer's place.
    """

    optimizer: torch.optim.Optimizer
    update: Callable[[], Any]
    names: dict[int, str]
    saved: OptimizerCopy
    ranks: Ranks | None = None
    losses: Sequence[Tensor] = ()
    found: Sequence[Tensor] = ()
    largest: Tensor | None = None
    buffers: Buffers | None = None
    live_buffers: Sequence[Tensor] = ()
    fused: FusedUpdate | None = None
    value: Any = field(default=None, init=False)  # what the optimizer returned
    _norms: list[Tensor] = field(default_factory=list, init=False)

    def make(self) -> Verdict | None:
        """Update, or don't: None when the update was made and is finite, else what was bad. Syncs once when clean.

        After a verdict parameters and optimizer state are what they were; buffers are the caller's to restore.
        """
        if self.fused is not None:
            return None if self._made_fused(self.fused) else self._before() or self._checked_update()
        readings = self._others()
        provable = bounds.provable(self.optimizer)
        self._norms = census.norms(self._gradients())
        for norms in self._norms:
            readings.add(norms, bounds.LARGEST if provable else census.FINITE)
        if self.largest is not None and self.largest.numel():
            # A norm that overflowed clips everything to zero: only then may nothing be left of a gradient so large.
            largest = self.largest.amax()
            left = torch.stack([norms.amax().to(largest) for norms in self._norms]).amax()
            readings.add(torch.where(left == 0, largest, 0.0), MAY_OVERFLOW)
        if provable:
            bounds.add_readings(readings, self.optimizer)
        if self._exceeded(readings):
            verdict = self._common(self._before())
            if verdict:
                return verdict
        elif provable:
            self.value = self.update()
            return None
        return self._checked_update()

    def _others(self) -> Readings:
        """All that must be finite beside gradients, parameters and state."""
        readings = Readings()
        readings.add_norms(self.live_buffers)
        for loss in self.losses:
            readings.add(loss.abs())
        for flag in self.found:
            readings.add(flag, 0.0)
        return readings

    def _made_fused(self, fused: FusedUpdate) -> bool:
        """Whether one native call took the step; otherwise nothing has changed."""
        # On the CPU, where these updates are, reading number by number is the quicker way.
        if not all(math.isfinite(loss.item()) for loss in self.losses) or any(flag.item() for flag in self.found):
            return False
        if (self.live_buffers and self._others().exceeded()) or self._clipped_away():
            return False
        clip = getattr(self.optimizer, "clip_norm", None)
        try:
            outcome = fused.step(self.optimizer, clip_norm=math.inf if clip is None else clip)
        except (TypeError, ValueError):
            # What it cannot take, the optimizer itself takes, or refuses in its own words.
            self.fused = None
            return False
        if outcome.taken:
            self._norms = [torch.tensor([outcome.norm], dtype=torch.float64)]
            self.optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks at
        return outcome.taken

    @property
    def norm(self) -> Tensor | None:
        """The global norm of the gradients that ``make`` saw, 0-dim float64; of this rank's shards. No sync."""
        if not self._norms:
            return None
        device = self._norms[0].device
        total: Tensor = torch.linalg.vector_norm(torch.cat([norms.to(device, torch.float64) for norms in self._norms]))
        return total

    def _checked_update(self) -> Verdict | None:
        self.saved.take()
        try:
            self.value = self.update()
        except BaseException:
            self.saved.restore()
            raise
        readings = Readings()
        readings.add_norms(parameters_of(self.optimizer))
        readings.add_norms([tensor for _, tensor in state_of(self.optimizer, {})])
        verdict = self._common(first_bad(self._state())) if self._exceeded(readings) else None
        if verdict is None:
            self.saved.keep()
            return None
        self.saved.restore()
        self.value = None
        return verdict

    def _exceeded(self, readings: Readings) -> bool:
        return self.ranks.exceeded(readings, self.losses) if self.ranks else readings.exceeded()

    def _before(self) -> Verdict | None:
        """What is bad of gradients, losses and buffers, exactly: gradients first, for they have names."""
        places = {
            "gradient": first_bad((self.names[id(p)], g) for p, g in _with_gradients(self.optimizer))
            or self._earlier(),
            "norm": self._clipped_away(),
            "loss": first_bad(("loss", loss) for loss in self.losses),
            "buffer": first_bad(self.buffers.named(), inf_allowed=self.buffers.sentinels) if self.buffers else None,
        }
        return next(((where, finding) for where, finding in places.items() if finding), None)

    def _earlier(self) -> Finding | None:
        """Inf or NaN that was there when the gradients were unscaled, and has been changed since."""
        return Finding("a gradient, when unscaled", 0, 1, (), 1) if any(bool(flag) for flag in self.found) else None

    def _clipped_away(self) -> Finding | None:
        if self.largest is None or not self.largest.numel() or not float(self.largest.amax()) > MAY_OVERFLOW:
            return None
        gone = not any(bool(gradient.any()) for gradient in self._gradients())
        return Finding("gradient norm", 0, 1, (), 1) if gone else None

    def _common(self, found: Verdict | Finding | None) -> Verdict | None:
        verdict = ("update", found) if isinstance(found, Finding) else found
        return self.ranks.common(verdict) if self.ranks else verdict

    def _state(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((self.names[id(parameter)], parameter) for parameter in parameters_of(self.optimizer))
        yield from state_of(self.optimizer, self.names)

    def _gradients(self) -> list[Tensor]:
        return [gradient for _, gradient in _with_gradients(self.optimizer)]


def _with_gradients(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """(parameter, its gradient's values) of those that have one."""
    for parameter in parameters_of(optimizer):
        if parameter.grad is not None:
            yield parameter, dense(census.local(parameter.grad))


def dense(gradient: Tensor) -> Tensor:
    """The values of a sparse gradient; any other as it is."""
    return gradient._values() if gradient.layout == torch.sparse_coo else gradient


def fused_update(optimizer: torch.optim.Optimizer, kept: FusedUpdate | None) -> FusedUpdate | None:
    """The native update of ``guard.optim``, or of torch's own, bit for bit; None for any other optimizer.

    kept: the last step's.
    """
    if not (hasattr(optimizer, "guarded_kind") or as_torch_now(optimizer)):
        return None
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if hooked or _torch._global_optimizer_pre_hooks or _torch._global_optimizer_post_hooks:
        return None
    if kept is not None and kept.prepared:
        return kept
    return FusedUpdate(optimizer) if why_not(optimizer) is None else None

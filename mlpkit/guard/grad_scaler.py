"""``GradScaler``: torch.amp's, for loops that exist; a bad step leaves no trace in parameters, state and buffers."""

from __future__ import annotations

import inspect
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState, _refresh_per_optimizer_state

from mlpkit.errors import ArgumentError
from mlpkit.guard import headroom
from mlpkit.guard.aftermath import Follower
from mlpkit.guard.checks import check_settings
from mlpkit.guard.culprit import names_or_places, parameter_names
from mlpkit.guard.gate import Gate
from mlpkit.guard.history import History
from mlpkit.guard.policy import Policy
from mlpkit.guard.ranks import Ranks, unwrapped
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.scale import ScaleChange, check_rule, check_scale
from mlpkit.guard.scaled_losses import ScaledLosses
from mlpkit.guard.scaled_optimizer import ScaledOptimizer
from mlpkit.guard.scaler_steps import ScalerSteps
from mlpkit.guard.state import parameters_of

_OWNER = "GradScaler"


class GradScaler(ScalerSteps):
    """Same as ``torch.amp.GradScaler``, and a step that would bring Inf or NaN anywhere is skipped without a trace.

    Change the import alone: gradients, loss and the update itself are looked at, with any optimizer; parameters and
    optimizer state stay as they were; ``records`` say who it was (``group 0, parameter 3 (8, 5)``). With ``model=``
    culprits have names, and registered buffers (BatchNorm statistics) are copied before each training forward and put
    back after a skip. The scale backs off only where it can help: not when the loss itself is Inf or NaN.

    device, init_scale, growth_factor, backoff_factor, growth_interval, enabled: as torch's; disabled, it does nothing.
    floor, ceiling: bounds of the scale, widened to hold init_scale, a loaded or a given scale. on_nonfinite:
    ``"skip"``, or ``"raise"`` NonFiniteError in ``update()``. on_collapse: ``"raise"`` when the forward itself held it.
    max_consecutive_skips: NonFiniteError after so many. check_every: act on these every N updates. history: a
    ``History`` that is told every step.

    Raises what torch's raises in the same words, and ArgumentError, DtypeError for what cannot be guarded,
    NonFiniteError naming state that held Inf or NaN before the step. State dicts are interchangeable with torch's. A
    copy or a pickled scaler is without its model: call ``protect(model)`` again.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        model: nn.Module | None = None,
        floor: float = 1.0,
        ceiling: float = 2.0**24,
        on_nonfinite: str = "skip",
        on_collapse: str = "skip",
        max_consecutive_skips: int | None = None,
        check_every: int = 1,
        history: History | None = None,
    ) -> None:
        if not isinstance(device, str):
            raise ArgumentError(
                f"{_OWNER}: device is {device!r}; it must be 'cuda' or 'cpu', and the scale comes second"
            )
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        for name, value in (("on_nonfinite", on_nonfinite), ("on_collapse", on_collapse)):
            if value in ("rollback", "fp32_step"):
                raise ArgumentError(f"{_OWNER}: {name}={value!r} is TrainStep's: a scaler sees neither batch nor run")
        policy = Policy(_OWNER, on_nonfinite, on_collapse, max_consecutive_skips, check_every)
        self._floor, self._ceiling = check_scale(f"{_OWNER}: floor", floor), check_scale(f"{_OWNER}: ceiling", ceiling)
        if floor > ceiling:
            raise ArgumentError(f"{_OWNER}: floor is {floor!r}; it must be at most the ceiling, {ceiling!r}")
        if self._enabled:
            check_rule(
                _OWNER, growth_factor=growth_factor, backoff_factor=backoff_factor, growth_interval=growth_interval
            )
            self._widen(check_scale(f"{_OWNER}: init_scale", float(init_scale)))
        self._follower = Follower(policy)
        self.history = history
        self._records: list[SkipRecord] = []
        self.scale_changes: list[ScaleChange] = []
        self.steps = 0  # updates, of taken and skipped steps
        self._hold: Tensor | None = None  # on a device: whether the scale must stay, after a step that was queued
        self._skipped = 0
        self._warned = False
        self._iteration: list[SkipRecord] = []
        self._backs_off = False  # a skip of this iteration asks for a lower scale
        self._losses = ScaledLosses()
        self._optimizers: weakref.WeakKeyDictionary[Any, ScaledOptimizer] = weakref.WeakKeyDictionary()
        self._gate: Gate | None = None
        self._names: dict[int, str] = {}
        self._ranks: Ranks | None = None
        self._unscaled: weakref.ref[Any] | None = None  # the last optimizer that was
        self._norm: Tensor | float | None = None
        self._known: float | None = None  # the scale, as it was last read
        self._clean_steps = 0  # the growth tracker's value, known without reading it
        if model is not None and self._enabled:
            self.protect(model)

    def protect(self, model: nn.Module) -> None:
        """Name this model's parameters in records, and copy its buffers before each training forward."""
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"{_OWNER}: model is {type(model).__name__}; it must be a torch.nn.Module")
        if self._gate is not None:
            self._gate.remove()
        self._gate = Gate(model)
        self._names = parameter_names(unwrapped(model))
        self._optimizers.clear()
        self._ranks = Ranks(model)

    def begin(self) -> None:
        """Copy the model's buffers now: for loops in which a step calls parts of the model, and not the model itself.

        Does nothing where a forward of this iteration has copied them. Raises ArgumentError without a model.
        """
        if not self._enabled:
            return
        if self._gate is None:
            raise ArgumentError(f"{_OWNER}.begin: no model is protected; give model=, or call protect(model)")
        self._gate.begin()

    @property
    def records(self) -> list[SkipRecord]:
        """Of every skip; of those that a device decided the 32 latest between two looks. Syncs where there are such."""
        self._look()
        return self._records

    @property
    def skipped(self) -> int:
        """Iterations that were, as ``records`` knows them."""
        self._look()
        return self._skipped

    def _look(self) -> None:
        """Bring home what devices have skipped."""
        for optimizer, kept in self._optimizers.items():
            found = kept.queue.records(optimizer, self._names) if kept.queue is not None else []
            self._records += found
            self._skipped += len(found)

    @property
    def headroom(self) -> dict[str, float]:
        """Bits between each gradient of the last step, scaled, and float16's largest number, by name. Syncs."""
        optimizer = self._unscaled() if self._unscaled is not None else None
        if optimizer is None:
            return {}
        names = names_or_places(optimizer, self._names)
        places = [names[id(parameter)] for parameter in parameters_of(optimizer)]
        return self._kept(optimizer).absmax.headroom(places, torch.float16)

    # The loop's calls, in its order.

    def scale(self, outputs: Any) -> Any:
        """As torch's; remembers the losses, to tell a scale that is too high from a forward that is broken."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Iterable) and not isinstance(outputs, (Tensor, list, tuple)):
            outputs = self._losses.watched(outputs)
        else:
            self._losses.watch(outputs)
        return super().scale(outputs)

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """As torch's; raises DtypeError for complex gradients."""
        self._unscale(optimizer, by_caller=True)

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's: the optimizer's own return value, or None where the step was skipped.

        Raises ArgumentError when a learning rate or another setting is Inf or NaN, or the forward rebound a buffer, and
        NonFiniteError naming a parameter, optimizer state or buffer that was bad before.
        """
        if not self._enabled or "closure" in kwargs or self._stage(optimizer) is OptState.STEPPED:
            return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        self._warn_once()
        try:
            if not (args or kwargs) and (self._taken_quickly(optimizer) or self._put_in_queue(optimizer)):
                return None
            check_settings(optimizer, _OWNER)
            if _scales_itself(optimizer):
                if self._stage(optimizer) is OptState.READY:
                    self._check_inf_per_device(optimizer)  # where the step is skipped before torch does
                return self._attempt(optimizer, partial(super().step, optimizer, *args, **kwargs))
            # Ours skips bad steps by itself, and what would come of one is to be seen.
            update = getattr(optimizer, "force" if hasattr(optimizer, "guarded_kind") else "step")
            return self._step(optimizer, partial(update, *args, **kwargs), plain=not (args or kwargs))
        except BaseException:
            self._abandon(optimizer)
            raise

    def update(self, new_scale: float | Tensor | None = None) -> None:
        """As torch's, within floor and ceiling; then the policies act. Raises NonFiniteError where they say so.

        new_scale: a float, or a float32 tensor of one element; ArgumentError unless it and its reciprocal are finite.
        """
        if not self._enabled:
            return
        scale, tracker = self._check_scale_growth_tracker("update")
        if new_scale is None and not self._iteration and self._hold is not None:
            return self._update_on_device(scale, tracker, self._hold)
        self._hold = None
        if new_scale is None and not self._iteration and self._on_cpu:
            return self._update_clean(scale, tracker)
        if isinstance(new_scale, float) or _readable(new_scale):
            self._widen(check_scale(f"{_OWNER}.update: new_scale", float(new_scale)))
        before = self.get_scale() if self._known is None else self._known
        skips, self._iteration = self._iteration, []
        # Where no flag is set torch would count a clean step, and might grow.
        hold, self._backs_off = bool(skips) and not self._backs_off, False
        held = (scale.clone(), tracker.clone()) if hold else None
        super().update(new_scale)
        if new_scale is None:
            if held is not None:
                scale.copy_(held[0])
                tracker.copy_(held[1])
            scale.clamp_(self._floor, self._ceiling)
        # On a device the scale is read only where it may have moved.
        if new_scale is None and held is None:
            self._clean_steps = 0 if skips else self._clean_steps + 1
        grown = self._clean_steps >= self._growth_interval
        self._clean_steps *= not grown
        moved = self._on_cpu or bool(skips) or new_scale is not None or grown
        self._known = self.get_scale() if moved else before
        self._changed(before, self._known)
        self._finish(before, skips)

    def _update_on_device(self, scale: Tensor, tracker: Tensor, hold: Tensor) -> None:
        """``update`` after steps whose fate is not known here: nothing is read."""
        before = (scale.clone(), tracker.clone())
        super().update()
        scale.copy_(torch.where(hold, before[0], scale.clamp(self._floor, self._ceiling)))
        tracker.copy_(torch.where(hold, before[1], tracker))
        self._known, self._hold = None, None
        self._finish(math.nan, [])

    def _update_clean(self, scale: Tensor, tracker: Tensor) -> None:
        """``update`` of an iteration without skips whose scale is read for nothing: torch's, in fewer words."""
        flags = [
            flag for state in self._per_optimizer_states.values() for flag in state["found_inf_per_device"].values()
        ]
        if len(flags) != 1:
            flags = [torch.stack([flag.to(scale) for flag in flags]).sum()] if flags else []
        if not flags:
            raise AssertionError("No inf checks were recorded prior to update.")
        before = scale.item()
        rule = (self._growth_factor, self._backoff_factor, self._growth_interval)
        torch._amp_update_scale_(scale, tracker, flags[0].to(scale), *rule)
        self._per_optimizer_states = defaultdict(_refresh_per_optimizer_state)
        after = scale.item()
        if not self._floor <= after <= self._ceiling:
            after = scale.clamp_(self._floor, self._ceiling).item()
        self._known, self._backs_off = after, False
        self._changed(before, after)
        self._finish(before, [])

    # What is behind them.

    def _abandon(self, optimizer: torch.optim.Optimizer) -> None:
        """After an error: buffers go back, and the next iteration begins afresh though nobody called ``update``."""
        if self._gate is not None and self._gate.open:
            self._gate.buffers.restore()
            self._gate.close()
        self._losses.clear()
        self._iteration, self._backs_off = [], False
        self._per_optimizer_states.pop(id(optimizer), None)

    def _finish(self, scale: float, skips: list[SkipRecord]) -> None:
        step, self.steps = self.steps, self.steps + 1
        record = skips[0] if skips else None
        if self.history is not None:
            bits = headroom.least(self.headroom) if self._on_cpu else None
            self.history.add(step, self._losses.last(), self._norm, scale, record, bits)
        self._losses.clear()
        if self._gate is not None:
            self._gate.close()
        self._skipped += bool(skips)
        self._follower.follow(self.steps, record)

    def _warn_once(self) -> None:
        if self._gate is None and not self._warned:
            self._warned = True
            warnings.warn(
                f"{_OWNER}: buffers, such as BatchNorm's statistics, are not protected; give model=",
                UserWarning,
                stacklevel=3,
            )

    def _widen(self, scale: float) -> None:
        self._floor, self._ceiling = min(self._floor, scale), max(self._ceiling, scale)

    def _changed(self, before: float, after: float) -> None:
        if after != before:
            self.scale_changes.append(ScaleChange(self.steps, before, after, "growth" if after > before else "backoff"))

    # Checkpoints and copies.

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """As torch's; raises ArgumentError for a scale that is not above 0 or whose reciprocal is not finite."""
        if self._enabled and len(state_dict):
            self._widen(check_scale(f"{_OWNER}.load_state_dict: scale", state_dict["scale"]))
        super().load_state_dict(dict(state_dict))
        self._known, self._clean_steps = None, int(state_dict.get("_growth_tracker", 0))

    def __getstate__(self) -> dict[str, Any]:
        state = {**super().__getstate__(), "_records": list(self.records)}
        state.update(_optimizers=None, _gate=None, _names={}, _ranks=None, _unscaled=None, _norm=None, _hold=None)
        state.update(_losses=ScaledLosses())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._optimizers = weakref.WeakKeyDictionary()


def _scales_itself(optimizer: torch.optim.Optimizer) -> bool:
    """An optimizer, not torch's own, that unscales and skips by itself: asked as torch's scaler asks it."""
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or hasattr(optimizer, "guarded_kind"):
        return False
    foreign = not type(optimizer).__module__.startswith("torch.optim")
    # Reading a signature takes as long as a small update; no step of torch's own has the argument.
    replaced = "step" in vars(optimizer)
    return foreign or (replaced and "grad_scaler" in inspect.signature(optimizer.step).parameters)


def _readable(scale: float | Tensor | None) -> TypeGuard[Tensor]:
    """Whether reading this new scale waits for no device."""
    return isinstance(scale, Tensor) and scale.device.type == "cpu" and scale.numel() == 1

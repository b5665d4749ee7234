"""``guard.optim``: torch's optimizers, LARS and LAMB, whose steps Inf and NaN cannot ruin; one native call a step.

On CUDA, with ``MLPKIT_CUDA_KERNELS=all``, a step is two launches (LAMB three) and waits for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import optimizer as _torch

from mlpkit.errors import ArgumentError
from mlpkit.guard.census import Finding
from mlpkit.guard.checks import check_settings
from mlpkit.guard.device import DeviceUpdate, Queued
from mlpkit.guard.record import SkipRecord
from mlpkit.guard.state import parameters_of
from mlpkit.guard.update import DeviceScale, FusedUpdate, Outcome
from mlpkit.ops.guarded_update import Reason

__all__ = ["LAMB", "LARS", "SGD", "Adam", "AdamW", "RMSprop"]


class _Guarded(torch.optim.Optimizer):
    """What the optimizers share: the guarded step, its records, and what is asked of arguments."""

    guarded_kind = ""
    _step_supports_amp_scaling = True

    def _guard(self, l1: float, clip_norm: float | None) -> None:
        """Called before the base class's constructor, which a bad argument must not reach."""
        name = type(self).__name__
        if isinstance(l1, bool) or not isinstance(l1, (int, float)) or not 0 <= l1 < math.inf:
            raise ArgumentError(f"{name}: l1 is {l1!r}; it must be a finite number of at least 0")
        number = isinstance(clip_norm, (int, float)) and not isinstance(clip_norm, bool)
        if clip_norm is not None and not (number and 0 < clip_norm < math.inf):
            raise ArgumentError(f"{name}: clip_norm is {clip_norm!r}; it must be a finite number above 0, or None")
        self.clip_norm = clip_norm

    def _settle(self, l1: float) -> None:
        """Called after it."""
        name = type(self).__name__
        for option in ("differentiable", "capturable"):
            if any(group.get(option) for group in self.param_groups):
                raise ArgumentError(f"{name}: {option}=True is not supported; use torch.optim.{name}")
        self.defaults["l1"] = l1
        for group in self.param_groups:
            group.setdefault("l1", l1)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "clip_norm": self.clip_norm}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("l1", self.defaults.get("l1", 0.0))

    @property
    def records(self) -> list[SkipRecord]:
        """A record of every skipped step, oldest first. On CUDA it syncs, and of the steps skipped since the last look
        the 32 latest have one."""
        records: list[SkipRecord] = self.__dict__.setdefault("_records", [])
        update = self.__dict__.get("_update")
        if isinstance(update, DeviceUpdate):
            records += [self._recorded(*skip) for skip in update.skips()]
        return records

    @property
    def skipped(self) -> int:
        """How many steps were skipped. On CUDA it syncs."""
        records, update = self.records, self.__dict__.get("_update")
        return len(records) + (update.unnamed if isinstance(update, DeviceUpdate) else 0)

    @property
    def grad_norm(self) -> float | None:
        """The global norm of the last step's gradients, unscaled, before clipping; None before the first."""
        outcome: Outcome | Queued | None = self.__dict__.get("_outcome")
        return outcome.norm if outcome else None

    def step(self, closure: Callable[[], Any] | None = None, *, scale: DeviceScale | None = None) -> Any:
        """Take one step, or skip it whole where Inf or NaN is in a gradient or would be in a parameter or its state.

        On CUDA the device decides and nothing is read; state begins as zeros though the first step be skipped.

        closure: evaluates the loss anew, as in torch; its value is returned. scale: what the loss was multiplied by;
        gradients are divided by it, and it moves by its rule. ``grad_scale`` and ``found_inf`` attributes are honoured
        as torch's fused optimizers honour them; with either, hooks see gradients still scaled, as with those. Raises
        ArgumentError naming a setting that is Inf or NaN.
        """
        hooks = (
            self._optimizer_step_pre_hooks,
            self._optimizer_step_post_hooks,
            _torch._global_optimizer_pre_hooks,
            _torch._global_optimizer_post_hooks,
        )
        # torch calls the hooks around a subclass's step, which came here.
        if any(hooks) and not self.steps_itself():
            given = () if closure is None else (closure,)
            named: dict[str, Any] = {} if scale is None else {"scale": scale}
            return torch.optim.Optimizer.profile_hook_step(type(self)._take)(self, *given, **named)
        return self._take(closure, scale)

    # Said to torch.optim.Optimizer, whose wrapper would open a profiler range: hooks are called above.
    step.hooked = True  # type: ignore[attr-defined]

    def _take(self, closure: Callable[[], Any] | None = None, scale: DeviceScale | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        state = self.__dict__
        force = state.get("_forced", False)
        on_device = _decided_on_device(self)
        make = DeviceUpdate if on_device else FusedUpdate
        # What is forced may be taken back, state and all: it begins and ends with itself.
        update: FusedUpdate | None = make(self) if force else state.get("_update")
        if update is None or isinstance(update, DeviceUpdate) != on_device:
            update = state["_update"] = make(self)
        clip_norm = math.inf if self.clip_norm is None else self.clip_norm
        fixed, found = state.get("grad_scale"), None if force else state.get("found_inf")
        if isinstance(update, DeviceUpdate):
            check_settings(self, type(self).__name__)
            state["_outcome"] = update.queue(
                self, clip_norm=clip_norm, scale=scale, grad_scale=fixed, found_inf=found, force=force
            )
            if not force:
                state["_steps"] = state.get("_steps", 0) + 1
            return loss
        outcome = state["_outcome"] = update.step(
            self, clip_norm=clip_norm, scale=scale, grad_scale=fixed, found_inf=found, force=force
        )
        if force:
            return loss
        state["_steps"] = state.get("_steps", 0) + 1
        if not outcome.taken:
            self._skipped(outcome, update, scale)
        return loss

    def force(self, *args: Any, **kwargs: Any) -> Any:
        """``step``, whatever comes out, Inf and NaN too: for those who want to see where they would go.

        By way of ``step``: hooks, a subclass's own ``step`` and a scheduler's wrapper have their part.
        """
        self.__dict__["_forced"] = True
        try:
            value = self.step(*args, **kwargs)
        finally:
            del self.__dict__["_forced"]
        self._opt_called = True  # what a scheduler looks at
        return value

    def steps_itself(self) -> bool:
        """Whether a subclass has a step of its own, which no native call may stand in for."""
        return type(self).step is not _Guarded.step

    def _skipped(self, outcome: Outcome, update: FusedUpdate, scale: DeviceScale | None) -> None:
        if outcome.reason == Reason.SETTING:
            check_settings(self, type(self).__name__)
            raise ArgumentError(f"{type(self).__name__}: a setting of a parameter group is Inf or NaN")
        used = scale.value if scale is not None else self.__dict__.get("grad_scale")
        row = update.census()[outcome.row] if outcome.row >= 0 else (0, 0, -1, 0.0, 0.0)
        parameter = parameters_of(self)[outcome.row] if outcome.row >= 0 else None
        number = self.__dict__["_steps"] - 1
        self.records.append(self._recorded(number, outcome, row, parameter, 1.0 if used is None else float(used)))

    def _recorded(
        self,
        step: int,
        outcome: Outcome,
        row: tuple[int, int, int, float, float],
        parameter: Tensor | None,
        scale: float,
    ) -> SkipRecord:
        """row: the census of the parameter at fault, if one is."""
        tensors = max(outcome.rows, 1)
        where, finding = "norm", Finding("gradient norm", 0, 1, (), tensors)
        note = "The loss scale has no reciprocal." if outcome.reason == Reason.SCALE else ""
        if parameter is not None:
            where = "gradient" if outcome.reason == Reason.GRADIENT else "update"
            nans, infs, first, _, _ = row
            finding = Finding(self._place(parameter), nans, infs, tuple(parameter.shape), tensors, first)
        elif outcome.reason == Reason.GRADIENT:
            where, note = "gradient", "Found where the gradients were unscaled."
            finding = Finding("a parameter", 0, 1, (), tensors)
        saved = sum(len(group["params"]) for group in self.param_groups)
        return SkipRecord.of(finding, step=step, where=where, parameters=saved, scale=scale, note=note)

    def _place(self, parameter: Tensor) -> str:
        for index, group in enumerate(self.param_groups):
            for position, one in enumerate(group["params"]):
                if one is parameter:
                    return f"group {index}, parameter {position} {tuple(parameter.shape)}"
        return f"a parameter {tuple(parameter.shape)}"


def _decided_on_device(optimizer: torch.optim.Optimizer) -> bool:
    return any(parameter.is_cuda for group in optimizer.param_groups for parameter in group["params"][:1])


class SGD(_Guarded, torch.optim.SGD):
    """``torch.optim.SGD`` with guarded steps; l1 adds l1 * sign(p) to the gradient, clip_norm clips the global norm.

    Bitwise torch's fused update on a processor with FMA, but for the last elements of a tensor, which fill no vector
    there: those are within 2 ulp of the largest term.
    foreach and fused are taken and change nothing; ArgumentError for differentiable=True.
    """

    guarded_kind = "sgd"

    def __init__(self, params: Any, *args: Any, l1: float = 0.0, clip_norm: float | None = None, **kw: Any) -> None:
        self._guard(l1, clip_norm)
        torch.optim.SGD.__init__(self, params, *args, **kw)
        self._settle(l1)


class Adam(_Guarded, torch.optim.Adam):
    """``torch.optim.Adam`` with guarded steps; l1 adds l1 * sign(p) to the gradient, clip_norm clips the global norm.

    Bitwise torch's fused update on a processor with FMA, but for the last elements of a tensor, which fill no vector
    there: those are within 2 ulp of the largest term.
    foreach and fused are taken and change nothing; ArgumentError for differentiable=True and capturable=True.
    """

    guarded_kind = "adam"

    def __init__(self, params: Any, *args: Any, l1: float = 0.0, clip_norm: float | None = None, **kw: Any) -> None:
        if kw.get("decoupled_weight_decay"):
            raise ArgumentError("Adam: decoupled_weight_decay=True is AdamW's; use mlpkit.guard.optim.AdamW")
        self._guard(l1, clip_norm)
        torch.optim.Adam.__init__(self, params, *args, **kw)
        self._settle(l1)


class AdamW(_Guarded, torch.optim.AdamW):
    """``torch.optim.AdamW`` with guarded steps; l1 adds l1 * sign(p) to the gradient, clip_norm clips the global norm.

    Bitwise torch's fused update on a processor with FMA, but for the last elements of a tensor, which fill no vector
    there: those are within 2 ulp of the largest term.
    foreach and fused are taken and change nothing; ArgumentError for differentiable=True and capturable=True.
    """

    guarded_kind = "adamw"

    def __init__(self, params: Any, *args: Any, l1: float = 0.0, clip_norm: float | None = None, **kw: Any) -> None:
        self._guard(l1, clip_norm)
        torch.optim.AdamW.__init__(self, params, *args, **kw)
        self._settle(l1)


class RMSprop(_Guarded, torch.optim.RMSprop):
    """``torch.optim.RMSprop`` with guarded steps; l1 adds l1 * sign(p) to the gradient, clip_norm clips their norm.

    Within 8 ulp of the largest term of torch's update; a centred variance that rounding made negative counts as 0,
    where torch makes NaN.
    foreach is taken and changes nothing; ArgumentError for differentiable=True and capturable=True.
    """

    guarded_kind = "rmsprop"

    def __init__(self, params: Any, *args: Any, l1: float = 0.0, clip_norm: float | None = None, **kw: Any) -> None:
        self._guard(l1, clip_norm)
        torch.optim.RMSprop.__init__(self, params, *args, **kw)
        self._settle(l1)


def _checked(name: str, **settings: float) -> None:
    for setting, value in settings.items():
        if not float(value) >= 0:
            raise ArgumentError(f"{name}: {setting} is {value!r}; it must be at least 0")


class LARS(_Guarded):
    """SGD with momentum whose rate in each tensor is lr * trust * |p| / (|g| + weight_decay |p|), lr where one is 0.

    You, Gitman, Ginsburg: "Large batch training of convolutional networks" (2017). State: ``momentum_buffer``. trust:
    the paper's coefficient. lr: a number, or a float32 scalar tensor. l1 and clip_norm as in ``SGD``. Raises
    ArgumentError for a negative or wrong setting.
    """

    guarded_kind = "lars"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        trust: float = 1e-3,
        maximize: bool = False,
        l1: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self._guard(l1, clip_norm)
        _checked("LARS", lr=float(lr), momentum=momentum, dampening=dampening, weight_decay=weight_decay, trust=trust)
        defaults = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, "nesterov": nesterov, "trust": trust, "maximize": maximize})
        self._settle(l1)


class LAMB(_Guarded):
    """Adam whose step in each tensor has the length lr |p|: p -= lr |p| / |r| r, r = m / (sqrt(v) + eps) + wd p.

    You et al.: "Large batch optimization for deep learning: training BERT in 76 minutes" (ICLR 2020), with m and v
    corrected for their bias; the quotient of norms is 1 where one of them is 0. State: ``step``, ``exp_avg``,
    ``exp_avg_sq``. lr: a number, or a float32 scalar tensor. l1 and clip_norm as in ``AdamW``. Raises ArgumentError for
    a negative or wrong setting.
    """

    guarded_kind = "lamb"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        maximize: bool = False,
        l1: float = 0.0,
        clip_norm: float | None = None,
    ) -> None:
        self._guard(l1, clip_norm)
        _checked("LAMB", lr=float(lr), eps=eps, weight_decay=weight_decay)
        for index, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ArgumentError(f"LAMB: betas[{index}] is {beta!r}; it must lie in [0, 1)")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)
        self._settle(l1)

"""All that follows backward by one native call: the parameters and state of a ``torch.optim`` optimizer.

The optimizer's own objects stay the truth: state lies where torch would put it, under torch's names.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError, DtypeError
from mlpkit.guard.modes import watching_functions
from mlpkit.guard.scale import check_scale
from mlpkit.ops.guarded_update import Reason, ScaleRule

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# In 16 bits torch rounds by its loops' choice, and its fused sgd leaves what it read past the end of a tensor.
_AS_TORCH = (torch.float32, torch.float64)
_TORCH: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.RMSprop: "rmsprop",
}


class DeviceScale:
    """A loss scale and its clean steps as tensors, moved by the update that uses them: no read, no sync.

    value: float32, clean_steps: int32, one number each. rule: how it moves. Raises ArgumentError unless init and its
    reciprocal are normal float32 numbers above 0.
    """

    def __init__(
        self,
        init: float = 65536.0,
        rule: ScaleRule = ScaleRule(),  # noqa: B008 - it is frozen
        device: torch.device | str = "cpu",
    ) -> None:
        self.value = torch.full((), check_scale("DeviceScale: init", init), dtype=torch.float32, device=device)
        self.clean_steps = torch.zeros((), dtype=torch.int32, device=device)
        self.rule = rule
        self.numbers = (rule.growth, rule.backoff, rule.interval, rule.floor, rule.ceiling)

    def scale(self, loss: Tensor) -> Tensor:
        """``loss * scale``, in float32 at least: a half-precision loss would overflow. loss: any shape."""
        return (loss.float() if loss.dtype in (torch.float16, torch.bfloat16) else loss) * self.value


class Outcome(NamedTuple):
    """What an update did, by name as in ``mlpkit.ops.guarded_update.Outcome``; ``row`` counts all parameters."""

    taken: bool
    reason: int
    norm: float
    factor: float
    row: int
    rows: int
    unscaled: bool = False  # the gradients themselves, in place


class Row(NamedTuple):
    """A parameter among all of an optimizer, with its group, its state and torch's names of what is in that."""

    parameter: Tensor
    place: int
    group: int
    state: dict[str, Any]
    names: tuple[str | None, ...]
    fresh: bool  # whether its momentum buffer is empty


_NOTHING = Outcome(True, int(Reason.TAKEN), 0.0, 1.0, -1, 0)


def why_not(optimizer: Any) -> str | None:
    """Why a TrainStep does not update here; None where it does."""
    ours = hasattr(optimizer, "guarded_kind")
    if not ours and type(optimizer) not in _TORCH:
        return f"{type(optimizer).__name__} is neither mlpkit.guard.optim's nor torch.optim's SGD, Adam(W) or RMSprop"
    if ours and optimizer.steps_itself():
        return "the optimizer's class has a step of its own"
    if _replaced(optimizer):
        return "the optimizer's step was replaced"
    for group in optimizer.param_groups:
        if group.get("differentiable") or group.get("capturable"):
            return "the optimizer is differentiable or capturable"
        for parameter in group["params"]:
            if parameter.device.type != "cpu" or parameter.dtype not in _DTYPES or type(parameter.data) is not Tensor:
                return "a parameter is not an ordinary real tensor on the CPU"
            gradient = parameter.grad
            if gradient is not None and (gradient.layout != torch.strided or type(gradient) is not Tensor):
                return "a gradient is not an ordinary dense tensor"
    return None if ours else _why_not_torch(optimizer)


def _replaced(optimizer: Any) -> bool:
    own = vars(optimizer).get("step")
    return own is not None and not getattr(own, "_wrapped_by_lr_sched", False)


def _why_not_torch(optimizer: Any) -> str | None:
    for group in optimizer.param_groups:
        if group.get("centered"):
            return "a centred variance may be negative"
        if type(optimizer) is torch.optim.Adam and group.get("decoupled_weight_decay"):
            return "Adam with decoupled weight decay is AdamW"
    for group in optimizer.param_groups:
        dtypes = {parameter.dtype for parameter in group["params"]}
        if not dtypes <= set(_AS_TORCH) or (group.get("fused") and len(dtypes) > 1):
            return "a parameter is neither float32 nor float64, or a fused group has parameters of both"
    return None


def as_torch_now(optimizer: Any) -> bool:
    """Whether nothing of this moment asks that a step be made by torch's own optimizer in person."""
    if torch._C._len_torch_function_stack() and watching_functions():
        return False
    return bool(_C.as_torch_now(vars(optimizer), optimizer.param_groups))


class FusedUpdate:
    """Guarded updates of one optimizer: census of all gradients, decision, then unscale, clip and update in one pass.

    A step that is not taken leaves parameters, state and step counts bit for bit as they were; state that the step
    would have created is not there.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        # No reference to the optimizer is kept: it holds this object.
        own = getattr(optimizer, "guarded_kind", None)
        self.kind: str = own or _TORCH[type(optimizer)]
        self.torch = own is None  # every bit is then that of torch's own step
        self.prepared = False  # whether the next step can go on where the last one ended
        self._native = self._new()

    def _new(self) -> Any:
        return _C.HostUpdate(self.kind)

    def __getstate__(self) -> dict[str, Any]:
        """A copy is of another optimizer, and looks at it anew."""
        return {**self.__dict__, "_native": None, "prepared": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._native = self._new()

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = math.inf,
        scale: DeviceScale | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        force: bool = False,
        unscale: bool = False,
    ) -> Outcome:
        """Update, or don't. grad_scale: a fixed scale in place of ``scale``; found_inf: not 0 forbids the step.

        unscale: the gradients are unscaled in place, whatever becomes of the step.
        """
        value, clean, rule = grad_scale, None, None
        if scale is not None:
            value, clean, rule = scale.value, scale.clean_steps, scale.numbers
        created: list[tuple[Tensor, list[str]]] = []
        outcome = self._made(
            optimizer, created, clip_norm, _as_tensor(value), clean, _as_tensor(found_inf), rule, force, unscale
        )
        if outcome is None:
            return _NOTHING
        if created and not outcome[0]:
            _forget(optimizer, created)
            self.prepared = False
        return Outcome(*outcome)

    def _made(
        self, optimizer: torch.optim.Optimizer, created: list[tuple[Tensor, list[str]]], *options: Any
    ) -> tuple[Any, ...] | None:
        """What the native call says of the step; None where there is nothing to update."""
        outcome: tuple[Any, ...] | None = None
        try:
            if self.prepared:
                outcome = self._call(optimizer, *options)
            if outcome is None:
                if not self._prepare(optimizer, created):
                    return None
                self.prepared = True
                outcome = self._call(optimizer, *options)
            if outcome is None:
                raise ArgumentError(
                    f"{type(optimizer).__name__}: parameters, gradients or state changed while the step was being made"
                )
        except BaseException:
            _forget(optimizer, created)
            self.prepared = False
            raise
        return outcome

    def census(self) -> list[tuple[int, int, int, float, float]]:
        """NaN, Inf, first of them, absmax and sum of squares of each parameter's gradient, as the last step saw them;
        empty where that was taken.
        """
        found: list[tuple[int, int, int, float, float]] = self._native.census()
        return found

    def absmax(self) -> Tensor:
        """Of each parameter's gradient in the last step as it came, 1-dim: Inf where bad, NaN where there was none."""
        values: Tensor = self._native.absmax()
        return values

    def bytes(self) -> int:
        """What is kept between steps, beside the last ``absmax``."""
        return int(self._native.bytes())

    def _call(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> Any:
        return self._native.step(optimizer.param_groups, optimizer.state, *arguments, self.torch)

    def _prepare(self, optimizer: torch.optim.Optimizer, created: list[tuple[Tensor, list[str]]]) -> bool:
        """Make the state that is not there yet; whether there is anything to update. ``created`` gets what was made."""
        rows = list(self._rows(optimizer, created))
        self._native.prepared([row.place for row in rows if row.fresh])
        return bool(rows)

    def _rows(self, optimizer: torch.optim.Optimizer, created: list[tuple[Tensor, list[str]]]) -> Iterator[Row]:
        """Of all parameters that have a gradient or state, which is made where it is missing."""
        place = -1
        for index, group in enumerate(optimizer.param_groups):
            if self.kind == "adam" and group.get("decoupled_weight_decay"):
                raise ArgumentError(
                    f"{type(optimizer).__name__}: group {index} has decoupled_weight_decay=True; that is AdamW"
                )
            names = _names(self.kind, group)
            for position, parameter in enumerate(group["params"]):
                place += 1
                known = parameter in optimizer.state and len(optimizer.state[parameter]) > 0
                if parameter.grad is None and not known:
                    continue
                _check(optimizer, index, position, parameter)
                # torch's SGD without momentum keeps no entry at all.
                state = optimizer.state[parameter] if any(names) or not self.torch else {}
                made = _fill(self.kind, group, parameter, state, names)
                if made:
                    created.append((parameter, made))
                for name in filter(None, names):
                    if not isinstance(state[name], Tensor):
                        raise DtypeError(
                            f"{type(optimizer).__name__}: {name} of the state is {state[name]!r}; it must be a tensor"
                        )
                fresh = names[0] in made and self.kind in ("sgd", "lars")
                yield Row(
                    parameter, place, index, state, tuple(name if name in state else None for name in names), fresh
                )


def _as_tensor(number: Tensor | float | None) -> Tensor | None:
    """torch's scaler sets ``found_inf`` to the sum of no tensors, the int 0, where there are no gradients."""
    return number if number is None or isinstance(number, Tensor) else torch.tensor(float(number))


def _names(kind: str, group: dict[str, Any]) -> tuple[str | None, ...]:
    """torch's names of first, second, third and step in the state of a group's parameters."""
    if kind in ("sgd", "lars"):
        return ("momentum_buffer" if group["momentum"] != 0 else None, None, None, None)
    if kind == "rmsprop":
        first = "momentum_buffer" if group["momentum"] > 0 else None
        return (first, "square_avg", "grad_avg" if group["centered"] else None, "step")
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq" if group.get("amsgrad") else None, "step")


def _fill(
    kind: str, group: dict[str, Any], parameter: Tensor, state: dict[str, Any], names: tuple[str | None, ...]
) -> list[str]:
    """Make what is missing as torch makes it; the names of it."""
    made = []
    # torch's order: the step count comes first.
    for name in (names[3], *names[:3]):
        if name == "step" and isinstance(state.get(name), (int, float)):
            state[name] = torch.tensor(float(state[name]))
        if name == "step" and isinstance(state.get(name), Tensor) and state[name].device != parameter.device:
            state[name] = state[name].to(parameter.device)  # where the step is decided
        if name is None or state.get(name) is not None:
            continue
        if name == "step":
            wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
            state[name] = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device=parameter.device)
        else:
            state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format, requires_grad=False)
        made.append(name)
    for name in filter(None, names[:3]):
        # Loaded, or made before the parameter went to another memory format: numbers are paired as they lie in memory.
        value = state[name]
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
            state[name] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return made


def _forget(optimizer: torch.optim.Optimizer, created: list[tuple[Tensor, list[str]]]) -> None:
    for parameter, names in created:
        state = optimizer.state[parameter]
        for name in names:
            del state[name]
        if not state:
            del optimizer.state[parameter]


def _check(optimizer: torch.optim.Optimizer, index: int, position: int, parameter: Tensor) -> None:
    what = f"{type(optimizer).__name__}: parameter {position} of group {index}, shape {tuple(parameter.shape)},"
    if parameter.device.type not in ("cpu", "cuda"):
        raise ArgumentError(f"{what} is on {parameter.device}; this optimizer has kernels for the CPU and CUDA")
    if parameter.dtype not in _DTYPES:
        raise DtypeError(f"{what} is {parameter.dtype}; it must be float64, float32, bfloat16 or float16")
    gradient = parameter.grad
    if gradient is not None and gradient.layout != torch.strided:
        raise ArgumentError(f"{what} has a {gradient.layout} gradient; it must be dense")

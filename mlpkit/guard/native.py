"""The native way of a guarded step: forward, loss, backward, inspection and update of an MLP in one call.

It takes a step only when it can vouch for all of it; otherwise nothing has changed, the random state is put back, and
the general way decides, names the culprit, or takes the step after all. Whoever watches operations or modules, such as
a tracer, is shown the forward and backward of the general way first; the native call takes the step all the same, so
that watching changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from mlpkit._ext import _C
from mlpkit.guard import bounds
from mlpkit.nn import MLP
from mlpkit.nn._whole import Whole, globally_hooked, whole

LOSSES = ("cross_entropy", "bce", "mse", "l1", "huber")
_NAMES: dict[type, str] = {
    torch.optim.SGD: "sgd",
    torch.optim.Adam: "adam",
    torch.optim.AdamW: "adamw",
    torch.optim.RMSprop: "rmsprop",
}
_STATE = {
    "sgd": ("momentum_buffer", None),
    "adam": ("exp_avg", "exp_avg_sq"),
    "adamw": ("exp_avg", "exp_avg_sq"),
    "rmsprop": (None, "square_avg"),
}
_UNUSUAL = ("amsgrad", "maximize", "centered", "differentiable", "capturable")


class Outcome(NamedTuple):
    """Of a step that was taken: the mean loss, and the norm of the gradients before clipping."""

    loss: float
    norm: float


class NativeStep:
    """Tries the native way; ``why_not`` says why the last step (or all of them) went the general way."""

    def __init__(
        self, model: nn.Module, loss: object, optimizer: torch.optim.Optimizer, precision: str, accumulate: int
    ) -> None:
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.never = _never(model, loss, optimizer, precision, accumulate)
        self.why_not: str | None = self.never or "no step was taken yet"
        self._known: list[Entry] = []
        self._shape: list[tuple[int, bool]] = []

    def attempt(
        self, inputs: Any, target: Any, clip_norm: float | None, show: Callable[[Any, Any], None]
    ) -> Outcome | None:
        """Take the step, or change nothing and return None; ``show(inputs, target)`` runs it for whoever watches."""
        if self.never:
            return None
        assert isinstance(self.model, MLP)
        network = whole(self.model.layers)
        self.why_not = _not_now(self.model, network, self.optimizer, inputs, target, self.loss)
        if self.why_not or network is None:
            return None
        if not self._known_still(network):
            found = _entries(network, self.optimizer)
            if isinstance(found, str):
                self.why_not = found
                return None
            self._known, self._shape = found, _shape(self.optimizer)
        if any(entry.parameter._backward_hooks or _accumulate_hooks(entry.parameter) for entry in self._known):
            self.why_not = "a parameter has a gradient hook"
            return None
        random = torch.get_rng_state()
        if globally_hooked() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            show(inputs, target)
            torch.set_rng_state(random)
        with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
            taken, loss, norm = self._call(network, inputs, target, clip_norm)
        if not taken:
            torch.set_rng_state(random)
            self.why_not = "something was not finite, too large to vouch for, or out of range"
            return None
        return Outcome(loss, norm)

    def _known_still(self, network: Whole) -> bool:
        return self._shape == _shape(self.optimizer) and _still(self._known, network, self.optimizer)

    def _call(
        self, network: Whole, inputs: Tensor, target: Tensor, clip_norm: float | None
    ) -> tuple[bool, float, float]:
        seed = None
        if any(network.p):
            seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64)
        return _C.mlp_step(  # type: ignore[no-any-return]
            inputs,
            target,
            network.weights,
            network.biases,
            seed,
            network.activation,
            network.slope if isinstance(network.slope, float) else 0.0,
            network.p,
            str(self.loss),
            clip_norm or 0.0,
            _NAMES[type(self.optimizer)],
            [entry.group for entry in self._known],
            [entry.first for entry in self._known],
            [entry.second for entry in self._known],
            [entry.step for entry in self._known],
            [_settings(group) for group in self.optimizer.param_groups],
        )


def _never(
    model: nn.Module, loss: object, optimizer: torch.optim.Optimizer, precision: str, accumulate: int
) -> str | None:
    """Why no step of these parts can go the native way; None if some can."""
    if type(model) is not MLP or model.norm is not None:
        return "the model is not an nn.MLP without a norm"
    if loss not in LOSSES:
        return f"the loss is not one of {', '.join(LOSSES)}"
    if type(optimizer) not in _NAMES:
        return f"the optimizer is {type(optimizer).__name__}"
    if precision != "fp32" or accumulate != 1:
        return "precision is not fp32" if precision != "fp32" else "gradients are accumulated"
    if any(parameter.dtype != torch.float32 or parameter.device.type != "cpu" for parameter in model.parameters()):
        return "a parameter is not float32 on the CPU"
    return None


def _not_now(
    model: MLP, network: Whole | None, optimizer: torch.optim.Optimizer, inputs: Any, target: Any, loss: object
) -> str | None:
    """Why this step cannot go the native way; None if it can."""
    if network is None or _changed(model):
        return "a hook, a replaced layer or autocast changes the model"
    if network.activation == "prelu":
        return "prelu's slope is trained the general way"
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return "inputs or target are not tensors"
    for tensor in (inputs, target):
        if tensor.device.type != "cpu" or tensor.requires_grad or type(tensor) is not Tensor:
            return "inputs or target are not plain tensors on the CPU"
    rows, outputs = inputs.shape[0] if inputs.dim() else 0, network.weights[-1].shape[0]
    if inputs.dtype != torch.float32 or inputs.dim() != 2 or inputs.shape[1] != network.weights[0].shape[1] or not rows:
        return "the inputs are not float32 rows of in_features"
    wanted = (torch.int64, (rows,)) if loss == "cross_entropy" else (torch.float32, (rows, outputs))
    if (target.dtype, tuple(target.shape)) != wanted:
        return f"the target is not {wanted[0]} of shape {wanted[1]}"
    if not bounds.provable(optimizer) or any(group.get(name) for group in optimizer.param_groups for name in _UNUSUAL):
        return "the optimizer has hooks or settings that the native update does not vouch for"
    return None


def _changed(model: MLP) -> bool:
    hooked = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks
    return bool(hooked or "forward" in vars(model) or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled())


class Entry(NamedTuple):
    """A trained parameter, where its state lies, and the tensors found there."""

    parameter: Tensor
    entries: dict[str, Any]
    group: int
    first: Tensor | None
    second: Tensor | None
    step: Tensor | None


def _entries(network: Whole, optimizer: torch.optim.Optimizer) -> list[Entry] | str:
    """State of every parameter as the native update takes it; a reason where a parameter has none yet or is unusual."""
    kind = _NAMES[type(optimizer)]
    groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found: list[Entry] = []
    for weight, bias in zip(network.weights, network.biases):
        for parameter in (weight,) if bias is None else (weight, bias):
            group = groups.get(id(parameter))
            if group is None or not parameter.requires_grad or not _usable(parameter, parameter):
                return "a parameter is frozen, not contiguous float32 on the CPU, or not the optimizer's"
            if any(entry.parameter is parameter for entry in found):
                return "two layers share a parameter, whose gradients would have to be summed"
            momentum = optimizer.param_groups[group].get("momentum", 0.0)
            if kind == "rmsprop" and momentum:
                return "RMSprop's momentum is updated the general way"
            entries = optimizer.state.get(parameter, {})
            keys = [None if kind == "sgd" and not momentum else key for key in _STATE[kind]]
            first, second = (entries.get(key) for key in keys)
            if any(key and not _usable(state, parameter) for key, state in zip(keys, (first, second))):
                return "the optimizer's state is made by its first step, the general way"
            step = entries.get("step")
            if kind != "sgd" and not (isinstance(step, Tensor) and step.dtype == torch.float32 and not step.dim()):
                return "the optimizer's step count is not a float32 tensor"
            found.append(Entry(parameter, entries, group, first, second, step))
    return found


def _still(found: list[Entry], network: Whole, optimizer: torch.optim.Optimizer) -> bool:
    """Whether what was found the last time is still all there: the tensors themselves, in the same places."""
    first_key, second_key = _STATE[_NAMES[type(optimizer)]]
    state, position = optimizer.state, 0
    for weight, bias in zip(network.weights, network.biases):
        for parameter in (weight,) if bias is None else (weight, bias):
            if position == len(found):
                return False
            known, entries = found[position], state.get(parameter)
            position += 1
            if known.parameter is not parameter or known.entries is not entries or not parameter.requires_grad:
                return False
            if not _usable(parameter, parameter):  # `.data` may hold another memory than the last time
                return False
            if known.first is not None and entries.get(first_key or "") is not known.first:
                return False
            if known.second is not None and entries.get(second_key or "") is not known.second:
                return False
            if known.step is not None and entries.get("step") is not known.step:
                return False
    return position == len(found)


def _shape(optimizer: torch.optim.Optimizer) -> list[tuple[int, bool]]:
    """What decides which state an optimizer's parameters have: the sizes of its groups, and who has momentum."""
    return [(len(group["params"]), bool(group.get("momentum", 0.0))) for group in optimizer.param_groups]


def _accumulate_hooks(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _usable(state: Any, parameter: Tensor) -> bool:
    return (
        isinstance(state, Tensor)
        and state.dtype == torch.float32
        and state.shape == parameter.shape
        and state.is_contiguous()
        and state.device.type == "cpu"
    )


def _settings(group: dict[str, Any]) -> list[float]:
    beta1, beta2 = group.get("betas", (0.0, group.get("alpha", 0.0)))
    names = ("lr", "weight_decay", "momentum", "dampening", "nesterov")
    return [*(float(group.get(name, 0.0)) for name in names), float(beta1), float(beta2), float(group.get("eps", 0.0))]

"""The native way of a guarded step: forward, loss, backward, inspection and update of an MLP in one call.

It takes a step only when it can vouch for all of it; otherwise nothing has changed, the random state is put back, and
the general way decides, names the culprit, or takes the step after all. Whoever watches operations or modules, such as
a tracer, is shown the forward and backward of the general way first; the native call takes the step all the same, so
that watching changes no bit of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.optim import optimizer as optimizer_hooks
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode_stack

from mlpkit._ext import _C
from mlpkit.guard import bounds
from mlpkit.guard.losses import LossSpec, describe
from mlpkit.guard.modes import function_modes, watching_functions
from mlpkit.guard.watched import Network, Watched, network_of
from mlpkit.nn import MLP
from mlpkit.nn._whole import globally_hooked

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
_GLOBAL_HOOKS: list[dict[int, Any]] = [
    module_hooks._global_forward_hooks,
    module_hooks._global_forward_pre_hooks,
    module_hooks._global_backward_hooks,
    module_hooks._global_backward_pre_hooks,
    optimizer_hooks._global_optimizer_pre_hooks,
    optimizer_hooks._global_optimizer_post_hooks,
]
_LOSS_SETTINGS = ("reduction", "label_smoothing", "ignore_index", "delta")
_REFUSED = "something was not finite, too large to vouch for, or out of range"

Outcome = tuple[float, float]  # of a step that was taken: the loss, and the norm of the gradients before clipping


class NativeStep:
    """Tries the native way; ``why_not`` says why the last step (or all of them) went the general way."""

    def __init__(
        self, model: nn.Module, loss: object, optimizer: torch.optim.Optimizer, precision: str, accumulate: int
    ) -> None:
        self.model, self.loss, self.optimizer, self.precision = model, loss, optimizer, precision
        self.never = _never(model, loss, optimizer, accumulate)
        self.why_not: str | None = self.never or "no step was taken yet"
        self._step: Any = None  # a _C.MlpStep: sees for itself whether all is still as it was proven to be

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_step": None}  # a copy proves anew

    def again(self, inputs: Any, target: Any, clip_norm: float | None, scale: float) -> Outcome | bool | None:
        """Take the step where all is as it was at the last one; False: refused; None: not the same, so ``attempt``.

        scale: the loss scale; the norm is of gradients without it.
        """
        if self._step is None:
            return None
        outcome: Outcome | bool | None = self._step.take(inputs, target, clip_norm or 0.0, scale)
        if outcome is not None:
            self.why_not = None if outcome else _REFUSED
        return outcome

    def attempt(
        self, inputs: Any, target: Any, clip_norm: float | None, scale: float, show: Callable[[Any, Any], None]
    ) -> Outcome | bool | None:
        """Take the step, or change nothing; ``show(inputs, target)`` runs it for whoever watches."""
        outcome = None if self.never else self._prove_and_take(inputs, target, clip_norm or 0.0, scale, show)
        if outcome is not None:
            self.why_not = None if outcome else _REFUSED
        return outcome

    def _prove_and_take(
        self, inputs: Any, target: Any, clip_norm: float, scale: float, show: Callable[[Any, Any], None]
    ) -> Outcome | bool | None:
        assert isinstance(self.model, MLP)
        self._step = None
        network, spec = network_of(self.model), describe(self.loss)
        self.why_not = _not_now(self.model, network, self.optimizer, inputs, target, spec)
        if self.why_not or network is None or spec is None:
            return None
        entries = _entries(network, self.optimizer)
        if isinstance(entries, str):
            self.why_not = entries
            return None
        self._step = self._native(network, spec, entries)
        if globally_hooked() or torch._C._len_torch_dispatch_stack() or watching_functions():
            random = torch.get_rng_state()
            show(inputs, target)
            torch.set_rng_state(random)
        with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
            outcome: Outcome | bool | None = self._step.take_proven(inputs, target, clip_norm, scale)
        if outcome is None:
            self.why_not = "a gradient hook, or settings that the native step does not vouch for"
        return outcome

    def _native(self, network: Network, spec: LossSpec, entries: list[Entry]) -> Any:
        assert isinstance(self.model, MLP)
        watched = Watched()
        watched.add_model(self.model)
        if isinstance(self.loss, nn.Module):
            watched.add(self.loss, _LOSS_SETTINGS)
        elif isinstance(self.loss, partial):
            watched.entries += [(self.loss.keywords, name) for name in self.loss.keywords]
        return _C.MlpStep(
            layers=[(one.weight, one.bias, one.slope, one.norm) for one in network.layers],
            optimizer=self.optimizer,
            states=entries,
            modules=watched.modules,
            dicts=watched.dicts,
            entries=watched.entries,
            rates=watched.rates,
            hooks=_GLOBAL_HOOKS,
            drawing=None if self.model.blocks else vars(self.model),
            precision=self.precision,
            activation=network.activation,
            negative_slope=network.negative_slope,
            loss=spec.kind,
            mean=spec.reduction == "mean",
            delta=spec.delta,
            label_smoothing=spec.label_smoothing,
            ignore_index=spec.ignore_index,
            class_weights=spec.weight,
            kind=_NAMES[type(self.optimizer)],
        )


def _never(model: nn.Module, loss: object, optimizer: torch.optim.Optimizer, accumulate: int) -> str | None:
    """Why no step of these parts can go the native way; None if some can."""
    if type(model) is not MLP:
        return "the model is not an nn.MLP"
    if describe(loss) is None and not isinstance(loss, nn.Module):
        return "the loss is not a known one"
    if type(optimizer) not in _NAMES:
        return f"the optimizer is {type(optimizer).__name__}"
    if accumulate != 1:
        return "gradients are accumulated"
    if any(parameter.dtype != torch.float32 or parameter.device.type != "cpu" for parameter in model.parameters()):
        return "a parameter is not float32 on the CPU"
    return None


def _not_now(
    model: MLP,
    network: Network | None,
    optimizer: torch.optim.Optimizer,
    inputs: Any,
    target: Any,
    spec: LossSpec | None,
) -> str | None:
    """Why this step cannot go the native way; None if it can."""
    if network is None or _changed(model):
        return "a hook, a replaced layer or autocast changes the model"
    if _strangers():
        return "somebody changes or watches all modules, operations or optimizers"
    if not network.fits():
        return "the model's layers do not fit each other, or are too many"
    if not _nothing_else(model, network, optimizer):
        return "the model has buffers, or the optimizer parameters, of their own"
    if spec is None or not _known(spec):
        return "the loss has hooks, or settings that the native step does not know"
    if not isinstance(inputs, Tensor) or not isinstance(target, Tensor):
        return "inputs or target are not tensors"
    for tensor in (inputs, target):
        if tensor.device.type != "cpu" or tensor.requires_grad or type(tensor) is not Tensor or _unusual(tensor):
            return "inputs or target are not plain tensors on the CPU"
    rows, outputs = inputs.shape[0] if inputs.dim() else 0, network.layers[-1].weight.shape[0]
    if (
        inputs.dtype != torch.float32
        or inputs.dim() != 2
        or inputs.shape[1] != network.layers[0].weight.shape[1]
        or not rows
    ):
        return "the inputs are not float32 rows of in_features"
    if rows == 1 and any(one.norm is not None and one.norm[:4:3] == ("batch", False) for one in network.layers):
        return "batch norm has no deviation over one row"
    if spec.weight is not None and spec.weight.numel() != outputs:
        return "the loss has another number of class weights than the model has outputs"
    wanted = (torch.int64, (rows,)) if spec.kind == "cross_entropy" else (torch.float32, (rows, outputs))
    if (target.dtype, tuple(target.shape)) != wanted:
        return f"the target is not {wanted[0]} of shape {wanted[1]}"
    own_step = vars(optimizer).get("step")
    if own_step is not None and not getattr(own_step, "_wrapped_by_lr_sched", False):
        return "the optimizer has a step of its own"
    if not bounds.provable(optimizer) or any(group.get(name) for group in optimizer.param_groups for name in _UNUSUAL):
        return "the optimizer has hooks or settings that the native update does not vouch for"
    return None


def _strangers() -> bool:
    """Whether hooks or modes are in force that are not a tracer's of this package, which asks for no change."""
    hooks = [hook for every in _GLOBAL_HOOKS for hook in every.values()]
    modes = [type(mode) for mode in (*_get_current_dispatch_mode_stack(), *function_modes())]
    modules = (getattr(one, "__module__", None) or "" for one in (*hooks, *modes) if one is not DeviceContext)
    return any(not module.startswith("mlpkit.") for module in modules)


def _nothing_else(model: MLP, network: Network, optimizer: torch.optim.Optimizer) -> bool:
    """Whether the general way would look at nothing but the network: no other buffer, no other parameter."""
    known = {id(tensor) for tensor in (*network.parameters(), *network.buffers())}
    held = (*model.buffers(), *(parameter for group in optimizer.param_groups for parameter in group["params"]))
    return all(id(tensor) in known for tensor in held)


def _known(spec: LossSpec) -> bool:
    if spec.pos_weight is not None or not spec.delta > 0 or not 0 <= spec.label_smoothing <= 1:
        return False
    return spec.weight is None or _weights_classes(spec)


def _weights_classes(spec: LossSpec) -> bool:
    weight = spec.weight
    plain = weight is not None and _usable(weight, weight) and weight.dim() == 1 and not weight.requires_grad
    return spec.kind == "cross_entropy" and plain


def _unusual(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_neg() or tensor._is_zerotensor()


def _changed(model: MLP) -> bool:
    if type(model) is not MLP:
        return True
    hooked = model._forward_hooks or model._forward_pre_hooks or model._backward_hooks or model._backward_pre_hooks
    return bool(hooked or "forward" in vars(model) or torch.is_autocast_enabled("cpu") or not torch.is_grad_enabled())


class Entry(NamedTuple):
    """Where the state of a trained parameter lies: its group, its dictionary, and the keys in it that are used."""

    group: int
    state: dict[str, Any]
    first: str | None
    second: str | None
    step: str | None


def _entries(network: Network, optimizer: torch.optim.Optimizer) -> list[Entry] | str:
    """State of every parameter as the native update takes it; a reason where a parameter has none yet or is unusual."""
    kind = _NAMES[type(optimizer)]
    groups = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
    found: list[Entry] = []
    seen: set[int] = set()
    for parameter in network.parameters():
        group = groups.get(id(parameter))
        if group is None or not parameter.requires_grad or not _usable(parameter, parameter):
            return "a parameter is frozen, not contiguous float32 on the CPU, or not the optimizer's"
        if id(parameter) in seen:
            return "two layers share a parameter, whose gradients would have to be summed"
        seen.add(id(parameter))
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            return "a parameter has a gradient hook"
        momentum = optimizer.param_groups[group].get("momentum", 0.0)
        if kind == "rmsprop" and momentum:
            return "RMSprop's momentum is updated the general way"
        state = optimizer.state.get(parameter, {})
        keys = [None if kind == "sgd" and not momentum else key for key in _STATE[kind]]
        if any(key and not _usable(state.get(key), parameter) for key in keys):
            return "the optimizer's state is made by its first step, the general way"
        step = state.get("step")
        if kind != "sgd" and not (isinstance(step, Tensor) and step.dtype == torch.float32 and not step.dim()):
            return "the optimizer's step count is not a float32 tensor"
        found.append(Entry(group, state, keys[0], keys[1], None if kind == "sgd" else "step"))
    return found


def _usable(state: Any, parameter: Tensor) -> bool:
    return (
        isinstance(state, Tensor)
        and state.dtype == torch.float32
        and state.shape == parameter.shape
        and state.is_contiguous()
        and state.device.type == "cpu"
        and not state.is_inference()
        and not _unusual(state)
    )

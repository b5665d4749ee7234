"""What a guarded step refuses, in one sentence each: the function, what came, what must be."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError, DeviceError, DtypeError
from mlpkit.guard.scale import LossScale, check_scale
from mlpkit.guard.state import parameters_of

PRECISIONS = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_MOST_NAMED = 5
_SETTINGS = ("lr", "weight_decay", "momentum", "dampening", "eps", "alpha", "betas")


def check_options(precision: object, clip_norm: object, accumulate: object) -> None:
    """Raises ArgumentError unless each option is one that ``TrainStep`` knows."""
    if precision not in tuple(PRECISIONS):
        raise ArgumentError(f"TrainStep: precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    number = isinstance(clip_norm, (int, float)) and not isinstance(clip_norm, bool)
    if clip_norm is not None and not (number and 0 < clip_norm < math.inf):  # type: ignore[operator]
        raise ArgumentError(f"TrainStep: clip_norm is {clip_norm!r}; it must be a finite number above 0, or None")
    if isinstance(accumulate, bool) or not isinstance(accumulate, int) or accumulate < 1:
        raise ArgumentError(f"TrainStep: accumulate is {accumulate!r}; it must be an int of at least 1")


def loss_scale(precision: str, init_scale: float | LossScale) -> LossScale | None:
    """The scale for a precision: dynamic for fp16, none otherwise (a wrong number is an error all the same)."""
    if not isinstance(init_scale, LossScale):
        value = check_scale("TrainStep: init_scale", init_scale)
        init_scale = LossScale(value, floor=min(1.0, value), ceiling=max(2.0**24, value))
    return init_scale if precision == "fp16" else None


def check_parts(model: object, optimizer: object, scheduler: object, precision: str) -> torch.device:
    """Raises unless model, optimizer and scheduler fit each other and the precision; returns the model's one device."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"TrainStep: model is {type(model).__name__}; it must be a torch.nn.Module")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"TrainStep: optimizer is {type(optimizer).__name__}; it must be a torch.optim.Optimizer")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ArgumentError(
            "TrainStep: LBFGS wants a closure and evaluates the model itself; such steps cannot be guarded"
        )
    device = check_parameters(model, optimizer, precision)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise ArgumentError("TrainStep: scheduler is ReduceLROnPlateau, which wants a metric; step it yourself")
    if scheduler is not None and not callable(getattr(scheduler, "step", None)):
        raise ArgumentError(f"TrainStep: scheduler is {type(scheduler).__name__}; it must have a step() method")
    if getattr(scheduler, "optimizer", optimizer) is not optimizer:
        raise ArgumentError("TrainStep: the scheduler drives another optimizer than the one given")
    return device


def check_parameters(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> torch.device:
    """Raises unless the optimizer's parameters are the model's, and of a kind that can be trained; their one device."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in names:
                place = f"parameter {position} of group {index}, shape {tuple(parameter.shape)},"
                raise ArgumentError(f"TrainStep: {place} of the optimizer is not a parameter of the model")
    parameters = parameters_of(optimizer)
    if not any(parameter.requires_grad for parameter in parameters):
        raise ArgumentError(
            "TrainStep: none of the optimizer's parameters requires a gradient; there is nothing to train"
        )
    device = parameters[0].device
    for parameter in parameters:
        name = names[id(parameter)]
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ArgumentError(
                f"TrainStep: parameter {name!r} is not initialised; run one forward of the lazy model first"
            )
        if parameter.is_complex():
            raise DtypeError(
                f"TrainStep: parameter {name!r} is {parameter.dtype}; complex parameters are not supported"
            )
        if precision != "fp32" and parameter.dtype in (torch.float16, torch.bfloat16):
            raise DtypeError(
                f"TrainStep: parameter {name!r} is {parameter.dtype}; precision={precision!r} is autocast over float32 "
                "parameters, so leave the model in float32"
            )
        if parameter.device != device:
            raise DeviceError(
                f"TrainStep: parameter {name!r} is on {parameter.device}, others on {device}; one is supported"
            )
    return device


def check_settings(optimizer: torch.optim.Optimizer, owner: str = "TrainStep") -> None:
    """Raises ArgumentError when a learning rate or another setting of a parameter group is Inf or NaN."""
    for index, group in enumerate(optimizer.param_groups):
        for name in _SETTINGS:
            value = group.get(name)
            for number in value if isinstance(value, (tuple, list)) else (value,):
                # A setting on a device would cost a sync here; Inf in it shows in the update, which is checked.
                known = isinstance(number, float) or (isinstance(number, Tensor) and number.device.type == "cpu")
                if known and not math.isfinite(number):
                    raise ArgumentError(f"{owner}: {name} of parameter group {index} is {number}; it must be finite")


def check_loss(loss: Any) -> Tensor:
    """The loss itself; raises ArgumentError unless it is a real scalar tensor that requires a gradient."""
    if not isinstance(loss, Tensor):
        raise ArgumentError(f"TrainStep: the loss is {type(loss).__name__}; it must be a scalar tensor")
    if loss.numel() != 1:
        raise ArgumentError(f"TrainStep: the loss has shape {tuple(loss.shape)}; it must be a scalar, so reduce it")
    if not loss.is_floating_point():
        raise ArgumentError(f"TrainStep: the loss is {loss.dtype}; it must be a real floating number")
    if not loss.requires_grad:
        raise ArgumentError(
            "TrainStep: the loss does not require a gradient; is the model frozen, detached or in no_grad?"
        )
    return loss


def check_gradients(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[str, Tensor]]:
    """The optimizer's parameters' names and gradients; raises ArgumentError when there is none, or a sparse one."""
    parameters = parameters_of(optimizer)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    gradients = [(names[id(one)], one.grad) for one in parameters if one.grad is not None]
    if gradients and all(gradient.layout == torch.strided for _, gradient in gradients):
        return gradients
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.layout != torch.strided:
            name = names[id(parameter)]
            raise ArgumentError(
                f"TrainStep: the gradient of {name!r} is sparse, which cannot be guarded; use sparse=False"
            )
    first = names[id(parameters[0])]
    raise ArgumentError(f"TrainStep: no parameter received a gradient (the first is {first!r}); the loss ignores them")


def warn_of_idle_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Name the optimizer's parameters that a whole step has left without a gradient: they do not learn."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    parameters = [one for one in parameters_of(optimizer) if one.requires_grad]
    idle = [names[id(one)] for one in parameters if one.grad is None]
    if not idle or len(idle) == len(parameters):
        return  # the latter is an error
    shown = ", ".join(repr(name) for name in idle[:_MOST_NAMED]) + (", ..." if len(idle) > _MOST_NAMED else "")
    warnings.warn(
        f"TrainStep: {len(idle)} of {len(parameters)} parameters got no gradient in the first step: {shown}; the loss "
        "does not depend on them, and they stay as they are. Freeze them with requires_grad_(False) if that is meant",
        UserWarning,
        stacklevel=6,
    )

"""An MLP's layers as the arguments of ``functional.mlp``, where calling the layers one by one would do nothing more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules import module as hooks

from mlpkit.nn.layers import FusedLinear


class Whole(NamedTuple):
    """What ``functional.mlp`` takes: one weight and bias a layer; the rest belongs to the hidden layers."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: str
    slope: float | list[Tensor] | None
    p: list[float]


def globally_hooked() -> bool:
    """Whether somebody watches every module of the process."""
    return bool(hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks)


def whole(layers: Iterable[nn.Module]) -> Whole | None:
    """None where a layer is hooked, replaced or parametrised, or differs from its neighbours: those are called."""
    fused: list[FusedLinear] = []
    for layer in layers:
        if type(layer) is not FusedLinear or _hooked(layer):
            return None
        fused.append(layer)
    *hidden, last = fused
    if last.activation != "identity" or last.dropout:
        return None
    activation = hidden[0].activation if hidden else "identity"
    slopes = [layer.slope for layer in hidden]
    if any(layer.activation != activation for layer in hidden):
        return None
    slope: float | list[Tensor] | None = None
    if activation == "prelu":
        slope = [one for one in slopes if isinstance(one, Tensor)]
    elif activation == "leaky_relu":
        if any(one != slopes[0] for one in slopes):
            return None
        slope = slopes[0] if isinstance(slopes[0], float) else None
    weights: list[Tensor] = [layer.weight for layer in fused]
    p = [layer.dropout if layer.training else 0.0 for layer in hidden]
    return Whole(weights, [layer.bias for layer in fused], activation, slope, p)


def _hooked(layer: nn.Module) -> bool:
    hooked = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooked) or "forward" in vars(layer)

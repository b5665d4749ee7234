"""An MLP's layers as the arguments of ``functional.mlp``, where calling the layers one by one would do nothing more."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules import module as hooks

from mlpkit._ext import _C
from mlpkit.nn._block import NormActDropout
from mlpkit.nn._recognise import hooked
from mlpkit.nn.layers import FusedLinear


class Whole(NamedTuple):
    """What ``functional.mlp`` takes: one weight and bias a layer; the rest belongs to the hidden layers."""

    weights: list[Tensor]
    biases: list[Tensor | None]
    activation: str
    slope: float | list[Tensor] | None
    p: list[float]


def globally_hooked() -> bool:
    """Whether somebody watches every module of the process, or modules and operations of this thread."""
    hooked = hooks._global_forward_hooks or hooks._global_forward_pre_hooks or hooks._global_backward_hooks
    # torch.compile cannot look into the extension, and what it compiles is not followed.
    return bool(hooked) or (not is_compiling() and _C.followed())


def whole(layers: Iterable[nn.Module]) -> Whole | None:
    """None where a layer is hooked, replaced or parametrised, or differs from its neighbours: those are called."""
    fused: list[FusedLinear] = []
    for layer in layers:
        if type(layer) is not FusedLinear or hooked(layer):
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


def norms_of(blocks: Iterable[nn.Module]) -> dict[str, Any] | None:
    """The arguments of ``functional.mlp`` that norms add or replace; None where a block must be called."""
    known = []
    rates = []
    for block in blocks:
        parts = None if type(block) is not NormActDropout or hooked(block) else block.parts()
        if parts is None:
            return None
        known.append(parts)
        rates.append(block.rate)
    first = known[0]
    alike = {(one.norm, one.momentum, one.eps, one.frozen, one.activation) for one in known}
    slopes = [one.slope for one in known]
    if len(alike) > 1 or any(one != slopes[0] for one in slopes if isinstance(one, float)):
        return None
    return {
        "norm": first.norm,
        "norm_weights": [one.weight for one in known],
        "norm_biases": [one.bias for one in known],
        "running_means": [one.mean for one in known],
        "running_vars": [one.var for one in known],
        "momentum": first.momentum,
        "eps": first.eps,
        "frozen": first.frozen,
        "activation": first.activation,
        "slope": slopes if isinstance(slopes[0], Tensor) else slopes[0],
        "p": rates,
    }

"""``mlp``: a whole network in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from mlpkit.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from mlpkit.functional import _transforms
from mlpkit.functional._checks import DEFAULT_NEGATIVE_SLOPE, drawn_seed, probability
from mlpkit.functional._linear_act_dropout import check
from mlpkit.functional._norms import Norms
from mlpkit.ops import mlp as _mlp

NAME = "mlp"


def mlp(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    activation: str = "relu",
    slope: float | Tensor | Sequence[Tensor] | None = None,
    p: float | Sequence[float] = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    norm: str | None = None,
    norm_weights: Sequence[Tensor | None] | None = None,
    norm_biases: Sequence[Tensor | None] | None = None,
    running_means: Sequence[Tensor | None] | None = None,
    running_vars: Sequence[Tensor | None] | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    frozen: bool = False,
) -> Tensor:
    """Same as ``linear_act_dropout`` layer after layer and a linear last layer, as one autograd node each way.

    x: (..., in_features); weights: one (out_features, in_features) a layer, each taking what the one before gives;
    biases: one or none a layer; returns (..., out_features of the last). activation, slope and p belong to the hidden
    layers: slope a float (leaky_relu), or prelu's tensor, one for all or one a hidden layer; p a number or one a hidden
    layer. One seed serves the network, layer i drawing its mask from stream i.

    norm: ``"batch"`` or ``"layer"`` makes a hidden layer linear and then ``norm_act_dropout``, whose arguments
    norm_weights, norm_biases, running_means and running_vars are: lists of one (out_features,) or None a hidden layer;
    momentum, eps and frozen are for all.

    Values, gradients and masks are bit for bit those of the layers called one by one. Errors as theirs, plus
    ArgumentError for counts that do not fit. Differentiable once; under ``torch.func`` transforms as
    ``linear_act_dropout`` is.
    """
    hidden = len(weights) - 1
    probabilities: list[float] = list(p) if isinstance(p, Sequence) else [p] * hidden
    given: list[Tensor | None] = list(biases) if biases is not None else [None] * len(weights)
    slopes = _slopes(slope, hidden)
    _check_counts(hidden, given, slopes, probabilities)
    if not training:
        probabilities = [0.0] * hidden
    negative_slope = float(slope) if isinstance(slope, (int, float)) else DEFAULT_NEGATIVE_SLOPE
    norms = None
    if norm is not None:
        used = frozen or not training
        norms = Norms.of(hidden, norm, norm_weights, norm_biases, running_means, running_vars, momentum, eps, used)

    def refuse() -> None:
        _check_layers(x, weights, given, slopes, slope, activation, norms, seed)

    # Only leaky_relu reads a float, which the native checks cannot see.
    if slope is not None and activation not in ("leaky_relu", "prelu"):
        refuse()
    try:
        drawn = drawn_seed(NAME, seed, x) if any(value > 0.0 for value in probabilities) else None
        if _transforms.transformed():
            refuse()
            return _by_layers(x, weights, given, slopes, drawn, activation, negative_slope, probabilities, norms)
        if norms and hidden:
            return norms.run(x, list(weights), given, slopes, drawn, activation, negative_slope, probabilities)
        call = _mlp.dispatched if torch.compiler.is_compiling() else _mlp.eager
        result: Tensor = call(
            x, list(weights), given, [*slopes, None], drawn, activation, negative_slope, probabilities
        )
    except Exception:
        refuse()
        raise
    return result


def _by_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    seed: Tensor | None,
    activation: str,
    negative_slope: float,
    p: Sequence[float],
    norms: Norms | None,
) -> Tensor:
    """The network by PyTorch's own ops, for transforms."""
    for layer, slope in enumerate(slopes):
        z = linear(x, weights[layer], biases[layer])
        u = z if norms is None else norms.transformed(layer, z)
        given = slope if activation == "prelu" else negative_slope
        x = _transforms.act_dropout(u, activation, given, p[layer], seed, layer)
    return linear(x, weights[-1], biases[-1])


def _slopes(slope: float | Tensor | Sequence[Tensor] | None, hidden: int) -> list[Tensor | None]:
    if isinstance(slope, Tensor):
        return [slope] * hidden
    return [None] * hidden if slope is None or isinstance(slope, (int, float)) else list(slope)


def _check_counts(
    hidden: int, biases: Sequence[Tensor | None], slopes: Sequence[Tensor | None], probabilities: Sequence[float]
) -> None:
    if hidden < 0:
        raise ArgumentError("mlp: weights is empty; it must hold one weight for each layer")
    if len(biases) != hidden + 1:
        raise ArgumentError(f"mlp: biases has {len(biases)} entries; it must have one for each of {hidden + 1} weights")
    for name, values in (("slope", slopes), ("p", probabilities)):
        if len(values) != hidden:
            raise ArgumentError(
                f"mlp: {name} has {len(values)} entries; it must have one for each of {hidden} hidden layers"
            )
    for value in probabilities:
        if not probability(value):
            raise ArgumentError(f"mlp: p is {value!r}; it must be a number in [0, 1]")


def _check_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    slope: float | Tensor | Sequence[Tensor] | None,
    activation: str,
    norms: Norms | None,
    seed: int | Tensor | None,
) -> None:
    """Raise what the first layer that does not fit would raise, saying which layer it is."""
    given, rows = x, math.prod(x.shape[:-1])
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = layer < len(slopes)
        own = slopes[layer] if hidden else None
        wanted = own if own is not None or not isinstance(slope, (int, float)) or not hidden else slope
        fused = hidden and norms is None
        try:
            check(given, weight, bias, activation if fused else "identity", wanted if fused else None, 0.0, seed, layer)
            given = x.new_empty(min(rows, 2), weight.shape[0])
            if norms and hidden:
                norms.check(layer, given, activation, wanted)
        except (ArgumentError, DeviceError, DtypeError, ShapeError) as error:
            raise type(error)(f"mlp: layer {layer}: {error}") from None

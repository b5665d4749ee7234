"""Functions on tensors: what users call. Each opens with its stock PyTorch equivalent."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mlpkit.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from mlpkit.ops import mlp as _mlp
from mlpkit.ops.linear_act_dropout import ACTIVATIONS, dispatched, eager

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
DEFAULT_NEGATIVE_SLOPE = 0.01


def linear_act_dropout(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "relu",
    slope: float | Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Same as ``dropout(act(linear(x, weight, bias)), p, training)`` in one pass.

    x: (..., in_features); weight: (out_features, in_features); bias: (out_features,); returns (..., out_features).
    All in x's dtype, float64, float32, bfloat16 or float16: summed and activated in float32 (float64 for float64), then
    rounded once. Under autocast the arguments take the context's dtype.

    activation: identity, relu, leaky_relu, prelu, gelu, gelu_tanh, silu, sigmoid or tanh. slope: leaky_relu's float
    (0.01), or prelu's tensor of 1 or out_features elements, which gets its gradient. p: probability to drop an element;
    the survivors are scaled so that the mean is exact (Srivastava et al. 2014, inverted scaling).

    seed: an int, or an int64 tensor (seed, offset) on x's device; drawn with ``torch.randint`` when not given, so that
    ``torch.manual_seed`` repeats a run. stream: tells apart layers that share a seed. The mask depends on seed, offset,
    stream and the element's row and column alone: docs/masks.md.

    Raises ShapeError, DtypeError, DeviceError or ArgumentError, each naming the argument. Differentiable once.
    """
    # The native checks cannot see these two: p is overruled in evaluation, and only leaky_relu reads a float slope.
    if not _probability(p) or not (slope is None or isinstance(slope, Tensor) or _negative_slope(activation, slope)):
        _check(x, weight, bias, activation, slope, p, seed, stream)
    if not training:
        p = 0.0
    slope_tensor = slope if isinstance(slope, Tensor) else None
    negative_slope = slope if isinstance(slope, (int, float)) else DEFAULT_NEGATIVE_SLOPE
    result: Tensor
    if torch.compiler.is_compiling():
        _check(x, weight, bias, activation, slope, p, seed, stream)
        drawn = _seed(seed, x) if p > 0.0 else None
        result = dispatched(x, weight, bias, slope_tensor, drawn, activation, negative_slope, p, stream)
        return result
    try:
        drawn = _seed(seed, x) if p > 0.0 else None
        result = eager(x, weight, bias, slope_tensor, drawn, activation, negative_slope, p, stream)
        return result
    except Exception:
        # The native checks are quick; these name the argument in the user's words.
        _check(x, weight, bias, activation, slope, p, seed, stream)
        raise


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
) -> Tensor:
    """Same as ``linear_act_dropout`` layer after layer and a linear last layer, as one autograd node each way.

    x: (..., in_features); weights: one (out_features, in_features) a layer, each taking what the one before gives;
    biases: one or none a layer; returns (..., out_features of the last). activation, slope and p belong to the hidden
    layers: slope a float (leaky_relu), or prelu's tensor, one for all or one a hidden layer; p a number or one a hidden
    layer. One seed serves the network, layer i drawing its mask from stream i. Values, gradients and masks are bit for
    bit those of the layers called one by one. Errors as ``linear_act_dropout``'s, plus ArgumentError for counts that do
    not fit. Differentiable once.
    """
    hidden = len(weights) - 1
    probabilities: list[float] = list(p) if isinstance(p, Sequence) else [p] * hidden
    given = list(biases) if biases is not None else [None] * len(weights)
    slopes = _slopes(slope, hidden)
    _check_counts(hidden, given, slopes, probabilities)
    if not training:
        probabilities = [0.0] * hidden
    if slope is not None and activation not in ("leaky_relu", "prelu"):
        _check_layers(x, weights, given, slopes, slope, activation, probabilities, seed)
    negative_slope = float(slope) if isinstance(slope, (int, float)) else DEFAULT_NEGATIVE_SLOPE
    call = _mlp.dispatched if torch.compiler.is_compiling() else _mlp.eager
    try:
        drawn = _seed(seed, x) if any(value > 0.0 for value in probabilities) else None
        result: Tensor = call(
            x, list(weights), given, [*slopes, None], drawn, activation, negative_slope, probabilities
        )
    except Exception:
        _check_layers(x, weights, given, slopes, slope, activation, probabilities, seed)
        raise
    return result


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
        if not _probability(value):
            raise ArgumentError(f"mlp: p is {value!r}; it must be a number in [0, 1]")


def _check_layers(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    slopes: Sequence[Tensor | None],
    slope: float | Tensor | Sequence[Tensor] | None,
    activation: str,
    probabilities: Sequence[float],
    seed: int | Tensor | None,
) -> None:
    """Raise what the first layer that does not fit would raise, saying which layer it is."""
    given = x
    for layer, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        hidden = layer < len(slopes)
        own = slopes[layer] if hidden else None
        wanted = own if own is not None or not isinstance(slope, (int, float)) or not hidden else slope
        try:
            _check(given, weight, bias, activation if hidden else "identity", wanted, 0.0, seed, layer)
        except (ArgumentError, DeviceError, DtypeError, ShapeError) as error:
            raise type(error)(f"mlp: layer {layer}: {error}") from None
        given = given.new_empty(1, weight.shape[0])


def _seed(seed: int | Tensor | None, x: Tensor) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
    if isinstance(seed, Tensor):
        return seed
    _check_seed(seed, x)
    # The int64 with the same 64 bits, so that unsigned seeds are welcome too.
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor((signed, 0), dtype=torch.int64, device=x.device)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    slope: float | Tensor | None,
    p: float,
    seed: int | Tensor | None,
    stream: int,
) -> None:
    """Raise the error that names the argument, what it was and what it must be."""
    if activation not in ACTIVATIONS:
        raise ArgumentError(
            f"linear_act_dropout: activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}"
        )
    if not _probability(p):
        raise ArgumentError(f"linear_act_dropout: p is {p!r}; it must be a number in [0, 1]")
    if not 0 <= stream < 2**32:
        raise ArgumentError(f"linear_act_dropout: stream is {stream}; it must lie in [0, 2^32)")
    for name, tensor in (("x", x), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name != "bias"):
            raise ArgumentError(f"linear_act_dropout: {name} is {type(tensor).__name__}; it must be a tensor")
        if isinstance(tensor, Tensor) and tensor.layout != torch.strided:
            raise ArgumentError(f"linear_act_dropout: {name} is {tensor.layout}; it must be strided (dense)")
    _check_shapes(x, weight, bias)
    _check_slope(activation, slope, weight)
    _check_seed(seed, x)
    tensors = {"weight": weight, "bias": bias, "slope": slope if isinstance(slope, Tensor) else None}
    _check_placement(x, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def _probability(p: float) -> bool:
    return isinstance(p, (int, float)) and 0.0 <= p <= 1.0


def _negative_slope(activation: str, slope: float) -> bool:
    return activation == "leaky_relu" and isinstance(slope, (int, float)) and math.isfinite(slope)


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if x.dim() == 0:
        raise ShapeError("linear_act_dropout: x has no dimensions; it must be (..., in_features)")
    if weight.dim() != 2:
        raise ShapeError(
            f"linear_act_dropout: weight has shape {tuple(weight.shape)}; it must be (out_features, in_features)"
        )
    if x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"linear_act_dropout: x has {x.shape[-1]} features, weight {tuple(weight.shape)} wants {weight.shape[1]}"
        )
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ShapeError(f"linear_act_dropout: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},)")


def _check_slope(activation: str, slope: float | Tensor | None, weight: Tensor) -> None:
    if activation == "prelu":
        if not isinstance(slope, Tensor):
            raise ArgumentError(
                f"linear_act_dropout: slope is {slope!r}; prelu wants a tensor of 1 or out_features elements"
            )
        if slope.dim() > 1 or slope.numel() not in (1, weight.shape[0]):
            raise ShapeError(
                f"linear_act_dropout: slope has shape {tuple(slope.shape)}; it must have 1 or {weight.shape[0]} values"
            )
    elif isinstance(slope, Tensor):
        raise ArgumentError(
            f"linear_act_dropout: slope is a tensor; {activation} takes a float or none, prelu a tensor"
        )
    elif slope is not None and activation != "leaky_relu":
        raise ArgumentError(f"linear_act_dropout: slope is {slope!r}; {activation} takes none")
    elif slope is not None and not _negative_slope(activation, slope):
        raise ArgumentError(f"linear_act_dropout: slope is {slope!r}; leaky_relu takes a finite number")


def _check_seed(seed: int | Tensor | None, x: Tensor) -> None:
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or tuple(seed.shape) != (2,):
            raise ArgumentError(
                f"linear_act_dropout: seed is a {seed.dtype} tensor of shape {tuple(seed.shape)}; "
                "it must be int64 of shape (2,): seed and offset"
            )
        if seed.device != x.device:
            raise DeviceError(f"linear_act_dropout: seed is on {seed.device}; it must be on x's {x.device}")
    elif seed is not None and not (isinstance(seed, int) and -(2**63) <= seed < 2**64):
        raise ArgumentError(f"linear_act_dropout: seed is {seed!r}; it must be an int of 64 bits or an int64 tensor")


def _check_placement(x: Tensor, others: dict[str, Tensor]) -> None:
    if x.dtype not in _DTYPES:
        raise DtypeError(f"linear_act_dropout: x is {x.dtype}; it must be float64, float32, bfloat16 or float16")
    for name, tensor in others.items():
        if tensor.device != x.device:
            raise DeviceError(f"linear_act_dropout: {name} is on {tensor.device}; it must be on x's {x.device}")
        if tensor.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise DtypeError(f"linear_act_dropout: {name} is {tensor.dtype}; it must be x's {x.dtype}")
    if x.device.type not in ("cpu", "cuda"):
        raise DeviceError(f"linear_act_dropout: x is on {x.device}; mlpkit has kernels for cpu and cuda")

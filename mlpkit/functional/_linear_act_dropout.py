"""``linear_act_dropout``: checks, and the draw of the seed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from mlpkit.errors import ShapeError
from mlpkit.functional import _transforms
from mlpkit.functional._checks import (
    DEFAULT_NEGATIVE_SLOPE,
    check_activation,
    check_dense,
    check_placement,
    check_seed,
    check_slope,
    drawn_seed,
    negative_slope_fits,
    probability,
)
from mlpkit.ops.linear_act_dropout import dispatched, eager

NAME = "linear_act_dropout"


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

    Raises ShapeError, DtypeError, DeviceError or ArgumentError, each naming the argument. Differentiable once; under
    ``torch.func`` transforms (grad, vmap, jvp, ...) PyTorch's own ops take over, with the same masks, more slowly, as
    often as one likes.
    """
    # The native checks cannot see these two: p is overruled in evaluation, and only leaky_relu reads a float slope.
    if not probability(p) or not (slope is None or isinstance(slope, Tensor) or negative_slope_fits(activation, slope)):
        check(x, weight, bias, activation, slope, p, seed, stream)
    if not training:
        p = 0.0
    slope_tensor = slope if isinstance(slope, Tensor) else None
    negative_slope = slope if isinstance(slope, (int, float)) else DEFAULT_NEGATIVE_SLOPE
    result: Tensor
    if _transforms.transformed():
        check(x, weight, bias, activation, slope, p, seed, stream)
        drawn = drawn_seed(NAME, seed, x) if p > 0.0 else None
        return _transforms.act_dropout(linear(x, weight, bias), activation, slope, p, drawn, stream)
    if torch.compiler.is_compiling():
        check(x, weight, bias, activation, slope, p, seed, stream)
        drawn = drawn_seed(NAME, seed, x) if p > 0.0 else None
        result = dispatched(x, weight, bias, slope_tensor, drawn, activation, negative_slope, p, stream)
        return result
    try:
        drawn = drawn_seed(NAME, seed, x) if p > 0.0 else None
        result = eager(x, weight, bias, slope_tensor, drawn, activation, negative_slope, p, stream)
        return result
    except Exception:
        # The native checks are quick; these name the argument in the user's words.
        check(x, weight, bias, activation, slope, p, seed, stream)
        raise


def check(
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
    check_activation(NAME, activation, p, stream)
    check_dense(NAME, {"x": x, "weight": weight, "bias": bias}, needed=("x", "weight"))
    _check_shapes(x, weight, bias)
    check_slope(NAME, activation, slope, weight.shape[0])
    check_seed(NAME, seed, x)
    tensors = {"weight": weight, "bias": bias, "slope": slope if isinstance(slope, Tensor) else None}
    check_placement(NAME, "x", x, {name: tensor for name, tensor in tensors.items() if tensor is not None})


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

"""The draws: one function per rule, and ``apply`` for a whole model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError, ShapeError

NORMAL_STD = 0.01


def xavier_uniform(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Same as ``nn.init.xavier_uniform_``: uniform with variance 2 / (fan_in + fan_out). Glorot and Bengio (2010).

    weight: (out, in, ...) of any floating dtype, filled in place and returned; generator: torch's own if None, on the
    weight's device. Raises ShapeError below two dimensions.
    """
    return _uniform(weight, "xavier_uniform", generator)


def xavier_normal(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Same as ``nn.init.xavier_normal_``: normal with variance 2 / (fan_in + fan_out). Glorot and Bengio (2010).

    weight, generator and ShapeError as for ``xavier_uniform``: (out, in, ...), any floating dtype, filled in place.
    """
    return _normal(weight, "xavier_normal", generator)


def he_uniform(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Same as ``nn.init.kaiming_uniform_(nonlinearity="relu")``: variance 2 / fan_in. He et al. (2015).

    weight, generator and ShapeError as for ``xavier_uniform``: (out, in, ...), any floating dtype, filled in place.
    """
    return _uniform(weight, "he_uniform", generator)


def he_normal(weight: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
    """Same as ``nn.init.kaiming_normal_(nonlinearity="relu")``: variance 2 / fan_in. He et al. (2015).

    weight, generator and ShapeError as for ``xavier_uniform``: (out, in, ...), any floating dtype, filled in place.
    """
    return _normal(weight, "he_normal", generator)


def normal(weight: Tensor, std: float = NORMAL_STD, *, generator: torch.Generator | None = None) -> Tensor:
    """Same as ``nn.init.normal_(std=std)``: weight and generator as for ``xavier_uniform``.

    weight: (out, in, ...), any floating dtype, filled in place. Raises ShapeError below two dimensions, ArgumentError
    when std is not a finite number above 0.
    """
    fans(weight)
    with torch.no_grad():
        return weight.normal_(0.0, _std(std), generator=generator)


_DRAWS: dict[str, Callable[..., Tensor]] = {
    "xavier_uniform": xavier_uniform,
    "xavier_normal": xavier_normal,
    "he_uniform": he_uniform,
    "he_normal": he_normal,
    "normal": normal,
}
NAMES = tuple(_DRAWS)


def variance(name: str, fan_in: int, fan_out: int, std: float = NORMAL_STD) -> float:
    """The weight variance that the named draw aims at."""
    if known_name(name).startswith("xavier"):
        return 2 / (fan_in + fan_out)
    return 2 / fan_in if name.startswith("he") else _std(std) ** 2


def apply(
    model: nn.Module, name: str, *, std: float = NORMAL_STD, generator: torch.Generator | None = None
) -> nn.Module:
    """Draw the weights of all linear and convolution layers by name and set their biases to 0; returns the model.

    name: one of ``NAMES``; std: of ``"normal"`` alone; generator: torch's own if None, on the weights' device.
    Raises ArgumentError for an unknown name, or when the model has no such layer.
    """
    settings = {"std": std} if known_name(name) == "normal" else {}
    layers = [module for module in model.modules() if is_layer(module)]
    if not layers:
        raise ArgumentError(f"init.apply: {type(model).__name__} has no linear or convolution layer")
    for layer in layers:
        _DRAWS[name](layer.weight, generator=generator, **settings)
        if isinstance(layer.bias, Tensor):
            nn.init.zeros_(layer.bias)
    return model


def is_layer(module: nn.Module) -> bool:
    """Whether the module is a linear or convolution layer: one whose weight the draws are made for."""
    # By form, not by class: nn.FusedLinear lies above this file and is no nn.Linear.
    linear = hasattr(module, "in_features") and hasattr(module, "out_features")
    weight = getattr(module, "weight", None)
    return (linear or isinstance(module, nn.modules.conv._ConvNd)) and isinstance(weight, Tensor) and weight.dim() > 1


def fans(weight: Tensor) -> tuple[int, int]:
    """(fan_in, fan_out) of a weight (out, in, ...): inputs of one unit, outputs that one input reaches."""
    if weight.dim() < 2:
        raise ShapeError(f"init: the weight has shape {tuple(weight.shape)}; fans want at least (out, in)")
    field_size = math.prod(weight.shape[2:])
    return weight.shape[1] * field_size, weight.shape[0] * field_size


def _uniform(weight: Tensor, name: str, generator: torch.Generator | None) -> Tensor:
    bound = math.sqrt(3 * variance(name, *fans(weight)))  # U(-a, a) has variance a^2 / 3
    with torch.no_grad():
        return weight.uniform_(-bound, bound, generator=generator)


def _normal(weight: Tensor, name: str, generator: torch.Generator | None) -> Tensor:
    with torch.no_grad():
        return weight.normal_(0.0, math.sqrt(variance(name, *fans(weight))), generator=generator)


def known_name(name: str) -> str:
    """The name itself; raises ArgumentError with the list when no draw has it."""
    if name not in NAMES:
        raise ArgumentError(f"init: the name is {name!r}; it must be one of {', '.join(NAMES)}")
    return name


def _std(std: float) -> float:
    if not (math.isfinite(std) and std > 0):
        raise ArgumentError(f"init.normal: std is {std!r}; it must be a finite number above 0")
    return std

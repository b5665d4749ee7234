"""Modules on the fused op: one layer, and a whole multi-layer perceptron. Layer: above functional, below tune."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from mlpkit import functional, init
from mlpkit.errors import ArgumentError

__all__ = ["ACTIVATIONS", "MLP", "FusedLinear"]

_STOCK: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}
ACTIVATIONS = tuple(_STOCK)
_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}
_SLOPE = {"leaky_relu": 0.01, "prelu": 0.25}


class FusedLinear(nn.Module):
    """Same as ``nn.Linear``, an activation and ``nn.Dropout`` in a row, computed in one pass.

    x: (..., in_features); returns (..., out_features), x's dtype. ``state_dict`` has the keys of ``nn.Linear``
    (``weight``, ``bias``), so either loads the other's; ``activation="prelu"`` adds ``slope``. A new layer holds the
    same numbers as a new ``nn.Linear`` under the same ``torch.manual_seed``.

    slope: the negative side of ``leaky_relu`` (a number, 0.01) or the first value of ``prelu``'s learnable slope
    (a number, 0.25, for one shared slope; a tensor of 1 or out_features values).
    Raises ArgumentError for a size below 1, an unknown activation, a dropout outside [0, 1], a slope without a use.
    """

    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str = "relu",
        dropout: float = 0.0,
        slope: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = _size("FusedLinear", "in_features", in_features)
        self.out_features = _size("FusedLinear", "out_features", out_features)
        self.activation = _choice("FusedLinear", "activation", activation, ACTIVATIONS)
        self.dropout = _probability("FusedLinear", "dropout", dropout)
        start = _slope(activation, slope, out_features)
        self.weight = nn.Parameter(torch.empty(out_features, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype)) if bias else None
        self.slope: float | Tensor | None = nn.Parameter(start.to(self.weight)) if isinstance(start, Tensor) else start
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill weight and bias as ``nn.Linear`` does: uniform in +-1/sqrt(in_features), from torch's generator."""
        bound = 1 / math.sqrt(self.in_features)
        with torch.no_grad():
            self.weight.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, stream: int = 0) -> Tensor:
        """Apply the layer; ``seed`` and ``stream`` choose the dropout mask (no seed: drawn by torch's generator)."""
        y: Tensor = functional.linear_act_dropout(
            x,
            self.weight,
            self.bias,
            activation=self.activation,
            slope=self.slope,
            p=self.dropout,
            training=self.training,
            seed=seed,
            stream=stream,
        )
        return y

    def to_sequential(self) -> nn.Sequential:
        """Copy the layer into stock modules: ``nn.Linear``, activation, ``nn.Dropout`` (those that do something)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = _copy(self.weight)
        if self.bias is not None:
            linear.bias = _copy(self.bias)
        parts: list[nn.Module] = [linear]
        if self.activation == "leaky_relu" and isinstance(self.slope, float):
            parts.append(nn.LeakyReLU(self.slope))
        elif isinstance(self.slope, nn.Parameter):
            prelu = nn.PReLU(self.slope.numel(), device="meta")
            prelu.weight = _copy(self.slope)
            parts.append(prelu)
        elif self.activation != "identity":
            parts.append(_STOCK[self.activation]())
        if self.dropout > 0:
            parts.append(nn.Dropout(self.dropout))
        return nn.Sequential(*parts).train(self.training)

    def extra_repr(self) -> str:
        """Name the sizes, and everything that is not the default."""
        text = f"{self.in_features}, {self.out_features}, activation={self.activation}"
        text += f", dropout={self.dropout:g}" if self.dropout else ""
        text += f", slope={self.slope:g}" if isinstance(self.slope, float) else ""
        return text + ("" if self.bias is not None else ", bias=False")


class MLP(nn.Module):
    """A multi-layer perceptron: hidden layers of linear, activation and dropout, and a linear last layer.

    x: (..., in_features); returns (..., out_features), x's dtype. Equivalent to ``to_sequential()``.

    hidden: widths of the hidden layers; () is a linear model. dropout: a number, or one per hidden layer; none after
    the last layer. norm: ``"batch"`` or ``"layer"`` makes a hidden layer linear -> norm -> activation -> dropout, its
    linear without a bias (the norm has one); activation and dropout are then PyTorch's own. init: a name from
    ``mlpkit.init``; biases start at 0. In training one seed is drawn per forward from torch's generator, and hidden
    layer i uses stream i of it, so masks differ between layers and ``torch.manual_seed`` repeats a run.
    Raises ArgumentError naming the argument, what it was and what it must be.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        out_features: int,
        *,
        activation: str = "relu",
        dropout: float | Sequence[float] = 0.0,
        norm: str | None = None,
        init: str = "xavier_uniform",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        widths = _widths(in_features, hidden, out_features)
        _choice("MLP", "activation", activation, ACTIVATIONS)
        if norm is not None:
            _choice("MLP", "norm", norm, tuple(_NORMS), also=", None")
        self.norm = norm
        self.init = init
        rates = _rates(dropout, len(widths) - 2)
        self.layers = nn.ModuleList()
        self.blocks = nn.ModuleList()  # what follows a hidden linear when there is a norm
        for index, (fan_in, fan_out) in enumerate(pairwise(widths)):
            hidden_layer = index < len(rates)
            fused = hidden_layer and norm is None
            self.layers.append(
                FusedLinear(
                    fan_in,
                    fan_out,
                    bias and (norm is None or not hidden_layer),
                    activation=activation if fused else "identity",
                    dropout=rates[index] if fused else 0.0,
                    device=device,
                    dtype=dtype,
                )
            )
            if hidden_layer and norm is not None:
                block = nn.Sequential(_NORMS[norm](fan_out), _STOCK[activation](), nn.Dropout(rates[index]))
                self.blocks.append(block.to(device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew by the model's ``init``; biases become 0."""
        init.apply(self, self.init, generator=generator)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """Apply the network; ``seed`` (an int, or int64 seed and offset) fixes the masks of the fused layers."""
        if seed is None and self.training and any(layer.dropout > 0 for layer in self._fused()):
            seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
        for stream, layer in enumerate(self.layers):
            x = layer(x, seed=seed, stream=stream)
            if stream < len(self.blocks):
                x = self._block(stream, x)
        return x

    def _fused(self) -> list[FusedLinear]:
        return [layer for layer in self.layers if isinstance(layer, FusedLinear)]

    def _block(self, index: int, z: Tensor) -> Tensor:
        # BatchNorm1d takes dimension 1 as features; rows of any leading shape become one row dimension.
        result: Tensor = self.blocks[index](z.reshape(-1, z.shape[-1]))
        return result.reshape(z.shape)

    def to_sequential(self) -> nn.Sequential:
        """Copy the network into an ordinary ``nn.Sequential`` of stock modules.

        In eval its outputs equal the model's up to rounding; in training its dropout masks are PyTorch's. A batch norm
        in it wants inputs of two dimensions, where the model takes any number.
        """
        parts: list[nn.Module] = []
        for index, layer in enumerate(self._fused()):
            parts += layer.to_sequential()
            if index < len(self.blocks):
                parts += copy.deepcopy(cast(nn.Sequential, self.blocks[index]))
        return nn.Sequential(*parts).train(self.training)


def _copy(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


def _size(owner: str, name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ArgumentError(f"{owner}: {name} is {value!r}; it must be an int of at least 1")
    return value


def _choice(owner: str, name: str, value: object, known: Sequence[str], also: str = "") -> str:
    if not isinstance(value, str) or value not in known:
        names = ", ".join(known) + also
        raise ArgumentError(f"{owner}: {name} is {value!r}; it must be one of {names}")
    return value


def _probability(owner: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ArgumentError(f"{owner}: {name} is {value!r}; it must be a probability in [0, 1]")
    return float(value)


def _slope(activation: str, slope: object, out_features: int) -> float | Tensor | None:
    if activation not in _SLOPE:
        if slope is not None:
            raise ArgumentError(
                f"FusedLinear: slope is {slope!r}; only leaky_relu and prelu have one, not {activation}"
            )
        return None
    if isinstance(slope, Tensor) and activation == "prelu" and slope.numel() in (1, out_features):
        return slope.detach().clone().reshape(-1)
    value = _SLOPE[activation] if slope is None else slope
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        want = "a finite number" + (f", or a tensor of 1 or {out_features} values" if activation == "prelu" else "")
        raise ArgumentError(f"FusedLinear: slope is {got}; for {activation} it must be {want}")
    return float(value) if activation == "leaky_relu" else torch.tensor([float(value)])


def _widths(in_features: object, hidden: object, out_features: object) -> list[int]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise ArgumentError(f"MLP: hidden is {hidden!r}; it must be widths such as (64, 32), or () for a linear model")
    inner = [_size("MLP", f"hidden[{index}]", width) for index, width in enumerate(hidden)]
    return [_size("MLP", "in_features", in_features), *inner, _size("MLP", "out_features", out_features)]


def _rates(dropout: object, layers: int) -> list[float]:
    if not isinstance(dropout, (tuple, list)):
        return [_probability("MLP", "dropout", dropout)] * layers
    if len(dropout) != layers:
        raise ArgumentError(f"MLP: dropout is {dropout!r}; it must be a number or one per hidden layer ({layers})")
    return [_probability("MLP", f"dropout[{index}]", rate) for index, rate in enumerate(dropout)]

"""The fused layer: a linear map, an activation and dropout as one module."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mlpkit import functional
from mlpkit.errors import ArgumentError
from mlpkit.nn._arguments import choice, probability, size

STOCK: dict[str, Callable[[], nn.Module]] = {
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
ACTIVATIONS = tuple(STOCK)
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
        self.in_features = size("FusedLinear", "in_features", in_features)
        self.out_features = size("FusedLinear", "out_features", out_features)
        self.activation = choice("FusedLinear", "activation", activation, ACTIVATIONS)
        self.dropout = probability("FusedLinear", "dropout", dropout)
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
            parts.append(STOCK[self.activation]())
        if self.dropout > 0:
            parts.append(nn.Dropout(self.dropout))
        return nn.Sequential(*parts).train(self.training)

    def extra_repr(self) -> str:
        """Name the sizes, and everything that is not the default."""
        text = f"{self.in_features}, {self.out_features}, activation={self.activation}"
        text += f", dropout={self.dropout:g}" if self.dropout else ""
        text += f", slope={self.slope:g}" if isinstance(self.slope, float) else ""
        return text + ("" if self.bias is not None else ", bias=False")


def _copy(parameter: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)


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

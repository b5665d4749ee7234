"""Noise for training beside dropout of units: dropout of weights, and Gaussian noise on values."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mlpkit import functional
from mlpkit.errors import ArgumentError
from mlpkit.nn._arguments import probability
from mlpkit.nn.layers import FusedLinear

# Masks of weights use the upper half of the streams, so that they share a seed with the masks of outputs.
_WEIGHT_STREAM = 2**31


class DropConnect(FusedLinear):
    """A FusedLinear that drops weights in training: Wan et al. (2013), "Regularization of neural networks".

    x: (..., in_features); returns (..., out_features), x's dtype. weight_dropout: probability to drop a weight;
    survivors are scaled by the inverse of the realised share, so the expected weight is the weight. One mask serves a
    whole batch, where Wan et al. draw one a row, and biases are kept. In eval the weights are used as they are, which
    is the mean-weight approximation in place of Wan et al.'s Gaussian sampling. slope, dropout and the rest are as in
    FusedLinear. ``to_sequential`` copies the layer of
    eval: stock PyTorch drops no weights.

    The mask is ``mlpkit.reference.dropout_mask(out_features, in_features, weight_dropout, seed, offset,
    stream + 2**31)``. For the backward pass the mask is kept as numbers of the weight's shape, float32 or float64.
    Raises ArgumentError as FusedLinear does, and for a weight_dropout outside [0, 1].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        weight_dropout: float = 0.5,
        activation: str = "relu",
        dropout: float = 0.0,
        slope: float | Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {"activation": activation, "dropout": dropout, "slope": slope, "device": device, "dtype": dtype}
        super().__init__(in_features, out_features, bias, **options)  # type: ignore[arg-type]
        self.weight_dropout = probability("DropConnect", "weight_dropout", weight_dropout)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, stream: int = 0) -> Tensor:
        """Apply the layer; ``seed`` and ``stream`` (below 2^31) choose both masks (no seed: drawn, one for both)."""
        weight: Tensor = self.weight
        if self.training and self.weight_dropout > 0:
            if not 0 <= stream < _WEIGHT_STREAM:
                raise ArgumentError(f"DropConnect: stream is {stream}; it must lie in [0, 2^31)")
            if seed is None:
                seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
            weight = (weight * self._mask(seed, stream)).to(weight.dtype)
        y: Tensor = functional.linear_act_dropout(
            x,
            weight,
            self.bias,
            activation=self.activation,
            slope=self.slope,
            p=self.dropout,
            training=self.training,
            seed=seed,
            stream=stream,
        )
        return y

    def _mask(self, seed: int | Tensor, stream: int) -> Tensor:
        """0 or the scale for each weight: the op's own mask, on a product of ones."""
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        rows, cols = (torch.ones(count, 1, dtype=dtype, device=self.weight.device) for count in self.weight.shape)
        with torch.autocast(self.weight.device.type, enabled=False):
            return functional.linear_act_dropout(
                rows, cols, activation="identity", p=self.weight_dropout, seed=seed, stream=stream + _WEIGHT_STREAM
            )

    def extra_repr(self) -> str:
        """Name the sizes, and everything that is not the default."""
        return f"{super().extra_repr()}, weight_dropout={self.weight_dropout:g}"


class GaussianNoise(nn.Module):
    """Same as ``x + std * torch.randn_like(x)`` in training, x itself in eval. Sietsma and Dow (1991); Bishop (1995).

    x: any shape, floating; returns its shape and dtype. std: the noise's standard deviation in units of x, at least 0.
    Drawn from torch's generator: ``torch.manual_seed`` repeats a run. Raises ArgumentError for any other std.
    """

    def __init__(self, std: float = 0.1) -> None:
        super().__init__()
        if isinstance(std, bool) or not isinstance(std, (int, float)) or not (math.isfinite(std) and std >= 0):
            raise ArgumentError(f"GaussianNoise: std is {std!r}; it must be a finite number of at least 0")
        self.std = float(std)

    def forward(self, x: Tensor) -> Tensor:
        """Add the noise."""
        return torch.add(x, torch.randn_like(x), alpha=self.std) if self.training and self.std > 0 else x

    def extra_repr(self) -> str:
        """Name the standard deviation."""
        return f"std={self.std:g}"

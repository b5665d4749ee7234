"""The multi-layer perceptron: fused layers in a row, with or without norms between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from mlpkit import functional, init
from mlpkit.errors import ArgumentError
from mlpkit.nn._arguments import choice, probability, size
from mlpkit.nn._block import NormActDropout
from mlpkit.nn._whole import globally_hooked, norms_of, whole
from mlpkit.nn.layers import ACTIVATIONS, STOCK, FusedLinear

_NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm}


class MLP(nn.Module):
    """A multi-layer perceptron: hidden layers of linear, activation and dropout, and a linear last layer.

    x: (..., in_features); returns (..., out_features), x's dtype. Equivalent to ``to_sequential()``.

    hidden: widths of the hidden layers; () is a linear model. dropout: a number, or one per hidden layer; none after
    the last layer. norm: ``"batch"`` or ``"layer"`` makes a hidden layer linear -> norm -> activation -> dropout, its
    linear without a bias (the norm has one); ``blocks`` holds norm, activation and dropout as PyTorch's modules, which
    are computed as one op. init: a name from ``mlpkit.init``; biases start at 0. In training one seed is drawn per
    forward from torch's generator, and hidden layer i uses stream i of it, so masks differ between layers and
    ``torch.manual_seed`` repeats a run.
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
        choice("MLP", "activation", activation, ACTIVATIONS)
        if norm is not None:
            choice("MLP", "norm", norm, tuple(_NORMS), also=", None")
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
                block = NormActDropout(_NORMS[norm](fan_out), STOCK[activation](), nn.Dropout(rates[index]))
                self.blocks.append(block.to(device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew by the model's ``init``; biases become 0."""
        init.apply(self, self.init, generator=generator)

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None) -> Tensor:
        """Apply the network; ``seed`` (an int, or int64 seed and offset) fixes the masks of its layers."""
        if seed is None and self._draws():
            seed = torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=x.device)
        network = None if globally_hooked() else whole(self.layers)
        norms: dict[str, Any] | None = norms_of(self.blocks) if network and self.blocks else {}
        if network is not None and norms is not None:
            arguments = network._asdict() | norms
            y = functional.mlp(x, arguments.pop("weights"), arguments.pop("biases"), **arguments, seed=seed)
            for block in self.blocks:
                cast(NormActDropout, block).count()
            return y
        for stream, layer in enumerate(self.layers):
            x = layer(x, seed=seed, stream=stream)
            if stream < len(self.blocks):
                x = self.blocks[stream](x, seed=seed, stream=stream)
        return x

    def _draws(self) -> bool:
        # With norms the dropouts have modes of their own: the norms may be in eval alone.
        if self.blocks:
            return any(isinstance(block, NormActDropout) and block.rate > 0 for block in self.blocks)
        return self.training and any(layer.dropout > 0 for layer in self._fused())

    def _fused(self) -> list[FusedLinear]:
        return [layer for layer in self.layers if isinstance(layer, FusedLinear)]

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


def _widths(in_features: object, hidden: object, out_features: object) -> list[int]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence):
        raise ArgumentError(f"MLP: hidden is {hidden!r}; it must be widths such as (64, 32), or () for a linear model")
    inner = [size("MLP", f"hidden[{index}]", width) for index, width in enumerate(hidden)]
    return [size("MLP", "in_features", in_features), *inner, size("MLP", "out_features", out_features)]


def _rates(dropout: object, layers: int) -> list[float]:
    if not isinstance(dropout, (tuple, list)):
        return [probability("MLP", "dropout", dropout)] * layers
    if len(dropout) != layers:
        raise ArgumentError(f"MLP: dropout is {dropout!r}; it must be a number or one per hidden layer ({layers})")
    return [probability("MLP", f"dropout[{index}]", rate) for index, rate in enumerate(dropout)]

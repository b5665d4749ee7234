"""The norms of a network's hidden layers, as ``mlp`` takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlpkit.errors import ArgumentError
from mlpkit.functional._norm_act_dropout import Averages, check, valid_eps
from mlpkit.ops import mlp as _mlp

Optionals = Sequence[Tensor | None] | None


@dataclass(frozen=True)
class Norms:
    """One norm a hidden layer: its weight, bias and averages, None where it has none."""

    norm: str
    weights: list[Tensor | None]
    biases: list[Tensor | None]
    averages: list[Averages]
    eps: float

    @classmethod
    def of(
        cls,
        hidden: int,
        norm: str,
        weights: Optionals,
        biases: Optionals,
        means: Optionals,
        variances: Optionals,
        momentum: float,
        eps: float,
        used: bool,
    ) -> Norms:
        """Lists of one entry a hidden layer; raises ArgumentError for one of another length."""
        lists: list[list[Tensor | None]] = []
        names = ("norm_weights", "norm_biases", "running_means", "running_vars")
        for name, values in zip(names, (weights, biases, means, variances), strict=True):
            lists.append([None] * hidden if values is None else list(values))
            if len(lists[-1]) != hidden:
                raise ArgumentError(
                    f"mlp: {name} has {len(lists[-1])} entries; it must have one for each of {hidden} hidden layers"
                )
        averages = [Averages(mean, var, momentum, norm == "batch" and used) for mean, var in zip(lists[2], lists[3])]
        return cls(norm, lists[0], lists[1], averages, eps)

    def check(self, layer: int, z: Tensor, activation: str, slope: float | Tensor | None) -> None:
        """Raise what ``norm_act_dropout`` would raise for one hidden layer."""
        affine = (self.weights[layer], self.biases[layer])
        check(z, self.norm, *affine, self.averages[layer], self.eps, activation, slope, 0.0, None, layer)

    def transformed(self, layer: int, z: Tensor) -> Tensor:
        """One hidden layer's norm by PyTorch's own ops."""
        return self.averages[layer].norm(z, self.norm, self.weights[layer], self.biases[layer], self.eps)

    def run(
        self,
        x: Tensor,
        weights: list[Tensor],
        biases: list[Tensor | None],
        slopes: list[Tensor | None],
        seed: Tensor | None,
        activation: str,
        negative_slope: float,
        p: list[float],
    ) -> Tensor:
        """The network, and then its averages. Raises ArgumentError, with nothing changed, where these do not fit."""
        if any(averages.missing for averages in self.averages) or not valid_eps(self.eps):
            raise ArgumentError("mlp: running averages are missing, or eps is no number of at least 0")
        call = _mlp.norm_dispatched if torch.compiler.is_compiling() else _mlp.norm_eager
        means, variances = ([averages.given[part] for averages in self.averages] for part in (0, 1))
        y, statistics = call(
            x, weights, biases, slopes, self.weights, self.biases, means, variances, seed, self.norm, self.eps,
            activation, negative_slope, p,
        )  # fmt: skip
        if self.norm == "batch" and not self.averages[0].used:
            found = statistics.split([weight.shape[0] for weight in weights[:-1]], dim=1)
            if not all(averages.fit(part[0]) for averages, part in zip(self.averages, found)):
                raise ArgumentError("mlp: running averages do not fit the layers")
            rows = math.prod(x.shape[:-1])
            for averages, part in zip(self.averages, found):
                averages.take(part[0], part[1], rows)
        result: Tensor = y
        return result

"""MLPs of one shape as stacked tensors, the best form that PyTorch has: baddbmm by hand, or vmap."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit.bench.cases._network import IN, LEARNING_RATE, OUT, P


class Stacked:
    """``members`` MLPs 128 -> w -> w -> 10 with ReLU and dropout; their Adam is one fused kernel."""

    def __init__(self, members: int, width: int) -> None:
        self.members = members
        generator = torch.Generator().manual_seed(0)
        sizes = ((IN, width), (width, width), (width, OUT))
        self.weights = [
            (torch.randn(members, fan_in, fan_out, generator=generator) / fan_in**0.5).requires_grad_()
            for fan_in, fan_out in sizes
        ]
        self.biases = [torch.zeros(members, 1, fan_out, requires_grad=True) for _, fan_out in sizes]
        self.optimizer = torch.optim.Adam([*self.weights, *self.biases], lr=LEARNING_RATE, fused=True)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of the members' losses: each gets the gradient of its own. x: (members, rows, 128)."""
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            x = F.dropout(F.relu(torch.baddbmm(bias, x, weight)), P)
        x = torch.baddbmm(self.biases[-1], x, self.weights[-1])
        return F.cross_entropy(x.flatten(0, 1), y.flatten()) * self.members

    def orders(self, rows: int) -> Tensor:
        """The order of rows of each member, drawn once."""
        generator = torch.Generator().manual_seed(2)
        return torch.rand(self.members, rows, generator=generator).argsort(1)

    def epoch(self, x: Tensor, y: Tensor, batch: int, *, compiles: bool = False) -> Callable[[], None]:
        """All members go through all rows, each in its own order."""
        batches = torch.split(self.orders(len(x)), batch, dim=1)
        loss = torch.compile(self.loss) if compiles else self.loss

        def run() -> None:
            for rows in batches:
                self.optimizer.zero_grad()
                loss(x[rows], y[rows]).backward()  # type: ignore[no-untyped-call]
                self.optimizer.step()

        return run

    def by_vmap(self, x: Tensor, y: Tensor, batch: int) -> Callable[[], None]:
        """The same by ``torch.func``: the gradient of one member, mapped over all."""

        def loss_of_one(parameters: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
            for weight, bias in zip(parameters[:2], parameters[3:5], strict=True):
                x = F.dropout(F.relu(x @ weight + bias), P)
            return F.cross_entropy(x @ parameters[2] + parameters[5], y)

        gradients = torch.func.vmap(torch.func.grad(loss_of_one), randomness="different")
        parameters = [*self.weights, *self.biases]
        batches = torch.split(self.orders(len(x)), batch, dim=1)

        def run() -> None:
            for rows in batches:
                found = gradients([parameter.detach() for parameter in parameters], x[rows], y[rows])
                for parameter, gradient in zip(parameters, found, strict=True):
                    parameter.grad = gradient
                self.optimizer.step()

        return run

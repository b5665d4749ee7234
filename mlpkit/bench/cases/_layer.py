"""One fused layer beside eager PyTorch, its bare matrix products and torch.compile: shared by several families."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit.bench.case import DTYPES, OURS, Case, Rival, Settings
from mlpkit.functional import linear_act_dropout

P = 0.1
QUICK_SHAPE = (8, 16, 8)
FORWARD, BOTH = "forward", "forward + backward"
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


@dataclass(frozen=True)
class Layer:
    """``dropout(act(linear(x)))``; shape: rows, in_features, out_features."""

    shape: tuple[int, int, int]
    dtype: str
    backward: bool
    activation: str = "gelu"

    @property
    def work(self) -> float:
        """Operations of the products: one forward, two more (dX, dW) backward."""
        rows, inner, cols = self.shape
        return 2.0 * rows * inner * cols * (3 if self.backward else 1)

    def case(self, family: str, settings: Settings) -> Case:
        """The row of this layer."""
        rows, inner, cols = self.shape
        return Case(
            family=family,
            label=f"{rows} x {inner} -> {cols}, {self.activation}",
            sizes={"rows": rows, "in_features": inner, "out_features": cols},
            what=BOTH if self.backward else FORWARD,
            dtype=self.dtype,
            work=self.work,
            build=lambda: self.rivals(settings),
        )

    def call(self, layer: Callable[..., Tensor]) -> Callable[[], None]:
        """One pass of ``layer(x, weight, bias)``, gradients of all three included where they are asked for."""
        rows, inner, cols = self.shape
        torch.manual_seed(0)
        dtype, backward = DTYPES[self.dtype], self.backward
        x = torch.randn(rows, inner).to(dtype).requires_grad_(backward)
        weight = (torch.randn(cols, inner) / inner**0.5).to(dtype).requires_grad_(backward)
        bias = torch.randn(cols).to(dtype).requires_grad_(backward)
        dy = torch.randn(rows, cols).to(dtype)

        def run() -> None:
            y = layer(x, weight, bias)
            if backward:
                y.backward(dy)  # type: ignore[no-untyped-call]
                x.grad = weight.grad = bias.grad = None

        return run

    def ours(self, p: float = P) -> Rival:
        """The fused layer."""

        def fused(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y: Tensor = linear_act_dropout(x, weight, bias, activation=self.activation, p=p)
            return y

        return Rival(self.call(fused))

    def products(self) -> Callable[[], None]:
        """The layer's matrix products alone, by ``torch.mm``."""
        rows, inner, cols = self.shape
        dtype = DTYPES[self.dtype]
        x, weight, dy = (torch.randn(size).to(dtype) for size in ((rows, inner), (cols, inner), (rows, cols)))

        def run() -> None:
            torch.mm(x, weight.t())
            if self.backward:
                torch.mm(dy, weight)
                torch.mm(dy.t(), x)

        return run

    def rivals(self, settings: Settings) -> dict[str, Rival]:
        """All that can run this layer here."""
        act = _ACTIVATIONS[self.activation]

        def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return F.dropout(act(F.linear(x, weight, bias)), P)

        found = {OURS: self.ours(), "eager": Rival(self.call(eager)), "mm": Rival(self.products())}
        if settings.compile:
            torch.compiler.reset()
            found["compile"] = Rival(self.call(torch.compile(eager, fullgraph=True)))
        return found

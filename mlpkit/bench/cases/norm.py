"""Networks with norms, beside the same of stock modules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mlpkit import nn
from mlpkit.bench.case import DTYPES, OURS, Case, Rival, Settings
from mlpkit.bench.cases._layer import BOTH
from mlpkit.bench.peak import Peaks

IN, OUT, P = 128, 10, 0.1


def cases(settings: Settings, peaks: Peaks) -> list[Case]:
    """An MLP 128 -> w -> w -> 10 with batch or layer norm and dropout, forward and backward, against stock modules."""
    rows, widths = (8, (8,)) if settings.quick else (256, (64, 256))
    found = []
    for dtype in settings.dtypes:
        if dtype == "fp16":  # eager products of fp16 take seconds here
            continue
        for norm in ("batch", "layer"):
            for width in widths:
                found.append(Normed(norm, rows, width, dtype).case(settings))
    return found


@dataclass(frozen=True)
class Normed:
    """One network; dtype is that of data and parameters."""

    norm: str
    rows: int
    width: int
    dtype: str

    def case(self, settings: Settings) -> Case:
        """Its row."""
        inner = self.width * self.width + self.width * OUT
        return Case(
            family="norm",
            label=f"{IN} -> {self.width} -> {self.width} -> {OUT}, {self.norm} norm, batch {self.rows}",
            sizes={"rows": self.rows, "in_features": IN, "width": self.width, "out_features": OUT},
            what=BOTH,
            dtype=self.dtype,
            work=2.0 * self.rows * (2 * (IN * self.width + inner) + inner),
            build=lambda: self.rivals(settings),
        )

    def rivals(self, settings: Settings) -> dict[str, Rival]:
        """Ours and stock modules with the same weights."""
        torch.manual_seed(0)
        model = nn.MLP(IN, (self.width, self.width), OUT, norm=self.norm, dropout=P).to(DTYPES[self.dtype])
        found = {OURS: Rival(self.call(model)), "eager": Rival(self.call(model.to_sequential()))}
        if settings.compile:
            torch.compiler.reset()
            found["compile"] = Rival(self.call(model.to_sequential(), compiles=True))
        return found

    def call(self, model: torch.nn.Module, *, compiles: bool = False) -> Callable[[], None]:
        """One forward and backward pass."""
        torch.manual_seed(1)
        dtype, parameters = DTYPES[self.dtype], list(model.parameters())
        x, dy = torch.randn(self.rows, IN).to(dtype), torch.randn(self.rows, OUT).to(dtype)
        forward = torch.compile(model, fullgraph=True) if compiles else model

        def run() -> None:
            forward(x).backward(dy)
            for parameter in parameters:
                parameter.grad = None

        return run

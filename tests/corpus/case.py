"""A corpus entry: the program, what is true about it, and its variants."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

CASES: dict[str, Case] = {}
HEALTHY: dict[str, Callable[[Variant], Any]] = {}


@dataclass(frozen=True)
class Variant:
    """Sizes and shape of a program; nothing in a truth may depend on them but names."""

    index: int
    width: int
    depth: int
    batch: int
    seed: int
    nested: bool
    loss: str

    def pick(self, *values: Any) -> Any:
        """The value for this variant."""
        return values[self.index]

    def name(self, module: str) -> str:
        """Qualified name of a module of ``build``."""
        return f"body.{module}" if self.nested else module

    def data(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Random numbers of the given shape, by default (batch, width)."""
        return torch.randn(*(shape or (self.batch, self.width))) * scale

    def reduce(self, y: torch.Tensor) -> torch.Tensor:
        """The variant's loss."""
        y = y.float()
        if self.loss == "square":
            return (y - 1).pow(2).mean()
        return (y - 1).abs().mean() if self.loss == "absolute" else nn.functional.softplus(y).mean()


VARIANTS = (
    Variant(0, 8, 2, 4, 1, False, "square"),
    Variant(1, 24, 3, 7, 5, True, "softplus"),
    Variant(2, 13, 4, 3, 11, False, "absolute"),
)


def ANY(v: Variant) -> str:
    """A module that the fault does not determine."""
    return "*"


@dataclass(frozen=True)
class Case:
    """What went wrong in a program. step None: the oracle says; born: (op, phase) of the first NaN or Inf if later."""

    program: Callable[[Variant, bool], Iterable[torch.Tensor]]
    op: str
    phase: str
    step: int | None
    cause: str
    module: Callable[[Variant], str]
    dtype: str
    root: bool
    silent: bool
    born: str
    tags: frozenset[str] = field(default_factory=frozenset)

    @property
    def name(self) -> str:
        """The program's name."""
        return self.program.__name__

    @property
    def line(self) -> int | None:
        """The marked line, where the program has one."""
        lines, start = inspect.getsourcelines(self.program)
        return next((start + i for i, line in enumerate(lines) if "# fault" in line), None)


def fails(
    op: str,
    phase: str,
    step: int | None,
    cause: str,
    *,
    module: str | Callable[[Variant], str] = "",
    dtype: str = "float32",
    root: bool = False,
    silent: bool = False,
    born: str = "",
) -> Callable[..., Any]:
    """Register a failing program with its truth."""
    where = module if callable(module) else (lambda v: module)

    def register(program: Callable[..., Any]) -> Callable[..., Any]:
        CASES[program.__name__] = Case(program, op, phase, step, cause, where, dtype, root, silent, born or op)
        return program

    return register


def healthy(program: Callable[[Variant], Any]) -> Callable[[Variant], Any]:
    """Register a program in which nothing went wrong."""
    HEALTHY[program.__name__] = program
    return program


class Body(nn.Module):
    """One level of nesting around a model."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass on."""
        return self.body(x)


def build(v: Variant, *layers: nn.Module) -> nn.Module:
    """The layers in a row, below one more level in some variants."""
    model: nn.Module = nn.Sequential(*layers)
    return Body(model) if v.nested else model


def mlp(v: Variant, out: int = 1, activation: Callable[[], nn.Module] = nn.Tanh) -> nn.Module:
    """A perceptron of the variant's width and depth."""
    layers: list[nn.Module] = []
    for _ in range(v.depth):
        layers += [nn.Linear(v.width, v.width), activation()]
    return build(v, *layers, nn.Linear(v.width, out))


def train(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], torch.Tensor],
    steps: int = 3,
    optimizer: torch.optim.Optimizer | None = None,
) -> list[torch.Tensor]:
    """A plain loop; gives the last loss and the parameters."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=1e-2)
    loss = torch.zeros(())
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
    return [loss.detach(), *(p.detach() for p in model.parameters())]


def moved(model: nn.Module, run: Callable[[], Any]) -> list[torch.Tensor]:
    """By how much the parameters moved while ``run`` ran: what a silent failure stops."""
    before = [p.detach().clone() for p in model.parameters()]
    run()
    return [p.detach() - old for p, old in zip(model.parameters(), before)]


def execute(case: Case, v: Variant, planted: bool = True) -> list[torch.Tensor]:
    """Run a program with its own seed."""
    torch.manual_seed(v.seed)
    return list(case.program(v, planted))

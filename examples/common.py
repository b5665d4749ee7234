"""What the examples share: small data, one training loop, one look of the pictures.

Every example is a file with a ``main(out=None)`` that prints what it found, draws a picture into ``out`` (shown on the
screen without it) and returns the numbers that its claims rest on.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

from mlpkit.guard import TrainStep

BLUE, ORANGE, GREEN, RED, PURPLE, GREY = COLOURS = ["#2f7fc1", "#df8020", "#2f9e63", "#d64545", "#9a5fc0", "#7d8590"]
INK, PAPER, GRID = "#24292f", "#ffffff", "#d9dee3"
plt.rcParams.update(
    {
        "axes.prop_cycle": plt.cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.facecolor": PAPER,
        "axes.titlesize": "medium",
        "figure.facecolor": PAPER,
        "figure.figsize": (8.0, 3.2),
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "legend.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "svg.hashsalt": "mlpkit",
    }
)


class Data(NamedTuple):
    """Rows to train on and rows to test on."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def digits(train: int = 1200) -> Data:
    """scikit-learn's 8x8 digits: ``train`` of 1797 rows to train on, the last 500 of a fixed shuffle to test on."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(images / 16, dtype=torch.float32)[rows], torch.tensor(labels)[rows]
    return Data(x[:train], y[:train], x[-500:], y[-500:])


def fit(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Any = "cross_entropy",
    *,
    epochs: int = 20,
    lr: float = 1e-3,
    batch_size: int = 64,
    optimizer: torch.optim.Optimizer | None = None,
    after_epoch: Callable[[int], Any] | None = None,
) -> list[float]:
    """Train by guarded steps (Adam unless given) and return the mean loss of each epoch; a true after_epoch ends it."""
    step = TrainStep(model, loss, optimizer or torch.optim.Adam(model.parameters(), lr=lr))
    means = []
    for epoch in range(epochs):
        model.train()
        losses = [step(x[rows], y[rows]).loss for rows in torch.randperm(len(x)).split(batch_size)]
        means.append(sum(losses) / len(losses))
        if after_epoch is not None and after_epoch(epoch):
            break
    return means


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of rows whose largest output is the right one, in eval mode."""
    return (model.eval()(x).argmax(1) == y).float().mean().item()


@torch.no_grad()
def loss_of(model: nn.Module, x: Tensor, y: Tensor, loss: Any = nn.functional.cross_entropy) -> float:
    """Loss on these rows in eval mode."""
    return float(loss(model.eval()(x), y))


def save(figure: Figure, out: Path | str | None) -> None:
    """Write the picture to ``out``, or show it."""
    if out is None:
        plt.show()
    else:
        figure.savefig(out, metadata={"Date": None} if str(out).endswith(".svg") else None)
    plt.close(figure)


def start(main: Callable[..., Any]) -> None:
    """Run an example from the command line: ``python examples/NAME.py [--out picture.svg]``."""
    parser = argparse.ArgumentParser(description=main.__globals__["__doc__"])
    parser.add_argument("--out", type=Path, help="file for the picture (svg, png or pdf); without it a window opens")
    torch.set_num_threads(1)
    main(parser.parse_args().out)

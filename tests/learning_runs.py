"""Whole learning curves on scikit-learn's digits: ours, a plain PyTorch loop, and a test that tells them apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from statistics import mean, stdev

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from mlpkit.guard import TrainStep
from mlpkit.nn import MLP

STEPS, BATCH, HIDDEN = 2000, 32, 32
SEEDS = {"fp32": range(6), "bf16": range(5), "fp16": range(5)}  # half precision takes the CPU five times as long
# Steps whose losses are averaged, so that a curve is four numbers; held-out loss and accuracy are two more.
WINDOWS = ((0, 100), (100, 400), (400, 1000), (1000, STEPS))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

Curve = list[float]
Change = Callable[[MLP], object]


@dataclass(frozen=True)
class Recipe:
    """What both sides train: precision as in ``TrainStep``, and the dropout of the hidden layer."""

    precision: str = "fp32"
    dropout: float = 0.0


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows to learn from, their classes, and a fifth held out."""
    images, classes = load_digits(return_X_y=True)
    x, target = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(classes)
    held_out = torch.arange(len(x)) % 5 == 0
    x -= x[~held_out].mean(0)
    return x[~held_out], target[~held_out], x[held_out], target[held_out]


def model_of(recipe: Recipe, seed: int) -> MLP:
    torch.manual_seed(seed)
    model = MLP(64, (HIDDEN,), 10, activation="tanh", dropout=recipe.dropout)
    # Centred inputs and an odd activation leave nothing that could stand in for a bias; from 0 none would be missed.
    for layer in model.layers:
        nn.init.normal_(layer.bias, std=2)
    return model


def batches(seed: int) -> Tensor:
    """The rows of every step: the same for ours and for PyTorch."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(len(digits()[0]), (STEPS, BATCH), generator=generator)


def ours(recipe: Recipe, seed: int, change: Change | None = None) -> Curve:
    """``nn.MLP`` by ``guard.TrainStep``; change: a flaw to plant in the model before it learns."""
    model = model_of(recipe, seed)
    if change is not None:
        change(model)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    step = TrainStep(
        model, "cross_entropy", torch.optim.Adam(learning, lr=2e-3, fused=True), precision=recipe.precision
    )
    x, target, *_ = digits()
    losses = []
    for rows in batches(seed):
        losses.append(float(step(x[rows], target[rows]).loss))
    return curve(losses, model)


@cache
def eager(recipe: Recipe, seed: int) -> Curve:
    """The loop that PyTorch's tutorials show, from the same start on the same batches; its masks are its own."""
    model = copy.deepcopy(model_of(recipe, seed)).to_sequential()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=recipe.precision == "fp16")
    dtype = DTYPES.get(recipe.precision)
    x, target, *_ = digits()
    losses = []
    for rows in batches(seed):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype) if dtype else nullcontext():
            loss = F.cross_entropy(model(x[rows]), target[rows])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    return curve(losses, model)


def curve(losses: list[float], model: nn.Module) -> Curve:
    *_, x, target = digits()
    with torch.no_grad():
        output = model.eval()(x)
    held_out = [F.cross_entropy(output, target).item(), (output.argmax(1) == target).float().mean().item()]
    return [mean(losses[begin:end]) for begin, end in WINDOWS] + held_out


def scores(ours: list[Curve], theirs: list[Curve]) -> list[float]:
    """Student's t of the paired differences, for each number of the curves.

    A difference has the spread of the differences, but no less than a tenth of PyTorch's own spread over seeds: where
    nothing but rounding differs, a systematic difference that small is within the noise.
    """
    result = []
    for mine, other in zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True):
        differences = [a - b for a, b in zip(mine, other, strict=True)]
        spread = max(stdev(differences), stdev(other) / 10)
        result.append(mean(differences) / (spread / math.sqrt(len(differences))))
    return result

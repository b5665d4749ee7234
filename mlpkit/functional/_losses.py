"""The losses that mlpkit knows by name, each computed in float32 at least.

Each takes (output, target) and returns the mean, a scalar; ``reduction="sum"`` gives the sum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit.errors import ArgumentError, ShapeError

Loss = Callable[[Any, Any], Tensor]
REDUCTIONS = ("mean", "sum")


def cross_entropy(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Same as ``F.cross_entropy``: output are logits (rows, classes, ...); target class indices or probabilities."""
    return F.cross_entropy(_wide(output), target, reduction=reduction)


def bce(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Same as ``F.binary_cross_entropy_with_logits``: output are logits; target in [0, 1], any dtype, same shape."""
    return F.binary_cross_entropy_with_logits(*_pair(output, target, "bce"), reduction=reduction)


def mse(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Same as ``F.mse_loss``, but shapes must be equal: broadcasting (N, 1) with (N,) compares all pairs."""
    return F.mse_loss(*_pair(output, target, "mse"), reduction=reduction)


def l1(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Same as ``F.l1_loss``; shapes must be equal."""
    return F.l1_loss(*_pair(output, target, "l1"), reduction=reduction)


def huber(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """Same as ``F.huber_loss`` with delta 1; shapes must be equal."""
    return F.huber_loss(*_pair(output, target, "huber"), reduction=reduction)


def log_mse(output: Tensor, target: Tensor, *, reduction: str = "mean") -> Tensor:
    """The mean of (log(output) - log(target))^2, for relative errors; both must be positive, or the step is skipped."""
    wide, same = _pair(output, target, "log_mse")
    return F.mse_loss(torch.log(wide), torch.log(same), reduction=reduction)


LOSSES: Final[dict[str, Loss]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "log_mse": log_mse,
}


def resolve(owner: str, loss: str | Loss) -> Loss:
    """The callable behind a loss argument.

    Raises ArgumentError for an unknown name, with the list, and for what is neither name nor callable.
    """
    if callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        raise ArgumentError(f"{owner}: loss is {loss!r}; it must be one of {', '.join(LOSSES)}, or a callable")
    return LOSSES[loss]


def _pair(output: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if output.shape != target.shape:
        raise ShapeError(f"{name}: output is {tuple(output.shape)}, target {tuple(target.shape)}; shapes must be equal")
    wide = _wide(output)
    return wide, target.to(wide.dtype)


def _wide(output: Tensor) -> Tensor:
    # Loss arithmetic in fp32: half precision would round the target and overflow the square.
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output

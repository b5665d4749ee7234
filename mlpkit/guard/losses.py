"""The losses that a guarded step knows by name. Each takes (output, target) and returns the mean, a scalar."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit.errors import ArgumentError, ShapeError

Loss = Callable[[Any, Any], Tensor]


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    """Same as ``F.cross_entropy``: output are logits (rows, classes, ...); target class indices or probabilities."""
    return F.cross_entropy(_wide(output), target)


def bce(output: Tensor, target: Tensor) -> Tensor:
    """Same as ``F.binary_cross_entropy_with_logits``: output are logits; target in [0, 1], any dtype, same shape."""
    return F.binary_cross_entropy_with_logits(*_pair(output, target, "bce"))


def mse(output: Tensor, target: Tensor) -> Tensor:
    """Same as ``F.mse_loss``, but shapes must be equal: broadcasting (N, 1) with (N,) compares all pairs."""
    return F.mse_loss(*_pair(output, target, "mse"))


def l1(output: Tensor, target: Tensor) -> Tensor:
    """Same as ``F.l1_loss``; shapes must be equal."""
    return F.l1_loss(*_pair(output, target, "l1"))


def huber(output: Tensor, target: Tensor) -> Tensor:
    """Same as ``F.huber_loss`` with delta 1; shapes must be equal."""
    return F.huber_loss(*_pair(output, target, "huber"))


def log_mse(output: Tensor, target: Tensor) -> Tensor:
    """Mean of (log(output) - log(target))^2, for relative errors; both must be positive, or the step is skipped."""
    wide, same = _pair(output, target, "log_mse")
    return F.mse_loss(torch.log(wide), torch.log(same))


LOSSES: dict[str, Loss] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "mse": mse,
    "l1": l1,
    "huber": huber,
    "log_mse": log_mse,
}


def resolve(loss: str | Loss | None) -> Loss | None:
    """The callable behind a loss argument; None stays None (the output's own ``.loss``).

    Raises ArgumentError for an unknown name, with the list, and for what is neither name, callable nor None.
    """
    if loss is None or callable(loss):
        return loss
    if not isinstance(loss, str) or loss not in LOSSES:
        known = ", ".join(LOSSES)
        raise ArgumentError(f"TrainStep: loss is {loss!r}; it must be one of {known}, a callable, or None")
    return LOSSES[loss]


def own_loss(output: Any) -> Any:
    """The loss that a model computed itself: ``output.loss`` or ``output["loss"]``; raises ArgumentError without."""
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None:
        raise ArgumentError(f"TrainStep: loss=None wants an output with .loss, not {type(output).__name__}")
    return found


def _pair(output: Tensor, target: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if output.shape != target.shape:
        raise ShapeError(f"{name}: output is {tuple(output.shape)}, target {tuple(target.shape)}; shapes must be equal")
    wide = _wide(output)
    return wide, target.to(wide.dtype)


def _wide(output: Tensor) -> Tensor:
    # Loss arithmetic in fp32: half precision would round the target and overflow the square.
    return output.float() if output.dtype in (torch.float16, torch.bfloat16) else output

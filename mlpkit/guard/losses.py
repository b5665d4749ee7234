"""The losses that a guarded step knows: mlpkit's own by name, and torch's modules and functions with their settings."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from mlpkit.errors import ArgumentError
from mlpkit.functional import _losses
from mlpkit.functional._losses import LOSSES, REDUCTIONS, Loss

__all__ = ["LOSSES", "Loss", "LossSpec", "describe", "own_loss", "resolve"]


@dataclass(frozen=True, eq=False)
class LossSpec:
    """What a loss computes, in one form for all the ways to ask for it.

    kind: a key of ``LOSSES``. reduction: ``"mean"`` or ``"sum"``. The rest as the loss module of torch defines it, at
    its default where the kind has no such setting: label_smoothing and ignore_index of cross_entropy; weight of
    cross_entropy (one a class: its mean divides by the sum of the targets' weights) and of bce (broadcast to the
    output); pos_weight of bce (shape as weight's there); delta of huber. Tensors are of any floating dtype. Nothing is
    checked here: who uses the loss raises ArgumentError or ShapeError.
    """

    kind: str
    reduction: str = "mean"
    label_smoothing: float = 0.0
    weight: Tensor | None = None
    pos_weight: Tensor | None = None
    ignore_index: int = -100
    delta: float = 1.0


_FUNCTIONS: dict[Any, str] = {
    **{function: name for name, function in LOSSES.items()},
    F.cross_entropy: "cross_entropy",
    F.binary_cross_entropy_with_logits: "bce",
    F.mse_loss: "mse",
    F.l1_loss: "l1",
    F.huber_loss: "huber",
}
_MODULES: dict[type, tuple[str, tuple[str, ...]]] = {
    nn.CrossEntropyLoss: ("cross_entropy", ("label_smoothing", "weight", "ignore_index")),
    nn.BCEWithLogitsLoss: ("bce", ("weight", "pos_weight")),
    nn.MSELoss: ("mse", ()),
    nn.L1Loss: ("l1", ()),
    nn.HuberLoss: ("huber", ("delta",)),
}


def describe(loss: object) -> LossSpec | None:
    """What a loss argument computes where that is known, else None; a module's settings are read as they are now.

    Known are the names and functions of ``LOSSES``, the functions of ``torch.nn.functional`` for them (either also in a
    ``functools.partial`` that sets the reduction alone), and ``nn.CrossEntropyLoss``, ``nn.BCEWithLogitsLoss``,
    ``nn.MSELoss``, ``nn.L1Loss`` and ``nn.HuberLoss`` themselves, without hooks. A reduction of "none" is none of them.
    """
    if isinstance(loss, str):
        return LossSpec(loss) if loss in LOSSES else None
    if isinstance(loss, nn.Module):
        return _describe_module(loss)
    function: object = loss
    reduction = "mean"
    if isinstance(loss, partial) and not loss.args and set(loss.keywords) == {"reduction"}:
        function, reduction = loss.func, loss.keywords["reduction"]
    kind = _FUNCTIONS.get(function) if isinstance(function, Hashable) else None
    return LossSpec(kind, reduction) if kind and reduction in REDUCTIONS else None


def _describe_module(loss: nn.Module) -> LossSpec | None:
    known = _MODULES.get(type(loss))
    hooked = loss._forward_hooks or loss._forward_pre_hooks or loss._backward_hooks or loss._backward_pre_hooks
    if known is None or hooked or "forward" in vars(loss) or loss.reduction not in REDUCTIONS:
        return None
    kind, settings = known
    return LossSpec(kind, str(loss.reduction), **{name: getattr(loss, name) for name in settings})


def resolve(loss: str | Loss | None) -> Loss | None:
    """The callable behind a loss argument; None stays None (the output's own ``.loss``).

    Raises ArgumentError for an unknown name, with the list, and for what is neither name, callable nor None.
    """
    return None if loss is None else _losses.resolve("TrainStep", loss)


def own_loss(output: Any) -> Any:
    """The loss that a model computed itself: ``output.loss`` or ``output["loss"]``; raises ArgumentError without."""
    found = output.get("loss") if isinstance(output, dict) else getattr(output, "loss", None)
    if found is None:
        raise ArgumentError(f"TrainStep: loss=None wants an output with .loss, not {type(output).__name__}")
    return found

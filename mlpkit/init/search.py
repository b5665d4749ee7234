"""The search: the largest start, by powers of two, whose first step is finite in a precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError, NonFiniteError
from mlpkit.functional._losses import Loss, resolve
from mlpkit.init._run import buffers_and_random_state_kept, call
from mlpkit.init.draws import is_layer

PRECISIONS: dict[str, torch.dtype | None] = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}
_HALVINGS = 64


@dataclass(frozen=True)
class StdTry:
    """One try. factor: of the weights the model came with; fault: what was not finite, None where all was."""

    factor: float
    loss: float
    fault: str | None


@dataclass(frozen=True)
class FoundStd:
    """What ``find_std`` found and left in the model. std: of each layer's weights now; tries: the last one is good."""

    precision: str
    factor: float
    std: Mapping[str, float]
    tries: tuple[StdTry, ...]

    @property
    def loss(self) -> float:
        """The first loss, finite."""
        return self.tries[-1].loss

    def __str__(self) -> str:
        lines = [f"init.find_std in {self.precision}: weights times {self.factor:g}, first loss {self.loss:.4g}"]
        lines += [f"  times {one.factor:g}: {one.fault or 'all finite'}" for one in self.tries]
        return "\n".join(lines + [f"  {name or 'model'}: std {std:.3g}" for name, std in self.std.items()])


def find_std(model: nn.Module, batch: tuple[Any, Any], loss: str | Loss, precision: str = "fp32") -> FoundStd:
    """Halve the weights of all linear and convolution layers until the first loss and all gradients are finite.

    batch: a pair (inputs, target); inputs a tensor, tuple or dict. loss: a name that ``guard.TrainStep`` knows, or a
    function of (output, target) that gives a scalar. precision: ``"fp32"`` as the model is, ``"fp16"`` or ``"bf16"`` by
    autocast, as in ``guard.TrainStep`` but without a loss scale. The model stays in its mode. It is left with the
    weights found, which are those it came with times a power of two: all layers by one factor, so the proportions of
    the start remain. Biases, norms, gradients, buffers and random state stay as they were, and so do weights that are
    good at once.

    Raises ArgumentError for an unknown precision or loss, a batch that is no pair, a loss that gives no scalar tensor,
    or a model without such layers; NonFiniteError, with the weights put back, when parameters or inputs are not finite
    to begin with or nothing was finite after 64 halvings: then the fault lies elsewhere.
    """
    if precision not in PRECISIONS:
        raise ArgumentError(f"init.find_std: precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ArgumentError(f"init.find_std: batch is {type(batch).__name__}; it must be a pair (inputs, target)")
    function = resolve("init.find_std", loss)
    weights = _weights(model)
    _check_finite(model, batch[0])
    originals = {name: weight.detach().clone() for name, weight in weights.items()}
    tries: list[StdTry] = []
    try:
        for halvings in range(_HALVINGS + 1):
            factor = 2.0**-halvings
            _scale(weights, originals, factor)
            tries.append(_try(model, batch, function, precision, factor))
            if tries[-1].fault is None:
                std = {name: weight.detach().double().std(correction=0).item() for name, weight in weights.items()}
                return FoundStd(precision, factor, std, tuple(tries))
        raise NonFiniteError(
            f"init.find_std: {tries[-1].fault} with weights times {tries[-1].factor:g} too; it does not come from them"
        )
    except BaseException:
        _scale(weights, originals, 1.0)
        raise


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights by layer name, a shared one once."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if is_layer(module) and weight is not None and all(weight is not other for other in found.values()):
            found[name] = weight
    if not found:
        raise ArgumentError(f"init.find_std: {type(model).__name__} has no linear or convolution layer with a weight")
    return found


def _check_finite(model: nn.Module, inputs: Any) -> None:
    values = inputs.items() if isinstance(inputs, Mapping) else enumerate(_sequence(inputs))
    named = [*model.named_parameters(), *((f"input {key}", value) for key, value in values)]
    for name, value in named:
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise NonFiniteError(f"init.find_std: {name} holds Inf or NaN to begin with")


def _sequence(inputs: Any) -> Any:
    return inputs if isinstance(inputs, (tuple, list)) else (inputs,)


def _scale(weights: Mapping[str, Tensor], originals: Mapping[str, Tensor], factor: float) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(originals[name] * factor)


def _try(model: nn.Module, batch: Any, loss: Loss, precision: str, factor: float) -> StdTry:
    """One forward and backward; every try starts from the same random state and the same buffers."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    device = next(model.parameters()).device.type
    dtype = PRECISIONS[precision]
    with buffers_and_random_state_kept(model), torch.enable_grad():
        with torch.autocast(device, dtype) if dtype is not None else nullcontext():
            value = loss(call(model, batch[0]), batch[1])
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ArgumentError(f"init.find_std: loss gave {type(value).__name__}; it must be a tensor of one element")
        number = float(value.detach())
        if not math.isfinite(number):
            return StdTry(factor, number, f"the loss is {number}")
        if not value.requires_grad:
            return StdTry(factor, number, None)
        gradients = torch.autograd.grad(value, [parameter for _, parameter in named], allow_unused=True)
    for (name, _), gradient in zip(named, gradients):
        if gradient is not None and not gradient.isfinite().all():
            return StdTry(factor, number, f"the gradient of {name} is not finite")
    return StdTry(factor, number, None)

"""Monte-Carlo dropout: how sure is a network, asked by leaving its dropout on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError
from mlpkit.nn._arguments import size
from mlpkit.nn.layers import FusedLinear
from mlpkit.nn.mlp import MLP
from mlpkit.nn.noise import DropConnect


@dataclass(frozen=True)
class MCPrediction:
    """What ``predict_mc`` found. mean, variance: (rows, ..., outputs), of outputs, or of probabilities with ``logits``.

    variance: between samples, unbiased. entropy: of the mean probabilities; mutual_information: entropy less the mean
    of the samples' own entropies, which is what the network does not know about itself; (rows, ...), both in nats.
    float32, float64 for a float64 model. Made by ``predict_mc``, whose errors are the only ones.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    samples: int


def predict_mc(
    model: nn.Module, x: Any, samples: int, *, logits: bool = False, seed: int | None = None
) -> MCPrediction:
    """Mean and spread of ``samples`` forwards with dropout on and all else in eval: Gal and Ghahramani (2016).

    x: what the model takes, a tensor, tuple or dict; the model gives one tensor (rows, ..., outputs). logits: whether
    that holds logits of classes in its last dimension; then the statistics are those of their softmax, with entropy and
    mutual information. Sums are kept in float32, float64 for float64. No gradients.

    Dropout is ``nn.Dropout`` and its kin, ``FusedLinear``, ``DropConnect`` and ``MLP``; ``F.dropout`` in a forward is
    seen after ``nn.fuse`` where that could fuse it. Norms use their running statistics. Modes, buffers and torch's
    random state are afterwards what they were. seed: of the masks, an int; if None they follow from torch's generator
    as it stands, so that ``torch.manual_seed`` repeats a prediction, and so does a second call.

    Raises ArgumentError when samples is no int of at least 2, when the model has no dropout, or when its output is no
    floating tensor.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"predict_mc: model is {type(model).__name__}; it must be an nn.Module")
    if size("predict_mc", "samples", samples) < 2:
        raise ArgumentError("predict_mc: samples is 1; it must be at least 2, one has no variance")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        raise ArgumentError(f"predict_mc: seed is {seed!r}; it must be an int or None")
    moments, own_entropy = _Moments(), _Moments()
    with _dropout_on(model, seed), torch.no_grad():
        for _ in range(samples):
            y = _output(model, x)
            moments.add(y.softmax(-1) if logits else y)
            if logits:
                own_entropy.add(_entropy(y.softmax(-1)))
    entropy = _entropy(moments.mean) if logits else None
    # Rounding may put the difference of two equal entropies below 0.
    information = None if entropy is None else (entropy - own_entropy.mean).clamp(min=0)
    return MCPrediction(moments.mean, moments.squares / (samples - 1), entropy, information, samples)


class _Moments:
    """Mean and sum of squared deviations in one pass, without cancellation: Welford (1962)."""

    mean: Tensor
    squares: Tensor

    def __init__(self) -> None:
        self.count = 0

    def add(self, value: Tensor) -> None:
        """Take one more sample."""
        self.count += 1
        if self.count == 1:
            self.mean, self.squares = value.clone(), torch.zeros_like(value)
            return
        step = value - self.mean
        self.mean = self.mean + step / self.count
        self.squares = self.squares + step * (value - self.mean)


def _output(model: nn.Module, x: Any) -> Tensor:
    y = model(**x) if isinstance(x, Mapping) else model(*x) if isinstance(x, (tuple, list)) else model(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        raise ArgumentError(f"predict_mc: the model's output is {type(y).__name__}; it must be a floating tensor")
    return y if y.dtype == torch.float64 else y.float()


def _entropy(probabilities: Tensor) -> Tensor:
    """-sum p log p over the last dimension, 0 log 0 being 0."""
    terms: Tensor = torch.special.entr(probabilities)
    return terms.sum(-1)


def _drops(module: nn.Module) -> bool:
    if isinstance(module, FusedLinear):
        return module.dropout > 0 or (isinstance(module, DropConnect) and module.weight_dropout > 0)
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


@contextmanager
def _dropout_on(model: nn.Module, seed: int | None) -> Iterator[None]:
    """Dropout in training mode, the rest in eval; afterwards modes, buffers and random state are as before."""
    dropouts = {module for module in model.modules() if _drops(module)}
    if not dropouts:
        raise ArgumentError(
            f"predict_mc: {type(model).__name__} has no dropout layer (nn.fuse makes one of an F.dropout)"
        )
    # A network without a norm reads its own mode, for the seed of its layers; one with a norm must stay in eval.
    networks = {module for module in model.modules() if isinstance(module, MLP) and module.norm is None}
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    cuda = sorted({tensor.device.index for tensor in [*model.parameters(), *model.buffers()] if tensor.is_cuda})
    try:
        with torch.random.fork_rng(devices=cuda):
            if seed is not None:
                # Not torch.manual_seed: it would reach devices whose state is not put back.
                for generator in [torch.default_generator, *(torch.cuda.default_generators[index] for index in cuda)]:
                    generator.manual_seed(seed)
            for module in modes:
                module.training = module in dropouts or module in networks
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)

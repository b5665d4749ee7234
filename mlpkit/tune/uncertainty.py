"""How far a prediction can be trusted: entropy, disagreement between networks and dropout masks, intervals."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlpkit.errors import ArgumentError
from mlpkit.nn import predict_mc
from mlpkit.tune.ensemble import Average
from mlpkit.tune.problem import decode_target
from mlpkit.tune.table import pandas

if TYPE_CHECKING:
    from mlpkit.tune.model import TunedModel

Floats = npt.NDArray[np.float64]


def uncertainty(model: TunedModel, X: Any, samples: int, seed: int) -> Any:
    """One row of measures per row of ``X``: what ``TunedModel.uncertainty`` promises.

    Disagreement is what the networks of an average and the masks of MC dropout (Gal and Ghahramani, 2016) know apart
    from each other; it is absent for a single network without dropout. Raises ArgumentError for samples below 2.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 2:
        raise ArgumentError(f"uncertainty: samples is {samples!r}; it must be a whole number from 2 up")
    inputs = model.inputs(X)
    classes = len(model.classes)
    parts = _parts(model)
    several = len(parts) > 1 or any(dropout for _, dropout, _ in parts)
    found = [_moments(network, inputs, bool(classes), dropout, samples, seed) for network, dropout, _ in parts]
    weights = torch.tensor([weight for _, _, weight in parts], dtype=torch.float64)
    weights = weights / weights.sum()
    mean = sum((weight * item[0] for weight, item in zip(weights, found)), torch.zeros(()))
    frame = pandas().DataFrame(index=range(len(inputs)))
    if classes:
        unit = math.log(max(2, classes))
        frame["uncertainty"] = _entropy(torch.from_numpy(model.predict_proba(X))).numpy() / unit
        if several:
            own = sum((weight * item[1] for weight, item in zip(weights, found)), torch.zeros(()))
            frame["disagreement"] = (_entropy(mean) - own).clamp(min=0.0).numpy() / unit
        return frame
    output = model._output(X)[:, 0]
    if model.interval is not None:
        low, high = (_decoded(model, output + end) for end in model.interval)
        frame["low"], frame["high"] = low, high
    if several:
        variance = sum(
            (weight * (item[1] + (item[0] - mean).square()) for weight, item in zip(weights, found)), torch.zeros(())
        )
        deviation = variance.sqrt().numpy()[:, 0]
        frame["spread"] = (_decoded(model, output + deviation) - _decoded(model, output - deviation)) / 2.0
    return frame


def _parts(model: TunedModel) -> list[tuple[torch.nn.Module, bool, float]]:
    """(network, whether it has dropout, weight) of every network."""
    if isinstance(model.model, Average):
        rates = [(member.dropout, member.weight) for member in model.members]
        return [(net, _any(rate), weight) for net, (rate, weight) in zip(model.model.mean.models, rates)]
    return [(model.model, _any(model.dropout), 1.0)]


def _any(dropout: float | tuple[float, ...]) -> bool:
    return dropout > 0.0 if isinstance(dropout, int | float) else any(rate > 0.0 for rate in dropout)


def _moments(
    network: torch.nn.Module, x: Tensor, classes: bool, dropout: bool, samples: int, seed: int
) -> tuple[Tensor, Tensor]:
    """(mean, mean entropy) over the masks for classes, (mean, variance) for numbers; float64."""
    network.eval()
    if not dropout or not len(x):
        with torch.inference_mode():
            y = network(x).double()
        return (y.softmax(-1), _entropy(y.softmax(-1))) if classes else (y, torch.zeros_like(y))
    found = predict_mc(network, x, samples, logits=classes, seed=seed)
    mean = found.mean.double()
    if not classes:
        return mean, found.variance.double()
    assert found.mutual_information is not None
    return mean, (_entropy(mean) - found.mutual_information.double()).clamp(min=0.0)


def _entropy(chances: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(chances).sum(-1)
    return entropy


def _decoded(model: TunedModel, output: Floats) -> Floats:
    return decode_target(output, model.target_mean, model.target_scale, model.log_target)

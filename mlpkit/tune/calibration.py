"""Probabilities that mean what they say: one temperature, fitted on rows that no network learnt from."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_LOW, _HIGH = math.log(0.05), math.log(20.0)
_STEPS = 60


def softmax(logits: Floats, temperature: float = 1.0) -> Floats:
    """softmax(logits / temperature) over the last axis."""
    scaled = logits / temperature
    powers = np.exp(scaled - scaled.max(axis=-1, keepdims=True, initial=-np.inf))
    chances: Floats = powers / powers.sum(axis=-1, keepdims=True)
    return chances


def fit_temperature(logits: Floats, truth: npt.NDArray[np.int64], weight: Floats | None = None) -> float:
    """The t > 0 for which softmax(logits / t) has the least log loss: Guo et al. (2017).

    logits: (rows, classes) by models that did not see the row; truth: class numbers; weight: of each row. The true
    class counts (n + 1) / (n + 2) of a row and the others share the rest (Platt, 1999), so that rows which are all
    right do not ask for certainty. t is sought in [0.05, 20].
    """
    rows, classes = logits.shape
    share = np.full(rows, 1.0 / rows) if weight is None else weight / weight.sum()
    doubt = 1.0 / (rows + 2.0)
    centred = logits - logits.max(axis=1, keepdims=True)
    wanted = (1.0 - doubt) * centred[np.arange(rows), truth]
    if classes > 1:
        wanted = wanted + doubt * (centred.sum(axis=1) - centred[np.arange(rows), truth]) / (classes - 1)

    def loss(log_t: float) -> float:
        scaled = centred * math.exp(-log_t)
        return float(share @ (np.log(np.exp(scaled).sum(axis=1)) - wanted * math.exp(-log_t)))

    # The loss is convex in 1 / t, so it has one minimum over log t: golden section.
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    low, high = _LOW, _HIGH
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = loss(left), loss(right)
    for _ in range(_STEPS):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = loss(right)
    return math.exp((low + high) / 2.0)


def calibration_error(chances: Floats, truth: npt.NDArray[np.int64], bins: int = 10) -> float:
    """Expected calibration error: mean distance of the top probability from the share of right answers, in ten bins."""
    sure, right = chances.max(axis=1), chances.argmax(axis=1) == truth
    number = np.clip((sure * bins).astype(int), 0, bins - 1)
    apart = [abs(float((sure - right)[number == at].sum())) for at in range(bins)]
    return float(sum(apart)) / max(1, len(truth))

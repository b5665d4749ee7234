"""One MLP and how it is trained: what the search proposes, and all that an engine needs to know about a member."""

from __future__ import annotations

import math
from dataclasses import dataclass

ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh", "sigmoid")
NORMS = (None, "batch", "layer")
INITS = ("xavier_uniform", "xavier_normal", "he_uniform", "he_normal", "normal")
OPTIMIZERS = ("sgd", "adam", "adamw", "rmsprop")
SCHEDULES = ("constant", "cosine", "exponential", "step", "one_cycle", "coslog4")
CLASS_LOSSES = ("cross_entropy", "squared")
NUMBER_LOSSES = ("mse", "huber", "l1")


@dataclass(frozen=True)
class Spec:
    """The fields of ``population.Member``, by the same names; plain values only.

    hidden: widths. lr: learning rate at the start. weight_decay: the optimizer's own (decoupled for adamw). seed: draws
    weights, masks and the order of batches; fold f uses seed + f. patience: epochs without a notable fall of the
    validation loss, or None. dropout: one rate for all hidden layers, or one each. schedule: how lr moves over
    ``epochs``; "exponential" and "cosine" end at lr * lr_decay. momentum: of sgd and rmsprop; beta1, beta2: of adam and
    adamw. l1: weight of the sum of absolute weights. label_smoothing: of cross_entropy. loss: None is cross_entropy for
    classes and mse for numbers; "squared" is the squared error of the probabilities.
    """

    hidden: tuple[int, ...]
    lr: float
    weight_decay: float
    batch_size: int
    seed: int
    activation: str = "relu"
    patience: int | None = 10
    dropout: float | tuple[float, ...] = 0.0
    norm: str | None = None
    init: str = "xavier_uniform"
    optimizer: str = "adamw"
    schedule: str = "constant"
    lr_decay: float = 0.01
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    l1: float = 0.0
    label_smoothing: float = 0.0
    loss: str | None = None
    epochs: int = 400


def lr_factor(schedule: str, progress: float, lr_decay: float) -> float:
    """What the learning rate is multiplied with when ``progress`` in [0, 1) of the epochs are done.

    constant 1; cosine from 1 to lr_decay along half a cosine; exponential the same along lr_decay**progress; step
    0.1 ** (thirds done); one_cycle up from 1/25 over the first 30 %, then a cosine to 1e-4 (Smith and Topin, 2017);
    coslog4 four cycles of 1/2 - 1/2 cos(2 pi log2(1 + 15 progress)) (Holzmueller et al., 2024).
    """
    if schedule == "cosine":
        return lr_decay + (1.0 - lr_decay) * 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "exponential":
        return float(lr_decay**progress)
    if schedule == "step":
        return float(0.1 ** int(3.0 * progress))
    if schedule == "one_cycle":
        if progress < 0.3:
            return 1.0 - (1.0 - 1.0 / 25) * 0.5 * (1.0 + math.cos(math.pi * progress / 0.3))
        return 1e-4 + (1.0 - 1e-4) * 0.5 * (1.0 + math.cos(math.pi * (progress - 0.3) / 0.7))
    if schedule == "coslog4":
        return 0.5 - 0.5 * math.cos(2.0 * math.pi * math.log2(1.0 + 15.0 * progress))
    return 1.0

"""One MLP and how it is trained: what the search proposes, and all that an engine needs to know about a member."""

from __future__ import annotations

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
    """The fields of ``population.Member``, mostly by the same names; plain values only.

    hidden: widths. lr: learning rate at the start. weight_decay: the optimizer's own (decoupled for adamw). seed: draws
    weights, masks and the order of batches; fold f uses seed + f. patience: epochs without a notable fall of the
    validation loss, or None. dropout: one rate for all hidden layers, or one each. schedule: how lr moves over
    ``epochs``, as of ``population.Member``; "exponential" and "cosine" end at lr * lr_decay, "step" falls to a tenth
    after each third. momentum: of sgd and rmsprop; beta1, beta2: of adam and adamw. l1: weight of the sum of absolute
    parameters. label_smoothing: of cross_entropy. loss: None is cross_entropy for classes and mse for numbers;
    "squared" is the squared error of the probabilities (the population's "brier").
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

"""``norm_act_dropout``: checks, the draw of the seed, and the running averages of batch norm."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mlpkit.errors import ArgumentError, ShapeError
from mlpkit.functional import _transforms
from mlpkit.functional._checks import (
    DEFAULT_NEGATIVE_SLOPE,
    check_activation,
    check_dense,
    check_placement,
    check_seed,
    check_slope,
    drawn_seed,
    negative_slope_fits,
    probability,
)
from mlpkit.ops.norm_act_dropout import NORMS, dispatched, eager

NAME = "norm_act_dropout"


class Averages(NamedTuple):
    """Batch norm's running averages, and how they are used."""

    mean: Tensor | None
    var: Tensor | None
    momentum: float
    used: bool  # in place of the batch's own statistics

    @property
    def given(self) -> tuple[Tensor | None, Tensor | None]:
        """What the op takes: the averages where they are used, nothing where it finds its own statistics."""
        return (self.mean, self.var) if self.used else (None, None)

    @property
    def missing(self) -> bool:
        """Whether averages are used that are not there: the op would find the batch's statistics instead."""
        return self.used and (self.mean is None or self.var is None)

    def fit(self, mean: Tensor) -> bool:
        """Whether they can take statistics like this mean: asked before anything is changed."""
        moved = [average for average in (self.mean, self.var) if average is not None]
        known = isinstance(self.momentum, (int, float)) and 0.0 <= self.momentum <= 1.0
        return known and len(moved) != 1 and all(average.shape == mean.shape for average in moved)

    def norm(self, z: Tensor, name: str | None, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """The norm of z's rows by PyTorch's own ops; it moves the averages unless they are used."""
        if name == "layer":
            return F.layer_norm(z, z.shape[-1:], weight, bias, eps)
        if name == "batch":
            rows = z.reshape(-1, z.shape[-1])
            y = F.batch_norm(rows, self.mean, self.var, weight, bias, not self.used, self.momentum, eps)
            return y.reshape(z.shape)
        return z

    def take(self, mean: Tensor, variance: Tensor, rows: int) -> None:
        """Move towards the statistics of a batch, as PyTorch does: by the unbiased variance."""
        if self.mean is None or self.var is None or rows < 2:
            return
        keep = 1.0 - self.momentum
        with torch.no_grad():
            self.mean.mul_(keep).add_(mean, alpha=self.momentum)
            self.var.mul_(keep).add_(variance, alpha=self.momentum * rows / (rows - 1))


def norm_act_dropout(
    z: Tensor,
    norm: str | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    slope: float | Tensor | None = None,
    p: float = 0.0,
    training: bool = True,
    frozen: bool = False,
    seed: int | Tensor | None = None,
    stream: int = 0,
) -> Tensor:
    """Same as ``dropout(act(batch_norm(z)), p, training)``, or with ``layer_norm``, or with no norm, in one pass.

    z: (..., features); returns the same shape and dtype, float64, float32, bfloat16 or float16. norm: ``"batch"``, one
    mean and variance a feature, over all leading dimensions; ``"layer"``, one a row, over the features; or None.
    weight, bias: (features,), None for 1 and 0. Statistics, norm, activation and dropout are computed in float32
    (float64 for float64) and rounded once. All arguments have z's dtype, or float32 beside 16 bits; autocast casts
    nothing here, as in PyTorch's batch norm.

    running_mean, running_var: (features,), of batch norm, given together: in training moved in place by ``momentum``
    towards the batch's statistics (the unbiased variance, as in PyTorch), and used instead of them where not training,
    or where frozen: that stops them alone and leaves dropout on. momentum is a number; for a cumulative average give
    1 / (number of batches so far).

    activation, slope, p, seed and stream as in ``linear_act_dropout``: equal seeds drop the same elements. Raises
    ShapeError (a batch of one row in training has no variance), DtypeError, DeviceError or ArgumentError, each naming
    the argument. Differentiable once; under ``torch.func`` transforms as ``linear_act_dropout`` is.
    """
    averages = Averages(running_mean, running_var, momentum, norm == "batch" and (frozen or not training))

    def refuse() -> None:
        check(z, norm, weight, bias, averages, eps, activation, slope, p, seed, stream)

    # The native checks cannot see these: they are overruled, or not the op's.
    fits = slope is None or isinstance(slope, Tensor) or negative_slope_fits(activation, slope)
    if (
        not (fits and probability(p) and valid_eps(eps))
        or averages.missing
        or (norm != "batch" and running_mean is not None)
    ):
        refuse()
    if not training:
        p = 0.0
    slope_tensor = slope if isinstance(slope, Tensor) else None
    negative_slope = slope if isinstance(slope, (int, float)) else DEFAULT_NEGATIVE_SLOPE
    if _transforms.transformed():
        refuse()
        drawn = drawn_seed(NAME, seed, z) if p > 0.0 else None
        u = averages.norm(z, norm, weight, bias, eps)
        return _transforms.act_dropout(u, activation, slope, p, drawn, stream)
    call = eager
    if torch.compiler.is_compiling():
        refuse()
        call = dispatched
    try:
        drawn = drawn_seed(NAME, seed, z) if p > 0.0 else None
        y, mean, variance = call(
            z, weight, bias, *averages.given, slope_tensor, drawn, norm or "none", eps, activation, negative_slope, p,
            stream,
        )  # fmt: skip
    except Exception:
        # The native checks are quick; these name the argument in the user's words.
        refuse()
        raise
    if norm == "batch" and not averages.used:
        if not averages.fit(mean):
            refuse()
        averages.take(mean, variance, math.prod(z.shape[:-1]))
    result: Tensor = y
    return result


def valid_eps(eps: float) -> bool:
    """Whether eps is a finite number of at least 0."""
    return isinstance(eps, (int, float)) and 0.0 <= eps < math.inf


def check(
    z: Tensor,
    norm: str | None,
    weight: Tensor | None,
    bias: Tensor | None,
    averages: Averages,
    eps: float,
    activation: str,
    slope: float | Tensor | None,
    p: float,
    seed: int | Tensor | None,
    stream: int,
) -> None:
    """Raise the error that names the argument, what it was and what it must be."""
    check_activation(NAME, activation, p, stream)
    affine = {"weight": weight, "bias": bias}
    running = {"running_mean": averages.mean, "running_var": averages.var}
    check_dense(NAME, {"z": z, **affine, **running}, needed=("z",))
    if z.dim() == 0:
        raise ShapeError(f"{NAME}: z has no dimensions; it must be (..., features)")
    _check_norm(norm, affine, averages, eps)
    check_slope(NAME, activation, slope, z.shape[-1])
    check_seed(NAME, seed, z)
    given = {name: tensor for name, tensor in {**affine, **running}.items() if tensor is not None}
    for name, tensor in given.items():
        if tuple(tensor.shape) != (z.shape[-1],):
            raise ShapeError(f"{NAME}: {name} has shape {tuple(tensor.shape)}; it must be ({z.shape[-1]},)")
    others = given | ({"slope": slope} if isinstance(slope, Tensor) else {})
    check_placement(NAME, "z", z, others, wide=True)
    if norm == "batch" and not averages.used and math.prod(z.shape[:-1]) == 1:
        raise ShapeError(
            f"{NAME}: Expected more than 1 value per channel when training, got input size {tuple(z.shape)}"
        )


def _check_norm(norm: str | None, affine: dict[str, Tensor | None], averages: Averages, eps: float) -> None:
    """Raise ArgumentError for an unknown norm, for parts that only another one has, and for a bad eps or momentum."""
    if norm is not None and norm not in NORMS:
        raise ArgumentError(f"{NAME}: norm is {norm!r}; it must be one of {', '.join(NORMS)}, or None")
    for name, tensor in affine.items():
        if norm is None and tensor is not None:
            raise ArgumentError(f"{NAME}: {name} was given; norm is None, and only a norm has one")
    if (averages.mean is None) != (averages.var is None):
        missing = "running_mean" if averages.mean is None else "running_var"
        raise ArgumentError(f"{NAME}: {missing} is None; running averages are given together or not at all")
    if averages.mean is not None and norm != "batch":
        raise ArgumentError(f"{NAME}: running_mean was given; norm is {norm!r}, and only batch norm has averages")
    if averages.used and averages.mean is None:
        raise ArgumentError(f"{NAME}: running_mean is None; batch norm without training wants running averages")
    if not isinstance(averages.momentum, (int, float)) or not 0.0 <= averages.momentum <= 1.0:
        raise ArgumentError(
            f"{NAME}: momentum is {averages.momentum!r}; it must be a number in [0, 1] "
            "(for a cumulative average 1 / number of batches)"
        )
    if not valid_eps(eps):
        raise ArgumentError(f"{NAME}: eps is {eps!r}; it must be a finite number of at least 0")

"""What follows a hidden linear layer in an MLP with norms: norm, activation and dropout, computed as one op."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from mlpkit import functional
from mlpkit.nn._recognise import Activation, hooked, of_type


class Parts(NamedTuple):
    """A block's arguments for ``functional.norm_act_dropout``; frozen: the norm uses its running averages."""

    norm: str
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    momentum: float
    eps: float
    frozen: bool
    activation: str
    slope: float | Tensor | None


class NormActDropout(nn.Sequential):
    """A norm, an activation and ``nn.Dropout`` of PyTorch, which hold parameters, buffers and modes, as one op.

    x: (..., features), leading dimensions are rows; returns the same shape. Norm and activation are called as modules
    where they are hooked or are not what MLP put there; the dropout is not called, unless it was replaced.
    """

    @property
    def rate(self) -> float:
        """The probability to drop an element now: 0 where the dropout is in eval."""
        dropout = self[-1]
        return float(dropout.p) if type(dropout) is nn.Dropout and dropout.training else 0.0

    def forward(self, x: Tensor, *, seed: int | Tensor | None = None, stream: int = 0) -> Tensor:
        """Apply the block; ``seed`` and ``stream`` choose the dropout mask (no seed: drawn by torch's generator)."""
        parts = self.parts()
        if parts is None:
            modules = list(self)
            if type(modules[-1]) is nn.Dropout:
                modules.pop()
            # BatchNorm1d takes dimension 1 as features.
            y = x.reshape(-1, x.shape[-1])
            for module in modules:
                y = module(y)
            y = y.reshape(x.shape)
            if not self.rate:
                return y
            return functional.norm_act_dropout(y, None, activation="identity", p=self.rate, seed=seed, stream=stream)
        y = functional.norm_act_dropout(
            x,
            parts.norm,
            parts.weight,
            parts.bias,
            running_mean=parts.mean,
            running_var=parts.var,
            momentum=parts.momentum,
            eps=parts.eps,
            activation=parts.activation,
            slope=parts.slope,
            p=self.rate,
            frozen=parts.frozen,
            seed=seed,
            stream=stream,
        )
        self.count()
        return y

    def count(self) -> None:
        """Tell a batch norm in training that it saw a batch."""
        norm = self[0]
        if isinstance(norm, nn.BatchNorm1d) and norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)

    def parts(self) -> Parts | None:
        """The block as one op; None where its modules must be called."""
        modules = tuple(self._modules.values())
        if len(modules) != 3 or type(modules[2]) is not nn.Dropout:
            return None
        norm, act = modules[:2]
        if norm is None or act is None or hooked(norm) or hooked(act):
            return None
        activation = Activation("identity") if type(act) is nn.Identity else of_type(act)
        if not isinstance(activation, Activation):
            return None
        slope = activation.prelu.weight if activation.prelu else activation.slope
        if isinstance(norm, nn.LayerNorm) and type(norm) is nn.LayerNorm and len(norm.normalized_shape) == 1:
            return Parts("layer", norm.weight, norm.bias, None, None, 0.1, norm.eps, False, activation.name, slope)
        if not isinstance(norm, nn.BatchNorm1d) or type(norm) is not nn.BatchNorm1d or norm.momentum is None:
            return None
        if norm.running_mean is None:  # batch statistics in any mode
            return Parts("batch", norm.weight, norm.bias, None, None, 0.1, norm.eps, False, activation.name, slope)
        averages = (norm.running_mean, norm.running_var, norm.momentum)
        return Parts("batch", norm.weight, norm.bias, *averages, norm.eps, not norm.training, activation.name, slope)

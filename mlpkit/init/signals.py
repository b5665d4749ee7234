"""The check: what a start does to signals on the way forward and to gradients on the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError
from mlpkit.init._run import buffers_and_random_state_kept, call
from mlpkit.init.draws import fans, is_layer, known_name, variance


@dataclass(frozen=True)
class LayerCheck:
    """One layer of an ``InitCheck``: variances of its output (activation included) and of the gradient there.

    Ratios compare with the layer before in the direction of travel: forward with the previous layer, backward with the
    next one. symmetric: units with the same incoming weights as another; dead: share of units that are 0 for the whole
    batch; saturated: share of outputs where a sigmoid or tanh has under 1 % of its largest slope, None without either.
    spectral_norm, condition_number: largest singular value of the weight as a matrix (out, the rest), and its ratio to
    the smallest (inf where that is 0); NaN for a weight that is not finite.
    """

    name: str
    units: int
    forward_variance: float
    forward_ratio: float | None
    backward_variance: float | None
    backward_ratio: float | None
    weight_variance: float
    expected_variance: float
    symmetric: int
    dead: float
    saturated: float | None
    spectral_norm: float
    condition_number: float


@dataclass(frozen=True)
class InitCheck:
    """What ``check`` measured, layer by layer; prints as a table. init: the rule that ``expected_variance`` is of."""

    init: str
    layers: tuple[LayerCheck, ...]

    @property
    def product_bound(self) -> float:
        """The product of the spectral norms: Szegedy et al. (2014), "Intriguing properties of neural networks".

        At most so far apart, per unit of distance between two inputs, are the outputs of a network of these linear
        layers in a row with activations of slope at most 1 (relu, leaky_relu, tanh, sigmoid; gelu and silu reach 1.13
        and 1.10). Norms, skip connections and convolutions, whose matrix is not the whole operator, are outside it.
        """
        return math.prod(layer.spectral_norm for layer in self.layers)

    def __str__(self) -> str:
        header = ["layer", "units", "forward var", "x prev", "gradient var", "x next", "weight var", "expected"]
        header += ["spectral", "condition", "symmetric", "dead", "saturated"]
        rows = [header, *(_row(layer) for layer in self.layers)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
            for row in rows
        ]
        bound = f"product of spectral norms: {self.product_bound:.3g}"
        return "\n".join([f"init.check against {self.init}", *lines, bound])


def _row(layer: LayerCheck) -> list[str]:
    numbers = [layer.forward_variance, layer.forward_ratio, layer.backward_variance, layer.backward_ratio]
    numbers += [layer.weight_variance, layer.expected_variance, layer.spectral_norm, layer.condition_number]
    cells = ["-" if number is None else f"{number:.3g}" for number in numbers]
    shares = ["-" if share is None else f"{100 * share:.1f} %" for share in (layer.dead, layer.saturated)]
    return [layer.name, str(layer.units), *cells, str(layer.symmetric), *shares]


def check(model: nn.Module, batch: Tensor | Sequence[Any] | Mapping[str, Any], *, init: str | None = None) -> InitCheck:
    """Send a batch through the model and unit normal noise back: how do variances travel, which units cannot learn?

    batch: what the model takes, a tensor (rows, ...), tuple or dict. Dropout is off and norms use batch statistics, as
    at the start of training. init: the rule to compare weights with; if None the model's own ``init``, else Xavier. A
    layer is a linear or convolution module, with whatever modules follow it up to the next; an activation called as a
    function counts where the next layer takes its result. Mode, gradients, buffers and random state stay as they are.
    Raises ArgumentError when the model has no layer or its output is no floating tensor.
    """
    rule = known_name(init or getattr(model, "init", None) or "xavier_uniform")
    names = {module: name for name, module in model.named_modules()}
    with _untouched(model), _recording(names) as signals, torch.enable_grad():
        output = call(model, batch)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ArgumentError(
                f"init.check: the model's output is {type(output).__name__}; it must be a floating tensor"
            )
        if not signals:
            raise ArgumentError(f"init.check: no linear or convolution layer of {type(model).__name__} was called")
        gradients = _gradients(output, [signal.output for signal in signals])
    layers: list[LayerCheck] = []
    backward = [None if gradient is None else _variance(gradient) for gradient in gradients] + [None]
    for index, signal in enumerate(signals):
        before = layers[-1].forward_variance if layers else None
        layers.append(_measure(signal, rule, before, backward[index], backward[index + 1]))
    return InitCheck(rule, tuple(layers))


@dataclass
class _Signal:
    """A layer under way through the network: ``output`` moves on until the next layer takes it."""

    name: str
    layer: Any
    output: Tensor
    followers: list[nn.Module] = field(default_factory=list)


def _measure(
    signal: _Signal, rule: str, forward_before: float | None, backward: float | None, backward_next: float | None
) -> LayerCheck:
    layer, output = signal.layer, signal.output.detach()
    weight = layer.weight.detach()
    forward = _variance(output)
    units = output.movedim(1, -1) if isinstance(layer, nn.modules.conv._ConvNd) else output
    fan_in, fan_out = fans(weight)
    spectral_norm, condition_number = _singular(weight)
    return LayerCheck(
        name=signal.name,
        units=weight.shape[0],
        forward_variance=forward,
        forward_ratio=_ratio(forward, forward_before),
        backward_variance=backward,
        backward_ratio=_ratio(backward, backward_next),
        weight_variance=_variance(weight),
        expected_variance=variance(rule, fan_in, fan_out),
        symmetric=_symmetric(weight, layer.bias),
        dead=(units.reshape(-1, units.shape[-1]) == 0).all(0).double().mean().item(),
        saturated=_saturated(signal),
        spectral_norm=spectral_norm,
        condition_number=condition_number,
    )


def _singular(weight: Tensor) -> tuple[float, float]:
    """Spectral norm and condition number; a convolution's as Miyato et al. (2018) take it, (out, all else)."""
    if not weight.isfinite().all():
        return math.nan, math.nan
    values = torch.linalg.svdvals(weight.flatten(1).double())
    largest, smallest = values[0].item(), values[-1].item()
    return largest, largest / smallest if smallest > 0 else math.inf


def _symmetric(weight: Tensor, bias: Tensor | None) -> int:
    """Units that share all incoming weights and the bias with another; without dropout nothing tells them apart."""
    rows = weight.flatten(1) if bias is None else torch.cat([weight.flatten(1), bias.detach()[:, None]], 1)
    _, counts = torch.unique(rows.double(), dim=0, return_counts=True)
    return int(counts[counts > 1].sum())


def _saturated(signal: _Signal) -> float | None:
    """Slopes from the output alone: tanh' = 1 - y^2 (at most 1), sigmoid' = y (1 - y) (at most 1/4)."""
    kinds = [getattr(signal.layer, "activation", "")] + [type(module).__name__.lower() for module in signal.followers]
    y = signal.output.detach().double()
    if "tanh" in kinds:
        return (1 - y * y < 0.01).double().mean().item()
    if "sigmoid" in kinds:
        return (4 * y * (1 - y) < 0.01).double().mean().item()
    return None


@contextmanager
def _recording(names: Mapping[nn.Module, str]) -> Iterator[list[_Signal]]:
    """Yield the list that fills with one signal per layer, in order of first call."""
    signals: list[_Signal] = []

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        same = signals and inputs and isinstance(inputs[0], Tensor) and inputs[0].shape == signals[-1].output.shape
        if same and inputs[0].requires_grad:
            signals[-1].output = inputs[0]

    def after(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, Tensor):
            return
        if is_layer(module):
            if all(signal.layer is not module for signal in signals):
                signals.append(_Signal(names[module], module, output))
        elif signals and output.shape == signals[-1].output.shape:
            signals[-1].output = output
            signals[-1].followers.append(module)

    with ExitStack() as hooks:
        for module in names:
            if is_layer(module):
                hooks.callback(module.register_forward_pre_hook(before).remove)
            if is_layer(module) or not any(True for _ in module.children()):
                hooks.callback(module.register_forward_hook(after).remove)
        yield signals


@contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Dropout off, batch statistics on; afterwards modes, buffers and random state are as before."""
    modes = {module: module.training for module in model.modules()}
    try:
        with buffers_and_random_state_kept(model):
            model.eval()
            for module in modes:
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.train()
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _gradients(output: Tensor, signals: list[Tensor]) -> list[Tensor | None]:
    known = [signal for signal in signals if signal.requires_grad]
    if not known or not output.requires_grad:
        return [None] * len(signals)
    generator = torch.Generator(output.device).manual_seed(0)
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype, device=output.device)
    found = iter(torch.autograd.grad(output, known, noise, allow_unused=True))
    return [next(found) if signal.requires_grad else None for signal in signals]


def _variance(tensor: Tensor) -> float:
    return tensor.detach().double().var(correction=0).item()


def _ratio(value: float | None, before: float | None) -> float | None:
    return None if value is None or not before else value / before

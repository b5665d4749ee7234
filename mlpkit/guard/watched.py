"""An MLP as the native step takes it, and all that must stay as it is for that to be true."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from mlpkit.nn import MLP
from mlpkit.nn._whole import norms_of, whole

# (kind, eps, momentum, frozen, weight, bias, running mean, running variance, batches seen)
Norm = tuple[str, float, float, bool, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
_MOST_LAYERS = 64
_LAYER = ("activation", "slope")
_NORM = ("eps", "momentum", "training", "normalized_shape", "track_running_stats")
_ACTIVATION = ("negative_slope", "approximate", "inplace")


class Layer(NamedTuple):
    """One layer's tensors; slope: prelu's."""

    weight: Tensor
    bias: Tensor | None
    slope: Tensor | None
    norm: Norm | None


class Network(NamedTuple):
    """All layers; activation and negative_slope (leaky_relu's) are of the hidden ones."""

    layers: list[Layer]
    activation: str
    negative_slope: float

    def parameters(self) -> list[Tensor]:
        """Weight, bias, norm weight, norm bias and slope of each layer, absent ones left out."""
        found: list[Tensor | None] = []
        for layer in self.layers:
            norm = (None, None) if layer.norm is None else layer.norm[4:6]
            found += [layer.weight, layer.bias, *norm, layer.slope]
        return [parameter for parameter in found if parameter is not None]

    def buffers(self) -> list[Tensor]:
        """Of the norms."""
        return [buffer for layer in self.layers if layer.norm for buffer in layer.norm[6:] if buffer is not None]

    def fits(self) -> bool:
        """Whether every tensor has the size that the layers around it ask for."""
        columns = self.layers[0].weight.shape[-1]
        for layer in self.layers:
            if layer.weight.dim() != 2 or layer.weight.shape[1] != columns:
                return False
            columns = layer.weight.shape[0]
            vectors = [layer.bias, *(layer.norm[4:8] if layer.norm else ())]
            if any(vector is not None and vector.shape != (columns,) for vector in vectors):
                return False
            if layer.slope is not None and layer.slope.numel() not in (1, columns):
                return False
        hidden = self.layers[:-1]
        slopes = self.activation != "prelu" or all(layer.slope is not None for layer in hidden)
        return slopes and len(self.layers) <= _MOST_LAYERS


def network_of(model: MLP) -> Network | None:
    """None where hooks, replaced modules or unequal layers make it another network than its layers say."""
    plain = whole(model.layers)
    blocks: dict[str, Any] | None = norms_of(model.blocks) if plain and model.blocks else {}
    if plain is None or blocks is None:
        return None
    activation, slope = blocks.get("activation", plain.activation), blocks.get("slope", plain.slope)
    slopes: list[Tensor | None] = [*slope] if isinstance(slope, list) else []
    layers = []
    for index, (weight, bias) in enumerate(zip(plain.weights, plain.biases)):
        norm = _norm(model.blocks[index], blocks, index) if index < len(model.blocks) else None
        layers.append(Layer(weight, bias, slopes[index] if index < len(slopes) else None, norm))
    return Network(layers, activation, slope if isinstance(slope, float) else 0.0)


def _norm(block: nn.Module, arguments: dict[str, Any], index: int) -> Norm:
    kind, frozen = arguments["norm"], arguments["frozen"]
    mean, variance = arguments["running_means"][index], arguments["running_vars"][index]
    norm = next(block.children())
    batches = norm.num_batches_tracked if isinstance(norm, nn.BatchNorm1d) else None
    weight, bias = arguments["norm_weights"][index], arguments["norm_biases"][index]
    return kind, arguments["eps"], arguments["momentum"], frozen, weight, bias, mean, variance, batches


class Watched:
    """Modules that must stay plain, dicts that must keep their items, entries that must keep their value, and rates."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.dicts: list[dict[str, Any]] = []
        self.entries: list[tuple[dict[str, Any], str]] = []
        self.rates: list[tuple[dict[str, Any], str]] = []

    def add(self, module: nn.Module, settings: Iterable[str] = ()) -> None:
        """A module with its tensors, children and settings."""
        self.modules.append(module)
        self.dicts += [module._parameters, module._buffers, module._modules]
        self.entries += [(vars(module), name) for name in settings if name in vars(module)]

    def add_model(self, model: MLP) -> None:
        """All of an MLP whose ``network_of`` is known."""
        self.add(model)
        self.add(model.layers)
        self.add(model.blocks)
        for layer in model.layers:
            self.add(layer, _LAYER)
        for block in model.blocks:
            norm, activation, dropout = block.children()
            self.add(block)
            self.add(norm, _NORM)
            self.add(activation, _ACTIVATION)
            self.rates.append((vars(dropout), "p"))
        *hidden, last = model.layers
        self.entries.append((vars(last), "dropout"))  # none: a value of its own would be noticed
        if not model.blocks:
            self.rates = [(vars(layer), "dropout") for layer in hidden]

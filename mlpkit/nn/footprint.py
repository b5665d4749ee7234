"""How many bytes a model takes, layer by layer, found by running it on tensors without data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError
from mlpkit.nn._arguments import size
from mlpkit.nn._block import NormActDropout


@dataclass(frozen=True)
class LayerFootprint:
    """Bytes of one module. saved: held for the backward pass and counted nowhere above, parameters and input apart.

    output: what the module allocates for its result in training, 0 where that is its input or computed in place; it is
    part of ``saved`` of whichever module saves it. A tensor that several modules hold counts with the first.
    """

    name: str
    kind: str
    parameters: int
    gradients: int
    buffers: int
    output: int
    saved: int


@dataclass(frozen=True)
class Footprint:
    """What ``memory_footprint`` predicts, in bytes; prints as a table.

    input: the batch; result: the model's output where no layer saves it; working: the largest input and output of one
    module together, in evaluation without gradients.
    """

    batch_size: int
    input: int
    result: int
    working: int
    layers: tuple[LayerFootprint, ...]

    @property
    def parameters(self) -> int:
        """Bytes of all parameters, shared ones once."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def gradients(self) -> int:
        """Bytes of the gradients of all parameters that ask for one."""
        return sum(layer.gradients for layer in self.layers)

    @property
    def buffers(self) -> int:
        """Bytes of all buffers."""
        return sum(layer.buffers for layer in self.layers)

    @property
    def saved(self) -> int:
        """Bytes that the forward pass keeps for the backward pass, without parameters, buffers and input."""
        return sum(layer.saved for layer in self.layers)

    @property
    def inference(self) -> int:
        """Parameters, buffers, and the largest input and output of one module together."""
        return self.parameters + self.buffers + self.working

    @property
    def training(self) -> int:
        """What is held when the backward pass begins, and the gradients that it leaves; no optimizer's state."""
        return self.parameters + self.gradients + self.buffers + self.input + self.saved + self.result

    def __str__(self) -> str:
        header = ("layer", "kind", "parameters", "gradients", "buffers", "output", "saved")
        rows = [header, *(tuple(f"{value}" for value in vars(layer).values()) for layer in self.layers)]
        totals = (self.parameters, self.gradients, self.buffers, "", self.saved)
        rows.append(("total", "", *(str(value) for value in totals)))
        widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
        lines = [
            "  ".join(
                cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
            )
            for row in rows
        ]
        head = f"batch of {self.batch_size}: {self.inference} bytes for inference, {self.training} for training"
        return "\n".join([head, *(line.rstrip() for line in lines)])


def memory_footprint(model: nn.Module, batch_size: int, *, shape: Sequence[int] | None = None) -> Footprint:
    """Predict the bytes that ``model`` takes for a batch: for inference, and for training layer by layer.

    shape: of one row of the input; if None, the features of the model's first linear layer. The input has the dtype and
    device of the model's first floating parameter. Runs the model twice on fake tensors, which have shapes and no data:
    nothing of the batch is allocated and neither parameters, buffers, modes, gradients nor random state are touched.
    Training is as the model stands, or with all of it in training mode if it is in eval. Memory that an operation takes
    and gives back inside, autocast's copies and optimizer state do not count.

    Raises ArgumentError when batch_size is no int of at least 1, when the shape of the input is not known, or when
    shapes inside the model depend on data.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"memory_footprint: model is {type(model).__name__}; it must be an nn.Module")
    rows = size("memory_footprint", "batch_size", batch_size)
    row_shape = _row_shape(model) if shape is None else tuple(shape)
    held, working = _Held(model), _Held(model)
    modes = {module: module.training for module in model.modules()}
    try:
        if not model.training:
            _set_modes(dict.fromkeys(modes, True))
        result = _run(model, (rows, *row_shape), held, grad=True)
        _set_modes(dict.fromkeys(modes, False))
        _run(model, (rows, *row_shape), working, grad=False)
    finally:
        _set_modes(modes)
    return Footprint(rows, held.input, held.unsaved(result), working.largest, _layers(model, held))


class _Held:
    """Storages met in one run: who allocated them, and who saved them first."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.known: dict[Any, Any] = {}  # parameters, buffers, input: not to be counted again
        self.seen: dict[Any, Any] = {}
        self.stored: dict[Any, Any] = {}
        self.saved: dict[nn.Module, int] = {}
        self.output: dict[nn.Module, int] = {}
        self.stack: list[nn.Module] = [model]
        self.input = self.largest = 0

    def save(self, tensor: Tensor) -> Tensor:
        """The hook of autograd: count a storage once, for the module whose forward is running."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.known and storage._cdata not in self.stored:
            # Kept alive, so that no other storage gets its address.
            self.stored[storage._cdata] = storage
            self.saved[self.stack[-1]] = self.saved.get(self.stack[-1], 0) + storage.nbytes()
        return tensor

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Before a module's forward."""
        self.stack.append(module)

    def leave(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """After a module's forward: what it allocated for its result and no module within did."""
        self.stack.pop()
        new = {one._cdata: one for one in _storages(output) if one._cdata not in self.seen | self.known}
        self.seen |= new
        taken = sum(one.nbytes() for one in new.values())
        self.output[module] = self.output.get(module, 0) + taken
        if taken:
            self.largest = max(self.largest, taken + sum(one.nbytes() for one in _storages(inputs)))

    def unsaved(self, result: Any) -> int:
        """Bytes of the result that are neither saved nor the input's or a parameter's."""
        return sum(one.nbytes() for one in _storages(result) if one._cdata not in self.stored | self.known)


def _run(model: nn.Module, shape: tuple[int, ...], held: _Held, grad: bool) -> Any:
    # Imported here: this brings in a good part of torch's compiler.
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        FakeTensorMode,
    )
    from torch.func import functional_call

    mode = FakeTensorMode()
    state: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        state[name] = mode.from_tensor(tensor.detach()).requires_grad_(tensor.requires_grad)
    like = next((tensor for tensor in state.values() if tensor.is_floating_point()), torch.empty(0))
    with mode, _hooks(model, held), torch.set_grad_enabled(grad):
        x = torch.empty(shape, dtype=like.dtype, device=like.device)
        held.input = x.untyped_storage().nbytes()
        held.known = {one._cdata: one for one in _storages([x, *state.values()])}
        try:
            with torch.autograd.graph.saved_tensors_hooks(held.save, lambda tensor: tensor):
                return functional_call(model, state, (x,))
        except (DataDependentOutputException, DynamicOutputShapeException) as error:
            raise ArgumentError(
                f"memory_footprint: shapes in {type(model).__name__} depend on data: {error}"
            ) from error


@contextmanager
def _hooks(model: nn.Module, held: _Held) -> Iterator[None]:
    # A block of an MLP is one op, and would call its parts if they were hooked.
    within = {part for block in model.modules() if isinstance(block, NormActDropout) for part in block}
    with ExitStack() as hooks:
        for module in set(model.modules()) - within:
            hooks.callback(module.register_forward_pre_hook(held.enter).remove)
            hooks.callback(module.register_forward_hook(held.leave).remove)
        yield


def _layers(model: nn.Module, held: _Held) -> tuple[LayerFootprint, ...]:
    counted: set[Tensor] = set()
    layers = []
    for name, module in model.named_modules():
        parameters = [one for one in module.parameters(recurse=False) if one not in counted]
        buffers = [one for one in module.buffers(recurse=False) if one not in counted]
        counted |= {*parameters, *buffers}
        layer = LayerFootprint(
            name=name,
            kind=type(module).__name__,
            parameters=sum(_bytes(one) for one in parameters),
            gradients=sum(_bytes(one) for one in parameters if one.requires_grad),
            buffers=sum(_bytes(one) for one in buffers),
            output=held.output.get(module, 0),
            saved=held.saved.get(module, 0),
        )
        if layer.parameters or layer.buffers or layer.output or layer.saved:
            layers.append(layer)
    return tuple(layers)


def _row_shape(model: nn.Module) -> tuple[int, ...]:
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            break
        if isinstance(getattr(module, "in_features", None), int):
            return (int(module.in_features),)  # type: ignore[arg-type]
    raise ArgumentError(
        f"memory_footprint: {type(model).__name__} does not start with a linear layer; give the shape of one row"
    )


def _set_modes(modes: dict[nn.Module, bool]) -> None:
    for module, training in modes.items():
        module.training = training


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _storages(value: Any) -> list[torch.UntypedStorage]:
    if isinstance(value, Tensor):
        return [value.untyped_storage()]
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return list({one._cdata: one for part in values for one in _storages(part)}.values())

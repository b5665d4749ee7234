"""``export``: any model with layers of ours as an ONNX file of stock operators."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import nn

from mlpkit.errors import ArgumentError
from mlpkit.nn import MLP, FusedLinear
from mlpkit.report._extras import require


def stock(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in which every ``nn.MLP`` and ``nn.FusedLinear`` is made of stock modules.

    In eval its outputs equal the model's up to rounding. ``torch.export`` needs no such copy where mlpkit is installed
    when the program is run; ONNX, and machines without mlpkit, do. Raises ArgumentError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"stock: model is {type(model).__name__}; it must be a torch.nn.Module")
    if isinstance(model, (MLP, FusedLinear)):
        return model.to_sequential()
    copied = copy.deepcopy(model)
    made: dict[int, nn.Module] = {}
    for module in [*copied.modules()]:
        for name, child in module._modules.items():
            if isinstance(child, (MLP, FusedLinear)):
                module._modules[name] = made.setdefault(id(child), child.to_sequential())
    return copied


def export(model: nn.Module, example: Any, path: str | os.PathLike[str]) -> None:
    """Write ``model`` in eval mode to ``path`` as ONNX; ``example``: a tensor or a tuple of them, first axis free.

    Same as ``torch.onnx.export(stock(model).eval(), example, path, dynamo=True)`` with any number of rows. Raises
    MissingExtraError without onnxscript, ArgumentError for what is no module or no tensor, and what torch raises for a
    model that it cannot export.
    """
    require("onnxscript", "mlpkit.interop.onnx", "interop")
    inputs = example if isinstance(example, tuple) else (example,)
    if not inputs or not all(isinstance(one, torch.Tensor) and one.dim() for one in inputs):
        raise ArgumentError("export: example must be a tensor, or a tuple of tensors, of at least one dimension")
    rows = torch.export.Dim("rows")
    shapes = tuple({0: rows} for _ in inputs)
    torch.onnx.export(stock(model).eval(), inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)

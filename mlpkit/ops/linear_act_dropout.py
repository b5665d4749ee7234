"""Op page of ``linear_act_dropout``: fake kernels and autocast. The rest: csrc/ops/linear_act_dropout.cpp."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlpkit._ext import _C

ACTIVATIONS = ("identity", "relu", "leaky_relu", "prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
NEEDS_PREACTIVATION = ("prelu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")

eager = _C.linear_act_dropout
dispatched = torch.ops.mlpkit.linear_act_dropout.default


def bits_bytes(rows: int, cols: int, activation: str, p: float) -> int:
    """How many bytes of live bits are saved for a (rows, cols) output."""
    draws = 0 < int(p * 65536 + 0.5) < 65536
    planes = int(draws or activation == "relu") + int(activation == "leaky_relu")
    return planes * ((rows + 15) // 16) * ((cols + 15) // 16) * 32


@torch.library.register_fake("mlpkit::linear_act_dropout_forward")  # type: ignore[untyped-decorator]
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slope: Tensor | None,
    seed: Tensor | None,
    activation: str,
    negative_slope: float,
    p: float,
    stream: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    others = {"weight": weight, "bias": bias, "slope": slope, "seed": seed}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"linear_act_dropout: {name} is on {tensor.device}; it must be on x's {x.device}")
    cols = weight.shape[0]
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    y = x.new_empty((*x.shape[:-1], cols))
    z = x.new_empty((0,))
    if save and activation in NEEDS_PREACTIVATION:
        # The CPU saves slopes, those of bfloat16 in float16.
        halves = x.device.type == "cpu" and x.dtype == torch.bfloat16 and activation != "prelu"
        z = y.new_empty(y.shape, dtype=torch.float16 if halves else x.dtype)
    bits = x.new_empty((bits_bytes(rows, cols, activation, p) if save else 0,), dtype=torch.uint8)
    return y, z, bits


@torch.library.register_fake("mlpkit::linear_act_dropout_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    slope: Tensor | None,
    z: Tensor,
    bits: Tensor,
    activation: str,
    negative_slope: float,
    p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    absent = (0,)
    return (
        x.new_empty(x.shape if needs[0] else absent),
        x.new_empty(weight.shape if needs[1] else absent),
        x.new_empty((weight.shape[0],) if needs[2] else absent),
        x.new_empty(slope.shape if needs[3] and slope is not None else absent),
    )


def cast_like_linear(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """As ``torch.nn.functional.linear`` under autocast: floating arguments but fp64 take the context's dtype."""
    if tensor is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)


def _autocast(x: Tensor, weight: Tensor, bias: Tensor | None, slope: Tensor | None, *rest: Any) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        result: Tensor = dispatched(*(cast_like_linear(tensor, dtype) for tensor in (x, weight, bias, slope)), *rest)
    return result


_library = torch.library.Library("mlpkit", "FRAGMENT")  # type: ignore[no-untyped-call]
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("linear_act_dropout", _autocast, _key)  # type: ignore[no-untyped-call]

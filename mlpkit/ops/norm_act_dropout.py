"""Op page of ``norm_act_dropout``: fake kernels. The rest: csrc/ops/norm_act_dropout.cpp.

Autocast has nothing to say: z keeps its dtype, as in PyTorch's batch norm, and parameters of float32 are welcome.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.ops.linear_act_dropout import bits_bytes

NORMS = ("batch", "layer")

eager = _C.norm_act_dropout
dispatched = torch.ops.mlpkit.norm_act_dropout.default


def _rows(z: Tensor) -> int:
    rows = 1
    for size in z.shape[:-1]:
        rows = rows * size
    return rows


@torch.library.register_fake("mlpkit::norm_act_dropout_forward")  # type: ignore[untyped-decorator]
def _forward_fake(
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    slope: Tensor | None,
    seed: Tensor | None,
    norm: str,
    eps: float,
    activation: str,
    negative_slope: float,
    p: float,
    stream: int,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    others = {"weight": weight, "bias": bias, "mean": mean, "variance": variance, "slope": slope, "seed": seed}
    for name, tensor in others.items():
        if tensor is not None and tensor.device != z.device:
            raise ValueError(f"norm_act_dropout: {name} is on {tensor.device}; it must be on z's {z.device}")
    rows, cols = _rows(z), z.shape[-1]
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    statistics = {"none": 0, "batch": cols, "layer": rows}[norm]
    return (
        z.new_empty(z.shape),
        z.new_empty((statistics,), dtype=wide),
        z.new_empty((statistics,), dtype=wide),
        z.new_empty((cols if norm == "batch" and mean is None else 0,), dtype=wide),
        z.new_empty((bits_bytes(rows, cols, activation, p) if save else 0,), dtype=torch.uint8),
    )


@torch.library.register_fake("mlpkit::norm_act_dropout_backward")  # type: ignore[untyped-decorator]
def _backward_fake(
    dy: Tensor,
    z: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    bits: Tensor,
    norm: str,
    fixed: bool,
    activation: str,
    negative_slope: float,
    p: float,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    absent = z.new_empty((0,))
    dweight, dbias, dslope = (
        tensor.new_empty(tensor.shape) if need and tensor is not None else z.new_empty((0,))
        for need, tensor in zip(needs[1:], (weight, bias, slope), strict=True)
    )
    return z.new_empty(z.shape) if needs[0] else absent, dweight, dbias, dslope

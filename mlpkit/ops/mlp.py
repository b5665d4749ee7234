"""Op page of ``mlp``, without and with a norm: autocast. They trace into the halves of the layers' ops, which have the
fake kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.ops.linear_act_dropout import cast_like_linear

eager = _C.mlp
dispatched = torch.ops.mlpkit.mlp.default
norm_eager = _C.mlp_norm
norm_dispatched = torch.ops.mlpkit.mlp_norm.default


def _autocast(
    x: Tensor, weights: list[Tensor], biases: list[Tensor | None], slopes: list[Tensor | None], *rest: Any
) -> Tensor:
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        result: Tensor = dispatched(
            cast_like_linear(x, dtype),
            [cast_like_linear(weight, dtype) for weight in weights],
            [cast_like_linear(bias, dtype) for bias in biases],
            [cast_like_linear(slope, dtype) for slope in slopes],
            *rest,
        )
    return result


def _norm_autocast(x: Tensor, weights: list[Tensor], biases: list[Tensor | None], *rest: Any) -> tuple[Tensor, Tensor]:
    # The linear parts alone are cast, as where the layers are called one by one.
    device = x.device.type
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        result: tuple[Tensor, Tensor] = norm_dispatched(
            cast_like_linear(x, dtype),
            [cast_like_linear(weight, dtype) for weight in weights],
            [cast_like_linear(bias, dtype) for bias in biases],
            *rest,
        )
    return result


_library = torch.library.Library("mlpkit", "FRAGMENT")  # type: ignore[no-untyped-call]
for _key in ("AutocastCPU", "AutocastCUDA"):
    _library.impl("mlp", _autocast, _key)  # type: ignore[no-untyped-call]
    _library.impl("mlp_norm", _norm_autocast, _key)  # type: ignore[no-untyped-call]

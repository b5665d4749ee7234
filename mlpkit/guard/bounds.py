"""Which updates cannot make Inf or NaN, by their formula: those need no copy of parameters and state to fall back on.

For SGD, Adam, AdamW and RMSprop in fp32, fp64 or bf16 (to 2^127 and more): when parameters, gradients and state tensors
have norms of at most 2^40, settings lie within 2^10, betas 2^-20 below 1, eps is at least 2^-40, and second moments and
step counts are not negative, then the largest term, lr / (1 - beta1) * m / eps with |m| <= 2^51, stays below 2^122.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mlpkit.guard.census import Readings, local
from mlpkit.guard.state import parameters_of

LARGEST = 2.0**40
_LARGEST_SETTING = 2.0**10
_LARGEST_BETA = 1 - 2.0**-20
_SMALLEST_EPS = 2.0**-40
_KNOWN = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop)
_NOT_NEGATIVE = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "step")
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def provable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the bound holds for this optimizer's formula and settings; its tensors are for the readings to show."""
    hooked = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    # A subclass may compute anything, and so may a hook.
    return type(optimizer) in _KNOWN and not hooked and all(_modest(group) for group in optimizer.param_groups)


def add_readings(readings: Readings, optimizer: torch.optim.Optimizer) -> None:
    """Add what must hold of parameters and state, NaN included: one read of each tensor."""
    tensors = parameters_of(optimizer)
    counts: list[Tensor] = []
    for entries in optimizer.state.values():
        for key, value in entries.items():
            if not isinstance(value, Tensor) or not local(value).numel():
                continue
            value = local(value)
            if key not in _NOT_NEGATIVE:
                tensors.append(value)
            elif value.dim() == 0:
                counts.append(value)
            else:
                low, high = value.aminmax()
                readings.add(-low, 0.0)
                readings.add(high, LARGEST)
    readings.add_norms(tensors, LARGEST)
    if counts:
        readings.add(-torch.stack(counts), 0.0)


def _modest(group: dict[str, Any]) -> bool:
    if group.get("centered") or not all(parameter.dtype in _DTYPES for parameter in group["params"]):
        return False
    betas = (*group.get("betas", ()), group.get("alpha", 0.0))
    if not all(0 <= _number(beta) <= _LARGEST_BETA for beta in betas) or not group.get("eps", 1.0) >= _SMALLEST_EPS:
        return False
    names = ("lr", "weight_decay", "momentum", "dampening", "eps")
    return all(abs(_number(group.get(name, 0.0))) <= _LARGEST_SETTING for name in names)


def _number(setting: Any) -> float:
    """A setting on a device is NaN here, for reading it would cost a sync: no proof then."""
    return math.nan if isinstance(setting, Tensor) and setting.device.type != "cpu" else float(setting)

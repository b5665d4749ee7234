"""What a ``GradScaler`` keeps of one optimizer from step to step, and the quick way of its steps: one native call."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.errors import DtypeError
from mlpkit.guard import headroom
from mlpkit.guard.attempt import dense, fused_update
from mlpkit.guard.census import local
from mlpkit.guard.culprit import names_or_places
from mlpkit.guard.modes import watching_functions
from mlpkit.guard.scaler_queue import ScalerQueue
from mlpkit.guard.state import OptimizerCopy, parameters_of
from mlpkit.guard.update import FusedUpdate


class ScaledOptimizer:
    """names, where asked for: of a protected model's parameters by identity; others are told by their places."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.saved = OptimizerCopy(optimizer)
        self.absmax = headroom.AbsmaxHistory()
        self.unscaled_by_caller = False
        self.largest: float | None = None  # of the gradients that were unscaled last, after it, where that is known
        self.fused: FusedUpdate | None = None
        self.queue: ScalerQueue | None = None
        self.norm: float | None = None  # of the gradients that the last quick step saw

    def unscale(self, optimizer: torch.optim.Optimizer, scale: Tensor) -> dict[torch.device, Tensor] | None:
        """Divide all gradients by the scale, as torch's scaler does, and remember how large they were.

        Returns that scaler's flags by device; None where torch's own way is to be gone, and nothing has been done.
        """
        if scale.device.type != "cpu" or (torch._C._len_torch_function_stack() and watching_functions()):
            return None
        found = _C.unscale(optimizer.param_groups, scale)
        if found is None:
            return None
        flag, values, largest = found
        by = scale.item()
        self.largest = largest / by if by else math.inf
        self.absmax.add(values, by)
        return {flag.device: flag}

    def look(self, optimizer: torch.optim.Optimizer, scale: Tensor, names: dict[int, str]) -> None:
        """Remember how large gradients are that torch's own way is about to unscale; DtypeError for complex ones."""
        parameters = parameters_of(optimizer)
        gradients = [None if one.grad is None else dense(local(one.grad)) for one in parameters]
        for parameter, gradient in zip(parameters, gradients):
            if gradient is not None and gradient.is_complex():
                name = names_or_places(optimizer, names)[id(parameter)]
                raise DtypeError(f"GradScaler: the gradient of {name} is complex, which cannot be guarded")
        self.largest = None
        self.absmax.add(headroom.absmax(gradients), scale)

    def take(self, optimizer: torch.optim.Optimizer, scale: Tensor, state: dict[str, Any], ready: bool) -> bool:
        """Whether one native call has made the step, unscaling included where gradients are ``ready`` for that.

        Otherwise no parameter or state has changed, and the step is to be looked at with all the means there are.
        state: torch's of this optimizer, gets the flags of what has been unscaled here.
        """
        fused = self.fused = fused_update(optimizer, self.fused)
        if fused is None or not fused.prepared:
            return False
        clip = getattr(optimizer, "clip_norm", None)
        try:
            outcome = fused.step(
                optimizer,
                clip_norm=math.inf if clip is None else clip,
                grad_scale=scale if ready else None,
                unscale=ready,
            )
        except (TypeError, ValueError):
            # What it cannot take, the optimizer itself takes, or refuses in its own words.
            self.fused = None
            return False
        if ready and outcome.unscaled:
            bad = outcome.rows > 0
            state["found_inf_per_device"] = {scale.device: torch.full((), float(bad))}
            self.absmax.add(fused.absmax(), scale.item())
        if outcome.taken:
            self.norm = outcome.norm
            optimizer._opt_called = True  # type: ignore[attr-defined]  # what a scheduler looks at
        return outcome.taken

    def place(self, optimizer: torch.optim.Optimizer, name: str, names: dict[int, str]) -> int | None:
        """Where among all parameters the one of this name is."""
        known = names_or_places(optimizer, names)
        return next((i for i, one in enumerate(parameters_of(optimizer)) if known[id(one)] == name), None)

"""Guarded updates that the device decides: queued, and read only when somebody asks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from mlpkit._ext import _C
from mlpkit.errors import ArgumentError
from mlpkit.guard.update import DeviceScale, FusedUpdate, Outcome

_SKIPS, _NUMBERS = 32, 12  # of the device's log: skips that it holds, numbers of one

Skip = tuple[int, Outcome, tuple[int, int, int, float, float], Tensor | None, float]


class Queued:
    """A step whose fate lies on the device. outcome, census: as in ``mlpkit.ops.guarded_update.Outcome``."""

    def __init__(self, outcome: Tensor, census: Tensor, parameters: list[Tensor]) -> None:
        self.outcome, self.census, self.parameters = outcome, census, parameters

    @property
    def taken(self) -> Tensor:
        """1 or 0, 0-dim float64, on the device."""
        return self.outcome[0]

    @property
    def norm(self) -> float:
        """The global norm of the gradients, unscaled, before clipping. Syncs."""
        return float(self.outcome[2])

    def read(self) -> Outcome:
        """All of it. Syncs."""
        taken, reason, norm, factor, row, rows = self.outcome.tolist()
        return Outcome(bool(taken), int(reason), norm, factor, int(row), int(rows))


class DeviceUpdate(FusedUpdate):
    """``FusedUpdate`` where the parameters are on a device: it never knows what became of a step.

    State that a step creates stays though the step be skipped: zeros, as an optimizer begins.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.parameters: list[Tensor] = []  # by row: those that have a gradient or state
        self.unnamed = 0  # skips that the log had forgotten before they were looked at
        self._told = 0
        self._logs: list[tuple[Any, list[Tensor]]] = []  # native objects with their parameters, the last one in use

    def queue(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float = math.inf,
        scale: DeviceScale | None = None,
        grad_scale: Tensor | float | None = None,
        found_inf: Tensor | float | None = None,
        force: bool = False,
    ) -> Queued | None:
        """Queue an update; None where no parameter has a gradient or state. Arguments: as ``FusedUpdate.step``."""
        device = optimizer.param_groups[0]["params"][0].device
        value, clean, rule = grad_scale, None, None
        if scale is not None:
            value, clean, rule = scale.value, scale.clean_steps, scale.numbers
        made = self._made(optimizer, [], clip_norm, _on(device, value), clean, _on(device, found_inf), rule, force)
        if made is None:
            return None
        if not self._logs or self._logs[-1][0] is not self._native:
            self._logs.append((self._native, self.parameters))
        outcome, census = made
        return Queued(outcome, census, self.parameters)

    def skips(self) -> Iterator[Skip]:
        """(step, outcome, census of the parameter at fault, that parameter, scale) of every skip since the last call,
        or of the 32 latest. Syncs.
        """
        while self._logs:
            native, parameters = self._logs[0]
            log = native.log()
            numbers = [] if log is None else log.tolist()
            count = int(numbers[1]) if numbers else 0
            self.unnamed += max(count - self._told - _SKIPS, 0)
            for number in range(max(self._told, count - _SKIPS), count):
                begin = 2 + number % _SKIPS * _NUMBERS
                yield self._skip(numbers[begin : begin + _NUMBERS], parameters)
            self._told = count
            if len(self._logs) == 1:
                return
            # Parameters were added, or state replaced: the old log has ended.
            self._before += int(numbers[0]) if numbers else 0
            del self._logs[0]
            self._told = 0

    _before = 0  # steps of logs that have ended

    def _skip(self, numbers: list[float], parameters: list[Tensor]) -> Skip:
        step, reason, norm, factor, row, rows, scale, nan, inf, first, absmax, squares = numbers
        place = int(row)
        outcome = Outcome(False, int(reason), norm, factor, place, int(rows))
        parameter = parameters[place] if 0 <= place < len(parameters) else None
        census = (int(nan), int(inf), int(first), absmax, squares)
        return self._before + int(step), outcome, census, parameter, scale

    def _new(self) -> Any:
        return None

    def _call(self, optimizer: torch.optim.Optimizer, *arguments: Any) -> Any:
        return self._native.step(optimizer.param_groups, optimizer.state, *arguments)

    def _prepare(self, optimizer: torch.optim.Optimizer, created: list[tuple[Tensor, list[str]]]) -> bool:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise ArgumentError(f"{type(optimizer).__name__}: take a step before a CUDA graph captures one")
        rows = list(self._rows(optimizer, created))
        self.parameters = [row.parameter for row in rows]
        groups = [group["params"] for group in optimizer.param_groups]
        # A low-precision copy of a parameter is the op's to make.
        native = [(row.parameter, row.group, row.state, *row.names, None, row.fresh) for row in rows]
        self._native = _C.DeviceUpdate(self.kind, native, groups, optimizer.state) if rows else None
        return bool(rows)


def _on(device: torch.device, number: Tensor | float | None) -> Tensor | None:
    """torch's scaler sets ``found_inf`` to the sum of no tensors, the int 0, where there are no gradients."""
    if number is None or isinstance(number, Tensor):
        return number
    return torch.full((), float(number), dtype=torch.float32, device=device)

"""One decision for all ranks: what a guarded step asks of the others under DDP and FSDP2, and which rank was guilty.

A clean step costs one all-reduce of one number (two where parameters are sharded, for the global norm); only after a
flag went up do ranks tell each other in full what they found.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakMethod

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlpkit.guard import census
from mlpkit.guard.census import local
from mlpkit.guard.record import SkipRecord

T = TypeVar("T")
_MOST_GRADIENTS = 1 << 16  # of backward passes that no decision follows


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself: without DDP and without the wrapper of ``torch.compile``."""
    while True:
        inner = model.module if isinstance(model, DistributedDataParallel) else getattr(model, "_orig_mod", model)
        if inner is model:
            return model
        model = inner


class Ranks:
    """The ranks that train one model together; without DDP or FSDP2 it is this process alone, and asking costs nothing.

    The decision is the maximum over ranks of one number: 0 clean, 1 bad, above 1 bad and begun on that rank. Whether a
    fault began here is read before gradients are reduced: from this rank's loss and its own gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        self.group, self.sharded = _group_of(model)
        self.size = torch.distributed.get_world_size(self.group) if self.group is not None else 1
        self.rank = torch.distributed.get_rank(self.group) if self.group is not None else 0
        self.guilty: int | None = None  # of the last bad decision
        self._model = model
        self._local: deque[Tensor] = deque(maxlen=_MOST_GRADIENTS)
        self._attended: dict[int, Tensor] = {}
        if self.alone:
            return
        self._device = next(local(parameter).device for parameter in model.parameters())
        if self.sharded:
            for module in model.modules():
                module.register_forward_pre_hook(self._attend)
        else:
            self._attend(model, recurse=True)

    @property
    def alone(self) -> bool:
        """Whether no other rank is asked."""
        return self.group is None

    @property
    def reductions(self) -> int:
        """All-reduces of a clean step: the decision and, of shards, the norm."""
        return 0 if self.alone else 1 + self.sharded

    def _attend(self, module: nn.Module, _: Any = None, *, recurse: bool = False) -> None:
        """Look at gradients before they are reduced. FSDP2 shows its whole parameters only during a forward."""
        for parameter in module.parameters(recurse):
            if parameter.requires_grad and parameter is local(parameter) and id(parameter) not in self._attended:
                parameter.register_hook(_weakly(self._see))  # type: ignore[no-untyped-call]
                self._attended[id(parameter)] = parameter

    def _see(self, gradient: Tensor) -> None:
        self._local.append(torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32))

    def without_sync(self, last: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward: gradients are reduced only by the last one of a step."""
        if last or self.alone:
            return nullcontext()
        return self._model.no_sync() if isinstance(self._model, DistributedDataParallel) else self._unsynced()

    @contextmanager
    def _unsynced(self) -> Iterator[None]:
        self._model.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            self._model.set_requires_gradient_sync(True)  # type: ignore[operator]

    def exceeded(self, readings: census.Readings, losses: Sequence[Tensor]) -> bool:
        """``readings.exceeded()`` of any rank; sets ``guilty``."""
        return self.decide(readings.exceeded(), losses)

    def decide(self, bad: bool, losses: Sequence[Tensor] = ()) -> bool:
        """Whether any rank calls the step bad; sets ``guilty`` to the lowest rank that saw it begin."""
        if self.alone:
            return bad
        seen = [*(loss.detach().float().reshape(()) for loss in losses), *self._local]
        self._local.clear()
        here = bool(seen) and not math.isfinite(float(torch.stack(seen).sum()))
        number = 1 + here * (self.size - self.rank) if bad else 0
        worst = int(self._reduced(number, "MAX"))
        self.guilty = self.size + 1 - worst if worst > 1 else None
        return worst > 0

    def told(self, record: SkipRecord) -> SkipRecord:
        """The guilty rank's record, the same on all ranks, with that rank's number. After a bad decision only."""
        if self.alone:
            return record
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, record, group=self.group)
        chosen: SkipRecord = values[self.guilty or 0]
        return replace(chosen, rank=self.guilty)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.decide(False)

    def forget(self) -> None:
        """Drop what was seen of a step that is abandoned."""
        self._local.clear()

    def common(self, value: T | None) -> T | None:
        """The guilty rank's value, or the first rank's that has one: the same everywhere. After a bad decision only."""
        if self.alone:
            return value
        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self.group)
        order = sorted(range(self.size), key=lambda rank: rank != self.guilty)
        found = next((rank for rank in order if values[rank] is not None), None)
        if found is not None and self.guilty is None:
            self.guilty = found
        return None if found is None else values[found]

    def global_norm(self, gradients: Sequence[Tensor], measure: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """``measure(gradients)``, over all shards where parameters are sharded; those that are not count once."""
        if not self.sharded:
            return measure(gradients)
        shards = [local(gradient) for gradient in gradients if gradient is not local(gradient)]
        whole = [gradient for gradient in gradients if gradient is local(gradient)] if self.rank == 0 else []
        parts = [*shards, *whole]
        square = measure(parts).double().square() if parts else torch.zeros((), dtype=torch.float64)
        return torch.tensor(self._reduced(float(square), "SUM"), dtype=torch.float64, device=self._device).sqrt()

    def _reduced(self, number: float, how: str) -> float:
        total = torch.tensor(number, dtype=torch.float64, device=self._device)
        torch.distributed.all_reduce(total, getattr(torch.distributed.ReduceOp, how), group=self.group)
        return float(total)


def _group_of(model: nn.Module) -> tuple[Any, bool]:
    """(process group, whether parameters are sharded); (None, False) for a model of this process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None, False
    outer = getattr(model, "_orig_mod", model)
    if isinstance(outer, DistributedDataParallel):
        return outer.process_group, False
    for parameter in model.parameters():
        if hasattr(parameter, "device_mesh"):
            return parameter.device_mesh.get_group(0), True
    return None, False


def _weakly(see: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    """A hook that ends with the object whose method it calls."""
    method = WeakMethod(see)

    def hook(gradient: Tensor) -> None:
        alive = method()
        if alive is not None:
            alive(gradient)

    return hook

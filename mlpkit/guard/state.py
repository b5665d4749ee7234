"""Copies that put a run back bit for bit: buffers as the forward found them, parameters and optimizer state."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from mlpkit.errors import ArgumentError
from mlpkit.guard.census import local

_PLAIN = (bool, int, float, str, tuple, type(None))


class Copies:
    """Room for copies of a list of tensors; kept from step to step while shapes stay."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._copies: list[Tensor] = []

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Copy these tensors; of a sharded one, this rank's shard."""
        tensors = [local(tensor) for tensor in tensors]
        kept = self._copies
        if len(kept) != len(tensors) or not all(_alike(a, b) for a, b in zip(kept, tensors)):
            self._copies = [torch.empty_like(tensor, requires_grad=False) for tensor in tensors]
        self._tensors = list(tensors)
        _copy(self._copies, self._tensors)

    def restore(self) -> None:
        """Put the copies back into the tensors they came from."""
        _copy(self._tensors, self._copies)

    def restore_unless(self, taken: Tensor) -> None:
        """Put the copies back where this number on the device is 0, without reading it."""
        with torch.no_grad():
            for tensor, kept in zip(self._tensors, self._copies, strict=True):
                torch.where(taken != 0, tensor, kept, out=tensor)


class Buffers:
    """The registered buffers of a model: copied before a forward, checked after it, restored after a skip."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies = Copies()
        self._entries: list[tuple[dict[str, Tensor | None], str, str, Tensor | None, torch.Size]] = []
        self._owners: list[tuple[str, dict[str, Tensor | None], set[str]]] = []
        # A sentinel (a mask of -inf, an observer's first minimum) is meant; statistics of a norm never are.
        self.sentinels = frozenset(name for name, buffer in self.named() if _is_sentinel(name, buffer))

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """(qualified name, buffer) of all registered buffers."""
        return self._model.named_buffers()

    def take(self) -> None:
        """Remember which tensors the buffers are, and copy them."""
        self._entries = []
        owners = ((name, module._buffers) for name, module in self._model.named_modules())
        self._owners = [(name, entries, set(entries)) for name, entries in owners if entries]
        for prefix, owner, _ in self._owners:
            for key, buffer in owner.items():
                name = f"{prefix}.{key}" if prefix else key
                shape = torch.Size() if buffer is None else buffer.shape
                self._entries.append((owner, key, name, buffer, shape))
        self._copies.take([buffer for *_, buffer, _ in self._entries if buffer is not None])

    def checked(self, owner: str = "TrainStep") -> list[Tensor]:
        """The float buffers that must be finite. Raises ArgumentError naming one that was rebound, resized or added."""
        for entries, key, name, buffer, shape in self._entries:
            now = entries.get(key)
            if now is not buffer or (now is not None and now.shape != shape):
                how = "resized" if now is buffer else "rebound to another tensor"
                raise ArgumentError(
                    f"{owner}: the forward left buffer {name!r} {how}; change it in place with copy_, "
                    "or a bad step cannot be undone"
                )
        for prefix, _, key in self._new():
            raise ArgumentError(f"{owner}: the forward registered a new buffer {key!r} in {prefix!r}; do so before")
        return [buffer for _, _, name, buffer, _ in self._entries if buffer is not None and name not in self.sentinels]

    def _new(self) -> Iterator[tuple[str, dict[str, Tensor | None], str]]:
        """(module, its buffers, key) of those that were registered since they were taken."""
        if sum(len(module._buffers) for module in self._model.modules()) == len(self._entries):
            return
        known = {id(entries): keys for _, entries, keys in self._owners}
        for name, module in self._model.named_modules():
            for key in module._buffers.keys() - known.get(id(module._buffers), set()):
                yield name, module._buffers, key

    def restore_unless(self, taken: Tensor) -> None:
        """``restore`` where this number on the device is 0, decided there; after ``checked``."""
        self._copies.restore_unless(taken)

    def restore(self) -> None:
        """Bind and fill the buffers as they were; new ones go."""
        for _, owner, key in list(self._new()):
            del owner[key]
        for owner, key, _, buffer, shape in self._entries:
            owner[key] = buffer
            if buffer is not None and buffer.shape != shape:
                buffer.resize_(shape)
        self._copies.restore()


class Places:
    """Where a model keeps its modules and parameters, to notice when one of them is replaced."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.look()

    def look(self) -> None:
        """Take them as they are now."""
        places = (entries for module in self._model.modules() for entries in (module._modules, module._parameters))
        self._places: list[dict[str, Any]] = [entries for entries in places if entries]
        self._known = [one for entries in self._places for one in entries.values()]

    def same(self) -> bool:
        """Whether every place holds what it held."""
        now = [one for entries in self._places for one in entries.values()]
        return len(now) == len(self._known) and all(map(is_, now, self._known))

    def parameters(self) -> Iterator[Tensor]:
        """Those that were there at the last look, each as often as it is kept."""
        return (one for one in self._known if isinstance(one, Tensor))


class OptimizerCopy:
    """Parameters, state and settings of an optimizer, copied before an update and put back if the update was bad."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._copies = Copies()
        self._states: dict[Any, tuple[dict[str, Any], dict[str, Any]]] = {}
        self._groups: list[dict[str, Any]] = []
        self.pending = False  # taken, and neither kept nor restored yet

    def take(self) -> None:
        """Copy everything that ``optimizer.step`` may write."""
        optimizer = self._optimizer
        self._states = {key: (entries, _shallow(entries)) for key, entries in optimizer.state.items()}
        self._groups = [_shallow({k: v for k, v in group.items() if k != "params"}) for group in optimizer.param_groups]
        tensors = parameters_of(optimizer)
        for entries in [*(saved for _, saved in self._states.values()), *self._groups]:
            tensors += [value for value in entries.values() if isinstance(value, Tensor)]
        self._copies.take(tensors)
        self.pending = True

    def keep(self) -> None:
        """Let the update stand."""
        self.pending = False

    def restore(self) -> None:
        """Put everything back, if an update is pending; state that did not exist is removed again."""
        if not self.pending:
            return
        optimizer = self._optimizer
        for key in [key for key in optimizer.state if key not in self._states]:
            del optimizer.state[key]
        for key, (entries, saved) in self._states.items():
            entries.clear()
            entries.update(saved)
            optimizer.state[key] = entries
        for group, settings in zip(optimizer.param_groups, self._groups):
            for name in [name for name in group if name != "params" and name not in settings]:
                del group[name]
            group.update(settings)
        self._copies.restore()
        self.pending = False


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """All parameters of an optimizer, group by group."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def state_of(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> Iterator[tuple[str, Tensor]]:
    """(``"exp_avg of layers.0.weight"``, tensor) of all tensors that an optimizer keeps."""
    for parameter, entries in optimizer.state.items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                yield f"{key} of {names.get(id(parameter), 'a parameter')}", value
    for index, group in enumerate(optimizer.param_groups):
        for key, value in group.items():
            if isinstance(value, Tensor):
                yield f"{key} of parameter group {index}", value


def _shallow(entries: dict[str, Any]) -> dict[str, Any]:
    """Tensors by reference (their content is copied elsewhere), numbers as they are, anything else deeply."""
    kept = (Tensor, *_PLAIN)
    return {key: value if isinstance(value, kept) else copy.deepcopy(value) for key, value in entries.items()}


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)


def _is_sentinel(name: str, buffer: Tensor) -> bool:
    if name.rpartition(".")[2] in ("running_mean", "running_var") or not buffer.is_floating_point():
        return False
    return bool(torch.isinf(buffer).any()) and not bool(torch.isnan(buffer).any())

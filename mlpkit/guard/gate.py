"""A model in a loop that is not ours: its buffers copied, and its calls remembered, by hooks on its forward."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlpkit.guard.census import Finding, local
from mlpkit.guard.culprit import forward_culprit
from mlpkit.guard.ranks import unwrapped
from mlpkit.guard.replay import Arguments, Autocast, MicroBatch, random_state
from mlpkit.guard.state import Buffers

_MOST_CALLS = 8  # whose inputs are held until the next update


class Gate:
    """Opened by the first training forward since ``close()``: from then on ``buffers`` can be put back.

    A forward in eval mode or without a graph opens nothing, nor do forwards of copies of the model. Buffers that change
    outside forwards while it is open (a checkpoint that is loaded) are copied anew by the next forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._inner = unwrapped(model)
        self.buffers = Buffers(self._inner)
        self.open = False
        self._model = model
        self._device = next((local(parameter).device for parameter in model.parameters()), torch.device("cpu"))
        self._versions: list[tuple[Tensor, int]] = []
        self._calls: list[tuple[MicroBatch, Autocast]] = []
        self._stale = False  # buffers were changed outside forwards since they were copied
        # The model does not keep the gate, nor the calls that it holds, once its scaler has gone.
        before, after = weakref.WeakMethod(self._before), weakref.WeakMethod(self._after)
        handles = [
            model.register_forward_pre_hook(_Hook(before), prepend=True, with_kwargs=True),
            model.register_forward_hook(_Hook(after), always_call=True),
        ]
        self._finalizer = weakref.finalize(self, _remove, handles)

    def begin(self) -> None:
        """Open without a forward of the model's own: the loop calls its parts."""
        if not self.open:
            self.buffers.take()
        self.open = True

    def close(self) -> None:
        """The iteration is over."""
        self.open = False
        self._calls = []

    def remove(self) -> None:
        """Take the hooks off the model."""
        self._finalizer()
        self.close()

    def culprit(self, loss: Finding) -> tuple[str, str, Finding, str]:
        """Who made a loss bad: (where, culprit, finding, note), by running the calls again on a stand-in."""
        note = ""
        for batch, autocast in self._calls:
            where, culprit, finding, note = forward_culprit(self._inner, batch, loss, self._device, autocast)
            if where != "loss":
                return where, culprit, finding, note
        return "loss", "loss", loss, note

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._stale |= any(buffer._version != version for buffer, version in self._versions)
        if not (self._model.training and torch.is_grad_enabled()):
            return
        if not self.open or self._stale:
            self.buffers.take()
        self.open, self._stale = True, False
        if len(self._calls) < _MOST_CALLS:
            kind = self._device.type
            again = partial(torch.autocast, kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            batch = MicroBatch(Arguments(args, kwargs), None, torch.zeros(()), random_state(self._device))
            self._calls.append((batch, again))

    def _after(self, *_: Any) -> None:
        self._versions = [(buffer, buffer._version) for _, buffer in self.buffers.named()]


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


class _Hook:
    """A module hook that does nothing once the module has been copied or pickled: the copy is another model."""

    def __init__(self, act: weakref.WeakMethod[Callable[..., None]] | None = None) -> None:
        self._act = act

    def __call__(self, *arguments: Any) -> None:
        act = self._act() if self._act is not None else None
        if act is not None:
            act(*arguments)

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> Any:
        return _Hook, ()

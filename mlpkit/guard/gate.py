"""Buffers of a model in a loop that is not ours: copied by a hook before the first forward of each iteration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mlpkit.guard.ranks import unwrapped
from mlpkit.guard.state import Buffers


class Gate:
    """Opened by the first training forward since ``close()``: from then on ``buffers`` can be put back.

    A forward in eval mode or without a graph opens nothing, nor do forwards of copies of the model. Buffers that change
    outside forwards while it is open (a checkpoint that is loaded) are copied anew by the next forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self.buffers = Buffers(unwrapped(model))
        self.open = False
        self._model = model
        self._versions: list[tuple[Tensor, int]] = []
        self._handles: list[RemovableHandle] = [
            model.register_forward_pre_hook(_Hook(self._before), prepend=True),
            model.register_forward_hook(_Hook(self._after), always_call=True),
        ]

    def close(self) -> None:
        """The iteration is over."""
        self.open = False

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _before(self) -> None:
        if not (self._model.training and torch.is_grad_enabled()):
            return
        touched = any(buffer._version != version for buffer, version in self._versions)
        if not self.open or touched:
            self.buffers.take()
        self.open = True

    def _after(self) -> None:
        self._versions = [(buffer, buffer._version) for _, buffer in self.buffers.named()]


class _Hook:
    """A module hook that does nothing once the module has been copied or pickled: the copy is another model."""

    def __init__(self, act: Any = None) -> None:
        self._act = act

    def __call__(self, *_: Any) -> None:
        if self._act is not None:
            self._act()

    def __deepcopy__(self, memo: Any) -> _Hook:
        return _Hook()

    def __reduce__(self) -> Any:
        return _Hook, ()
